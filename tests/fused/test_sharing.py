"""What a value of a fused model may be shared between, and attempts to read one that is stale.

The three sentences of docs/fused.md, each attacked. Every test does the same to a fused model and
to one that is not.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.checkpoint import checkpoint

import wn_surgery as wn
from tests.fused.models import Net, X, assert_same, fused, nodes, normed
from wn_surgery.fused import shared

pytestmark = pytest.mark.usefixtures("both_paths")


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.processes
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


@pytest.mark.processes
def test_a_thread_that_steps_aside_leaves_the_others_forward_alone() -> None:
    model = fused()
    inside, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert leave.wait(300)

    model.up.register_forward_pre_hook(wait)
    outs: list[Tensor] = []
    thread = threading.Thread(target=lambda: outs.append(model(X)))
    thread.start()
    assert inside.wait(300)
    here = model(X)
    leave.set()
    thread.join()
    assert torch.equal(here, outs[0]) and torch.equal(here, normed()(X))


def test_replicas_take_the_plain_path() -> None:
    model = fused()
    model(X)
    replica = model._replicate_for_data_parallel()
    replicated = model.front.parametrizations.weight._replicate_for_data_parallel()  # type: ignore[union-attr,operator]
    assert model.front.parametrizations.weight.slot is not None and replicated.slot is None  # type: ignore[union-attr]
    assert torch.equal(replica(X), model(X))  # its hooks leave the model's scope alone
    assert len(nodes(model)) == 1


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


def both(*, made: Callable[[], nn.Module] = normed) -> list[Any]:
    """A model as it is, and one that is fused."""
    models = [made(), made()]
    wn.fuse(models[1])
    return models


def assert_alike(results: list[Any]) -> None:
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


# A value is shared within one call of the root, in one thread ------------------------------


def test_an_interrupt_ends_the_call() -> None:
    results = []
    for model in both():

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.head.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(X)
        handle.remove()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.mul_(1.5)  # raises no version
            results.append(model.front(X))
    assert_alike(results)


def test_an_interrupt_inside_shared_ends_with_it() -> None:
    results = []
    for model in both():
        handle = model.head.register_forward_hook(lambda *_: (_ for _ in ()).throw(SystemExit()))
        scope = shared(model) if model._forward_pre_hooks else torch.enable_grad()
        with pytest.raises(SystemExit), scope:
            model(X)
        handle.remove()
        model.front.parametrizations.weight.original1.data.mul_(torch.rand(6, 2, 3).sign_())
        model.front.parametrizations.weight.original0.data.mul_(2)
        results.append(model.front(X))
    assert_alike(results)


class Late(torch.autograd.Function):
    """Computes its module again in backward, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, grad: bool) -> Tensor:
        ctx.module, ctx.grad = module, grad
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.set_grad_enabled(ctx.grad):
            y = ctx.module(x.detach())
        return grads[0] * y.detach().sum(), None, None


@pytest.mark.parametrize("grad", [False, True])
def test_weights_that_only_backwards_read(grad: bool) -> None:
    results = []
    for model in both():
        optimizer = torch.optim.SGD(model.parameters(), 0.5, fused=True)  # raises no version
        found = []
        for _ in range(3):
            x = X.clone().requires_grad_()
            Late.apply(x, model.front, grad).sum().backward()
            found.append(x.grad)
            for parameter in model.parameters():
                parameter.grad = torch.arange(parameter.numel()).view_as(parameter) % 3 - 1.0
            optimizer.step()
        results.append(found)
    assert_alike(results)


def test_a_backward_computes_a_group_once() -> None:
    model = fused()
    seen: list[Any] = []

    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(model.front.weight)
            return x * model.middle[0].weight.sum()

    x = X.clone().requires_grad_()
    y = Late.apply(Late.apply(x, Reading(), False), Reading(), False)
    y.sum().backward()
    y = Late.apply(x, Reading(), False)
    y.sum().backward()
    assert seen[0] is seen[1] and seen[2] is not seen[0]


IN_ANOTHER_PROCESS = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
for _ in range(4):
    model.register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
