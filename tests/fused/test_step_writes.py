"""Writes into a model whose weights last until the next optimizer step, counted by torch or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn
from tests.fused.models import RULES, Net, X, normed
from tests.fused.stepping import Run, assert_same, parts
from wn_surgery.fused import evaluator
from wn_surgery.model.sites import normed as sites_of

# Writes that torch counts: the new weight, at once -----------------------------------------------


def scale_v(model: Net) -> None:
    with torch.no_grad():
        parts(model)[1][0].mul_(-2.0)


def scale_g(model: Net) -> None:
    with torch.no_grad():
        parts(model, 4)[0].mul_(3.0)


def load(model: Net) -> None:
    state = {k: t + 0.1 for k, t in model.state_dict().items()}
    model.load_state_dict(state)


def assign(model: Net) -> None:
    state = {k: t + 0.1 for k, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def exchange_data(model: Net) -> None:
    for p in model.parameters():
        p.data = p.data + 0.1


def initialize(model: Net) -> None:
    torch.manual_seed(7)
    model.head.reset_parameters()


def open_weights(model: Net) -> None:
    with wn.writable(model):
        nn.init.constant_(model.middle[0].weight, 0.25)


def assign_weight(model: Net) -> None:
    model.front.weight = torch.ones_like(model.front.weight)


def to_double_and_back(model: Net) -> None:
    model.double()
    scale_v(model)
    model.float()


def other_dim(model: Net) -> None:
    model.up.parametrizations.weight[0].eps = 10.0


def remove_one(model: Net) -> None:
    wn.remove(model, {"action": "remove", "names": "front"})
    with torch.no_grad():
        model.front.weight.mul_(2.0)


def remove_and_apply(model: Net) -> None:
    wn.remove(model)
    with torch.no_grad():
        model.front.weight.mul_(2.0)
    wn.apply(model, RULES)


def legacy_and_back(model: Net) -> None:
    wn.migrate(model.front, to="legacy")
    scale_v(model)
    wn.migrate(model)


WRITES = [scale_v, scale_g, load, assign, exchange_data, initialize, open_weights, assign_weight,
          to_double_and_back, other_dim, remove_one, remove_and_apply, legacy_and_back]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_two_forwards(write: Callable[[Net], None]) -> None:
    lasting, usual = Run(lasts=True), Run(lasts=False)
    before = lasting.model(X).detach()
    outputs = []
    for run in (lasting, usual):
        write(run.model)
        outputs.append(run.model(X))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], before)
    for p, q in zip(lasting.model.parameters(), usual.model.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_hooks_on_the_parametrization_run_when_it_computes() -> None:
    run = Run(lasts=True)
    run.loss(0)
    seen: list[Any] = []
    layer: Any = run.model.front
    layer.parametrizations.weight.register_forward_hook(lambda *_: seen.append(1))
    run.loss(0)
    assert not seen  # nothing is computed
    run.step(0)
    run.loss(1)
    assert seen


def test_functional_call_takes_what_it_is_given() -> None:
    run = Run(lasts=True)
    run.loss(0)
    doubled = {k: (2 * p).detach() for k, p in run.model.named_parameters()}
    found = torch.func.functional_call(run.model, doubled, X)
    twin = normed()
    twin.load_state_dict(doubled)
    assert torch.equal(found, twin(X))


def test_backward_after_a_counted_write_raises_as_torch_does() -> None:
    run = Run(lasts=True)
    loss = run.loss(0)
    scale_v(run.model)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


# Writes that torch does not count: right, or an error, and never an old gradient ----------------


def negate(model: Net) -> None:
    parts(model)[1].data.neg_()  # all norms stay


def swap_rows(model: Net) -> None:
    v = parts(model, 1)[1]
    v.data[[0, 1]] = v.data[[1, 0]]


def by_numpy(model: Net) -> None:
    parts(model, 2)[1].detach().numpy()[0, 0, 0] += 1e-3


def by_storage(model: Net) -> None:
    parts(model, 4)[1].untyped_storage()[3] = 60  # the high byte of the first element


def scale_g_data(model: Net) -> None:
    parts(model, 3)[0].data.mul_(1.01)


def the_weight_itself(model: Net) -> None:
    model.middle[2].weight.data.zero_()


HIDDEN = {
    negate: "front.weight",
    swap_rows: "middle.0.weight",
    by_numpy: "middle.2.weight",
    by_storage: "head.weight",
    scale_g_data: "up.weight",
    the_weight_itself: "middle.2.weight",
}


@pytest.mark.parametrize("write", list(HIDDEN))
def test_a_hidden_write_within_a_step(write: Callable[[Net], None]) -> None:
    run = Run(lasts=True)
    run.loss(0).backward()
    before = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    write(run.model)
    loss = run.loss(1)
    with pytest.raises(wn.ModelError, match=r"written to through \.data") as caught:
        loss.backward()
    assert caught.value.site == HIDDEN[write]  # type: ignore[index]
    assert caught.value.kind == "fusion"
    for site, place in zip(sites_of(run.model), range(5), strict=True):
        for part in (site.held.g, site.held.v):
            assert part.grad is not None
            assert any(torch.equal(part.grad, old) for old in before), place


def test_one_forward_a_step_is_not_checked(
    both_paths: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if both_paths == "native":
        pytest.skip("nothing in Python to count")
    run, checks = Run(lasts=True), []
    monkeypatch.setattr(evaluator, "_check_kept", lambda *_: checks.append(1))
    for i in range(3):
        run.step(i)
    assert not checks
    run.loss(3).backward()
    run.loss(4).backward()
    assert checks
    run.optimizer.step()
    checks.clear()
    run.step(5)
    assert not checks
    _ = run.model.front.weight  # by itself
    run.loss(6).backward()
    assert checks


@pytest.mark.parametrize("write", [w for w in HIDDEN if w is not the_weight_itself])
def test_a_hidden_write_is_seen_without_grad_in_eval_mode_and_after_a_step(
    write: Callable[[Net], None],
) -> None:
    lasting, usual = Run(lasts=True), Run(lasts=False)
    for run in (lasting, usual):
        run.step(0)
        run.loss(1)
    for run in (lasting, usual):
        write(run.model)
    with torch.no_grad():
        assert torch.equal(lasting.model(X), usual.model(X))
    with torch.inference_mode():
        assert torch.equal(lasting.model(X), usual.model(X))
    with torch.no_grad(), wn.folded(lasting.model):
        assert torch.equal(lasting.model(X), usual.model(X))
    outputs = [run.model.eval()(X) for run in (lasting, usual)]
    assert torch.equal(*outputs)
    for run, output in zip((lasting, usual), outputs, strict=True):
        run.optimizer.zero_grad()
        output.square().mean().backward()
        run.optimizer.step()
        run.model.train()
        write(run.model)
        run.step(2)
    assert_same(lasting.tensors(), usual.tensors())


def test_a_diverged_model_is_not_taken_for_a_written_one() -> None:
    run = Run(lasts=True)
    with torch.no_grad():
        parts(run.model)[1][0, 0, 0] = torch.nan
    run.loss(0).backward()
    assert parts(run.model)[1].grad.isnan().any()
