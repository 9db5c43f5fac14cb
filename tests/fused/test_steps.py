"""Weights that last until the next optimizer step: ``fuse(model, optimizers=optimizer)``."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wn_surgery as wn
from tests.fused.models import RULES, Net, X, normed
from wn_surgery.fused import evaluator, is_fused
from wn_surgery.model.sites import normed as sites_of

STEPS = 20
Optimizer = torch.optim.Optimizer


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": adamw,
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    # It writes without raising versions.
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


class Run:
    """A training, with weights that last or as usual; everything else is the same."""

    def __init__(
        self,
        lasts: bool,
        make: Callable[[Any], Optimizer] = adamw,
        model: Net | None = None,
    ) -> None:
        self.model = normed() if model is None else model
        self.optimizer = make(self.model.parameters())
        if lasts:
            wn.fuse(self.model, optimizers=self.optimizer)

    def loss(self, step: int, micro: int = 0) -> Tensor:
        chance = torch.Generator().manual_seed(100 * step + micro)
        out: Tensor = self.model(torch.randn(X.shape, generator=chance))
        return out.square().mean()

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        kept = [t for each in state.values() for t in each.values() if isinstance(t, Tensor)]
        return [p.detach() for p in self.model.parameters()] + kept


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def parts(model: nn.Module, place: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    held = sites_of(model)[place].held
    return held.g, held.v


# What a user's loop may do in 20 steps ----------------------------------------------------------


def plain(run: Run) -> None:
    for i in range(STEPS):
        run.step(i)


def clipped(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        run.loss(i).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2)
        run.optimizer.step()


def scaled(run: Run) -> None:
    # So that the scaler skips steps, on its way down from infinity.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-10)
    for i in range(STEPS):
        run.optimizer.zero_grad()
        scaler.scale(1e4 * run.loss(i)).backward()
        scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2)
        scaler.step(run.optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**126


def accumulated(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        for micro in range(3):
            run.loss(i, micro).backward()
        run.optimizer.step()


def averaged(run: Run) -> None:
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    seen = []
    for i in range(STEPS):
        run.step(i)
        average.update_parameters(run.model)
        run.loss(i)  # weights have been computed
        mine = [p.detach().clone() for p in run.model.parameters()]
        # Uncounted, as weight averaging does.
        for p, q in zip(run.model.parameters(), average.module.parameters(), strict=True):
            p.data.copy_(q.data)
        with torch.no_grad():
            assert torch.equal(run.model(X), average.module(X))
        run.model.eval()
        assert torch.equal(run.model(X), average.module(X))
        run.model.train()
        for p, q in zip(run.model.parameters(), mine, strict=True):
            p.data.copy_(q)
        seen.append(run.loss(i).item())
    assert len(set(seen)) == STEPS


def scheduled(run: Run) -> None:
    schedule = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 5e-2, total_steps=STEPS + 1)
    for i in range(STEPS):
        run.step(i)
        schedule.step()


def resumed(run: Run) -> None:
    for i in range(STEPS):
        if i == STEPS // 2:
            run.loss(i)  # of other weights than those that come
            model, optimizer = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
            run.step(1000)
            run.loss(i)
            run.model.load_state_dict(model)
            run.optimizer.load_state_dict(optimizer)
        run.step(i)


def frozen_g(run: Run) -> None:
    for site in sites_of(run.model):
        site.held.g.requires_grad_(False)
    for i in range(STEPS):
        run.step(i)
    parts(run.model)[0].requires_grad_(True)
    run.step(STEPS)


def frozen_v(run: Run) -> None:
    for i in range(STEPS):
        run.loss(i)
        parts(run.model, i % 5)[1].requires_grad_(i % 2 == 0)
        run.step(i)


def renormalized(run: Run) -> None:
    run.optimizer.register_step_post_hook(lambda *_: wn.renormalize(run.model, norm=2.0))
    for i in range(STEPS):
        run.step(i)


def clamped(run: Run) -> None:
    for i in range(STEPS):
        run.step(i)
        for p in run.model.parameters():  # as a Wasserstein GAN does
            p.data.clamp_(-0.3, 0.3)


def with_closure(run: Run) -> None:
    steps = iter(range(STEPS))

    def closure() -> float:
        run.optimizer.zero_grad()
        loss = run.loss(next(steps))
        loss.backward()
        return loss.item()

    for _ in range(STEPS):
        run.optimizer.step(closure)


LOOPS = [plain, clipped, scaled, accumulated, averaged, scheduled, resumed, frozen_g, frozen_v,
         renormalized, clamped, with_closure]  # fmt: skip


@pytest.mark.parametrize(
    ("loop", "optimizer"),
    [(loop, name) for loop in LOOPS for name in ("adamw, fused", "sgd")]
    + [(accumulated, "adamw"), (accumulated, "adamw, foreach")],
)
def test_the_same_bits(loop: Callable[[Run], None], optimizer: str) -> None:
    lasting, usual = (Run(lasts, OPTIMIZERS[optimizer]) for lasts in (True, False))
    before = [p.detach().clone() for p in usual.model.parameters()]
    loop(lasting)
    loop(usual)
    assert_same(lasting.tensors(), usual.tensors())
    assert lasting.optimizer.state_dict().keys() == usual.optimizer.state_dict().keys()
    moved = zip(before, usual.model.parameters(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in moved) > len(before) // 2


@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
def test_checkpointing(recompute: str) -> None:
    lasting, usual = (Run(lasts, model=normed(recompute)) for lasts in (True, False))
    for run in (lasting, usual):
        accumulated(run)
    assert_same(lasting.tensors(), usual.tensors())


def test_lbfgs_moves_the_weights_within_a_step() -> None:
    runs = [Run(lasts, lambda p: torch.optim.LBFGS(p, max_iter=5)) for lasts in (True, False)]
    for run in runs:

        def closure(run: Run = run) -> Tensor:
            run.optimizer.zero_grad()
            loss = run.loss(0)
            loss.backward()
            return loss

        run.optimizer.step(closure)
    assert_same(*([p.detach() for p in run.model.parameters()] for run in runs))


def test_norm_dtype_and_ties() -> None:
    def made() -> Net:
        model = Net()
        model.middle[2].weight = model.middle[0].weight
        rules = [
            {"types": "Conv1d", "norm_dtype": "float64", "tied": "together"},
            {"types": "Linear", "eps": 1e-3},
            RULES[1],
        ]
        wn.apply(model, rules)
        return model

    lasting, usual = (Run(lasts, model=made()) for lasts in (True, False))
    for run in (lasting, usual):
        accumulated(run)
    for one, other in zip(lasting.tensors(), usual.tensors(), strict=True):
        torch.testing.assert_close(one, other)
    model = lasting.model
    lists = [layer.parametrizations.weight for layer in (model.middle[0], model.middle[2])]
    assert lists[0].original1 is lists[1].original1


# How long a weight lasts ------------------------------------------------------------------------


def test_one_computation_a_step() -> None:
    run = Run(lasts=True)
    first = run.model.front.weight
    run.loss(0).backward()
    run.loss(1).backward()
    assert run.model.front.weight is first  # also outside of a call
    run.optimizer.step()
    assert run.model.front.weight is not first


def test_a_step_of_another_models_optimizer_changes_nothing() -> None:
    one, other = Run(lasts=True), Run(lasts=True, make=OPTIMIZERS["adamw, fused"])
    mine, others = one.model.front.weight, other.model.front.weight
    other.step(0)
    assert one.model.front.weight is mine
    assert other.model.front.weight is not others


def test_an_optimizer_that_was_not_given_is_seen() -> None:
    run = Run(lasts=True)
    stray = torch.optim.AdamW(run.model.front.parameters(), lr=0.1, fused=True)
    run.loss(0).backward()
    stray.step()
    assert torch.equal(run.model.front.weight, copy.deepcopy(run.model).front.weight)


def test_two_optimizers() -> None:
    def make(model: Net) -> tuple[Optimizer, Optimizer]:
        groups = wn.parameter_groups(model, weight_decay=0.1)
        return torch.optim.SGD(groups[0]["params"], lr=0.1), adamw(groups[1]["params"])

    lasting, usual = normed(), normed()
    both = make(lasting)
    wn.fuse(lasting, optimizers=both)
    for model, optimizers in ((lasting, both), (usual, make(usual))):
        for _ in range(5):
            for optimizer in optimizers:
                model.zero_grad()
                model(X).square().mean().backward()
                optimizer.step()
    assert_same(
        [p.detach() for p in lasting.parameters()], [p.detach() for p in usual.parameters()]
    )


def test_memory_is_freed_by_the_step_and_with_the_model() -> None:
    run = Run(lasts=True)
    weight = weakref.ref(run.model.front.weight)
    gc.collect()
    gc.disable()
    try:
        run.step(0)
        assert weight() is None
        run.loss(1)
        model, optimizer = weakref.ref(run.model), weakref.ref(run.optimizer)
        weight = weakref.ref(run.model.front.weight)
        del run
        assert (model(), optimizer(), weight()) == (None, None, None)
    finally:
        gc.enable()


def test_unfuse_ends_it() -> None:
    run = Run(lasts=True)
    run.loss(0)
    weight = weakref.ref(run.model.front.weight)
    wn.unfuse(run.model)
    gc.collect()
    assert weight() is None
    assert run.model.front.weight is not run.model.front.weight


# What else a gradient may be asked for ----------------------------------------------------------


def both_losses() -> tuple[tuple[Run, Tensor], tuple[Run, Tensor]]:
    found = []
    for lasts in (True, False):
        run = Run(lasts)
        run.loss(0)
        found.append((run, run.loss(1)))
    return found[0], found[1]


def test_gradients_by_name_and_of_second_order() -> None:
    answers = []
    for run, loss in both_losses():
        pair = parts(run.model)
        first = torch.autograd.grad(loss, pair, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), pair)
        run.loss(2).backward(inputs=[pair[1]])
        assert pair[0].grad is None
        answers.append([*(t.detach() for t in first), *second, pair[1].grad])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)
        assert one.count_nonzero()


def test_a_hook_on_v() -> None:
    for run, loss in both_losses():
        seen: list[Tensor] = []
        v = parts(run.model, 2)[1]
        v.register_hook(seen.append)
        loss.backward()
        assert len(seen) == 1
        assert torch.equal(seen[0], v.grad)


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


# Copies, and what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_no_optimizer(copied: Callable[[Net], Net]) -> None:
    run = Run(lasts=True)
    run.loss(0)
    twin = copied(run.model)
    assert is_fused(twin)
    run.step(0)
    assert twin(X).grad_fn is not None
    assert twin.front.weight is not twin.front.weight
    for p in twin.parameters():
        p.data.mul_(2.0)
    reference = normed()
    reference.load_state_dict(twin.state_dict())
    assert torch.equal(twin(X), reference(X))


def test_what_the_optimizers_lack() -> None:
    model = normed()
    some = torch.optim.SGD([p for n, p in model.named_parameters() if n != last_g(model)], lr=0.1)
    with pytest.raises(wn.ModelError, match=r"head\.weight: none of the optimizers holds its g"):
        wn.fuse(model, optimizers=some)
    assert not is_fused(model)
    parts(model, 4)[0].requires_grad_(False)
    wn.fuse(model, optimizers=some)
    assert is_fused(model)


def last_g(model: Net) -> str:
    return next(n for n, p in model.named_parameters() if p is parts(model, 4)[0])


class Homemade:
    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters())}]


def test_an_optimizer_that_is_not_torchs() -> None:
    model = normed()
    with pytest.raises(wn.ModelError, match="nothing tells when it steps"):
        wn.fuse(model, optimizers=Homemade(model))
    with pytest.raises(TypeError, match="optimizers"):
        wn.fuse(model, optimizers=3)  # type: ignore[arg-type]
    assert not is_fused(model)