x = torch.ones(2, 2, 8)
optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
model(x).sum().backward()
optimizer.step()
found = model.front(x)
assert model.front.parametrizations.weight.slot is not None
import wn_surgery as wn
assert wn.unfuse(model) == 1
assert torch.equal(model.front(x), found)
print("done")
"""


@pytest.mark.processes
def test_hooks_in_the_process_that_unpickles(tmp_path: Path) -> None:
    model = fused()
    model(X)
    torch.save(model, tmp_path / "model.pt")
    run = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "model.pt")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.stdout == "done\n", run.stderr[-2000:]


# Before it is handed out, all that it depends on is compared --------------------------------


class Freezing(nn.Module):
    """Two passes through one layer, of which one is for the generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.requires_grad_(False)
        real = self.outer(self.inner(x))
        self.requires_grad_(True)
        return real.detach().sum() + self.outer(self.inner(x)).sum()


def linears(model: nn.Module) -> nn.Module:
    wn.apply(model, {"types": "Linear"})
    return model


def test_requires_grad_that_is_toggled() -> None:
    results = []
    for model in both(made=lambda: linears(Freezing())):
        model(torch.ones(2, 3)).backward()
        results.append([p.grad for p in model.parameters()])
    assert all(grad is not None for grad in results[0])
    assert_alike(results)


def test_requires_grad_that_is_toggled_between_shared_calls() -> None:
    results = []
    for model in both():
        with shared(model) if model._forward_pre_hooks else torch.enable_grad():
            model.requires_grad_(False)
            x = X.clone().requires_grad_()
            model(x).sum().backward()
            model.requires_grad_(True)
            model(X).sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    assert_alike(results)


