"""Threads, values that outlive a forward, and values that several forwards share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_models import Net, X, assert_same, fused, nodes, normed
from torch import Tensor, nn

import wn_surgery as wn
from wn_surgery.fused import invalidate, shared


@pytest.mark.parametrize("models", [1, 2])
def test_threads(models: int) -> None:
    made = [fused() for _ in range(models)]
    wanted = normed()(X)
    problems: list[object] = []

    def work(model: nn.Module) -> None:
        for _ in range(30):
            out = model(X)
            if not torch.equal(out, wanted):
                problems.append(out)
            torch.autograd.grad(out.sum(), list(model.parameters()))

    threads = [threading.Thread(target=work, args=(made[i % models],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_thread_that_steps_aside_leaves_the_others_forward_alone() -> None:
    model = fused()
    inside, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert leave.wait(10)

    model.up.register_forward_pre_hook(wait)
    outs: list[Tensor] = []
    thread = threading.Thread(target=lambda: outs.append(model(X)))
    thread.start()
    assert inside.wait(10)
    here = model(X)
    leave.set()
    thread.join()
    assert torch.equal(here, outs[0]) and torch.equal(here, normed()(X))


def test_replicas_take_the_plain_path() -> None:
    model = fused()
    model(X)
    replica = model._replicate_for_data_parallel()
    front = model.front._replicate_for_data_parallel()
    assert "_fused_weight" in model.front.__dict__ and "_fused_weight" not in front.__dict__
    assert torch.equal(replica(X), model(X))  # its hooks leave the model's scope alone
    assert len(nodes(model)) == 1


def computed(model: nn.Module) -> list[Tensor]:
    """A weight in each of two forwards without grad."""
    found: list[Tensor] = []
    handle = model.front.register_forward_pre_hook(lambda m, _: found.append(m.weight))
    with torch.no_grad():
        kept = model(X), model(X)
    handle.remove()
    assert torch.equal(*kept)
    return found


def test_reuse_in_eval_mode_only() -> None:
    model = fused(reuse=True)
    first, second = computed(model.train())
    assert first is not second
    first, second = computed(model.eval())
    assert first is second


CHANGES: dict[str, Callable[[Net], object]] = {
    "version": lambda m: m.front.parametrizations.weight.original0.mul_(2),  # type: ignore[union-attr,operator]
    "address": lambda m: setattr(
        m.front.parametrizations.weight.original0,
        "data",
        torch.ones(6, 1, 1),  # type: ignore[union-attr]
    ),
    "identity": lambda m: setattr(
        m.front.parametrizations.weight, "original0", nn.Parameter(torch.ones(6, 1, 1))
    ),
    "load": lambda m: m.load_state_dict({k: 2 * p for k, p in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict(
        {k: 2 * p for k, p in m.state_dict().items()}, assign=True
    ),
    "train and eval": lambda m: (
        m.front.parametrizations.weight.original0.data.mul_(2),
        m.train(),
        m.eval(),
    ),  # type: ignore[union-attr]
    "to": lambda m: (m.front.parametrizations.weight.original0.data.mul_(2), m.to("cpu")),  # type: ignore[union-attr]
    "grad-mode forward": lambda m: (
        m.front.parametrizations.weight.original0.data.mul_(2),  # type: ignore[union-attr]
        torch.enable_grad()(m)(X),
    ),
    "invalidate": lambda m: (m.front.parametrizations.weight.original0.data.mul_(2), invalidate(m)),  # type: ignore[union-attr]
    "writable": lambda m: write(m),  # noqa: PLW0108 - defined below
}


def write(model: Net) -> None:
    with wn.writable(model):
        nn.init.constant_(model.front.weight, 0.5)


@pytest.mark.parametrize("change", CHANGES)
def test_what_ends_a_reuse(change: str) -> None:
    model, other = fused(reuse=True).eval(), normed().eval()
    with torch.no_grad():
        before = model(X)
        for each in (model, other):
            CHANGES[change](each)
        after = model(X)
        assert torch.equal(after, other(X)) and not torch.equal(after, before)


def test_a_fused_optimizer_ends_a_reuse() -> None:
    model, other = fused(reuse=True).eval(), normed().eval()
    for each in (model, other):
        for parameter in each.parameters():
            parameter.grad = torch.ones_like(parameter)
        with torch.no_grad():
            each(X)
        torch.optim.AdamW(each.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        assert torch.equal(model(X), other(X))


def test_reused_values_are_not_inference_tensors_of_another_mode() -> None:
    model = fused(reuse=True).eval()
    with torch.inference_mode():
        first = model(X)
    x = X.clone().requires_grad_()
    assert torch.equal(model(x), first)
    model(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(model(X), first)


def test_shared_across_calls() -> None:
    seen: list[Any] = []

    def step(model: nn.Module) -> Tensor:
        handle = model.front.register_forward_pre_hook(lambda m, _: seen.append(m.weight.grad_fn))  # type: ignore[union-attr]
        if model._forward_hooks:
            with shared(model):
                first, second = model(X).square().mean(), model(-X).sin().mean()
        else:
            first, second = model(X).square().mean(), model(-X).sin().mean()
        handle.remove()
        first.backward()
        second.backward()
        return (first + second).detach()

    assert_same(step)
    assert seen[0] is seen[1] and seen[2] is not seen[0]
