"""Weights that last until the next optimizer step: ``fuse(model, optimizers=optimizer)``."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wn_surgery as wn
from tests.fused.models import RULES, Net, X, normed
from tests.fused.stepping import OPTIMIZERS, STEPS, Optimizer, Run, adamw, assert_same, parts
from wn_surgery.fused import is_fused
from wn_surgery.model.sites import normed as sites_of

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