class Tied(nn.Module):
    """An embedding that torch renormalizes in place, whose weight is read again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4, max_norm=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) @ self.embedding.weight.t()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writes_into_the_weight(mode: Callable[[], Any]) -> None:
    def made() -> nn.Module:
        model = Tied()
        wn.apply(model, {"types": "Embedding"})
        return model

    results = []
    for model in both(made=made):
        with mode():
            results.append(model(torch.arange(5)).clone())
    assert_alike(results)


def test_inference_mode_that_is_undone() -> None:
    results = []
    for model in both():
        handle = model.front.register_forward_pre_hook(look_in_inference_mode)
        model(X).sum().backward()
        handle.remove()
        results.append([p.grad for p in model.parameters()])
    assert_alike(results)


def look_in_inference_mode(module: Any, _inputs: Any) -> None:
    with torch.inference_mode(), torch.enable_grad():
        assert not module.weight.requires_grad


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda g: torch.no_grad()(g.mul_)(2),
    "other data": lambda g: setattr(g, "data", g.data * 2),
    "frozen": lambda g: g.requires_grad_(False),
}


@pytest.mark.parametrize("what", WRITES)
def test_writes_to_g_within_a_call(what: str) -> None:
    results = []
    for model in both():

        def write(module: Any, *_: Any) -> None:
            WRITES[what](module.parametrizations.weight.original0)

        model.middle[0].register_forward_hook(write)
        model.middle[2].register_forward_pre_hook(
            lambda _, inputs, model=model: (model.middle[0](inputs[0]),)
        )
        out = model(X)
        if what != "in place":
            out.sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    assert_alike(results)


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_within_a_call(backward: bool) -> None:
    results = []
    for model in both():
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)  # raises no version

        def step(module: Any, inputs: Any, optimizer: Any = optimizer, net: Any = model) -> None:
            if backward:
                net.middle(net.front(X)).square().sum().backward()
            else:
                for parameter in net.parameters():
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()

        model(X)
        handle = model.up.register_forward_pre_hook(step)
        results.append(model(X).detach())
        handle.remove()
    assert_alike(results)


@pytest.mark.parametrize("place", ["list", "parametrization"])
@pytest.mark.parametrize("when", ["before", "between", "within"])
def test_hooks_on_the_parametrization(place: str, when: str) -> None:
    results = []
    for model in [normed(), normed()]:
        plist = model.front.parametrizations.weight  # type: ignore[union-attr]
        target = plist if place == "list" else plist[0]  # type: ignore[index]

        def register(*_: Any, target: Any = target) -> None:
            target.register_forward_hook(lambda *args: args[-1] * 2)

        if when == "before":
            register()
        if results:
            wn.fuse(model)
        model(X)
        if when == "between":
            register()
        elif when == "within":
            model.middle.register_forward_pre_hook(register)
            model.head.register_forward_pre_hook(
                lambda m, inputs, net=model: (inputs[0] + net.front.weight.sum(),)
            )
        results.append(model(X))
    assert_alike(results)


# A backward is the affair of those members only that it reaches ------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)

    def forward(self, x: Tensor, skip: bool = False) -> tuple[Tensor, Tensor]:
        return self.one(x), x if skip else self.other(x)


def branches() -> nn.Module:
    return linears(Branches())


def test_a_member_that_takes_no_part_may_be_stepped() -> None:
    results = []
    for model in both(made=branches):
        first = torch.optim.SGD(model.one.parameters(), 0.1)
        second = torch.optim.SGD(model.other.parameters(), 0.1)
        one, other = model(torch.ones(2, 3))
        one.sum().backward()
        first.step()
        other.sum().backward()
        second.step()
        results.append([p.detach() for p in model.parameters()])
    assert_alike(results)


def test_a_member_that_takes_part_may_not() -> None:
    for model in both(made=branches):
        one, _ = model(torch.ones(2, 3))
        with torch.no_grad():
            model.one.parametrizations.weight.original1.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            one.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_optimizer_in_backward_beside_checkpoints(reentrant: bool) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        for layer in (model.one, model.other):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x.sum()

    results = []
    for model in both(made=branches):
        model.forward = lambda x, model=model: forward(model, x)

        def step(parameter: Tensor, optimizers: Any) -> None:
            optimizers[parameter].step()
            parameter.grad = None

        optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(lambda p, o=optimizers: step(p, o))
        for _ in range(2):
            model(torch.ones(2, 3, requires_grad=True)).backward()
        results.append([p.detach() for p in model.parameters()])
    assert_alike(results)


@pytest.mark.parametrize("when", ["before fuse", "after a forward"])
def test_hooks_of_members_that_the_forward_skips(when: str) -> None:
    model: Any = branches()
    called: list[str] = []

    def register() -> None:
        for name, parameter in model.named_parameters():
            parameter.register_hook(
                lambda grad, name=name: (called.append(name), grad.clamp(-1, 1))[1]
            )
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: called.append(f"{name} {p.grad is not None}")
            )

    if when == "before fuse":
        register()
    wn.fuse(model)
    if when == "after a forward":
        model(torch.ones(2, 3))[0].sum().backward()
        register()
    for _ in range(2):
        called.clear()
        model(torch.ones(2, 3), skip=True)[0].sum().backward()
        assert len(called) == 6 and all(name.startswith("one.") for name in called)
        assert not any("False" in name for name in called)


# And nothing else -----------------------------------------------------------------------------


CHANGES: dict[str, Callable[[Net], object]] = {
    "cast": lambda model: model.double(),
    "fused": wn.fuse,
    "unfused": wn.unfuse,
    "fused anew": lambda model: (wn.fuse(model), model(X.to(model.head.bias.dtype))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("start", [fused, normed])
def test_changes_between_a_checkpointed_forward_and_its_backward(
    change: str, start: Callable[[str], Net]
) -> None:
    results = []
    for model in (normed("non-reentrant"), start("non-reentrant")):
        model.double()
        out = model(X.double()).sum()
        if results:
            CHANGES[change](model)
        with torch.no_grad():
            model(X.double())
        out.backward()
        results.append([p.grad for p in model.parameters()])
    assert_alike(results)


class CopiedByHand(nn.Linear):
    """With the usual ``__deepcopy__``, as in torch's own tests."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedByHand:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new


def test_a_class_that_copies_its_attributes_itself() -> None:
    model = nn.Sequential(CopiedByHand(3, 3))
    linears(model)
    wn.fuse(model)
    x = torch.ones(1, 3)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and twin[0].parametrizations.weight.slot is not None  # type: ignore[union-attr]
    assert torch.equal(wn.export.stripped_copy(model)(x), model(x))
    assert torch.equal(torch.optim.swa_utils.AveragedModel(model)(x), model(x))


def test_torchs_removal_from_a_fused_module() -> None:
    for model in both():
        remove_parametrizations(model.front, "weight")
        assert type(model.front) is nn.Conv1d and "weight" in model.front._parameters
        assert torch.equal(model(X), normed()(X))
