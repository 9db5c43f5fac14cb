"""Directions that are put back in a run: by the Lightning callback and in a Trainer."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

import wn_surgery as wn
from tests.callbacks.lightning_tools import (
    QUIET,
    RULES,
    Module,
    assert_same_optimizer,
    assert_same_state,
    layers,
    loader,
    trainer,
)
from tests.callbacks.test_transformers import RULES as LLAMA_RULES
from tests.callbacks.test_transformers import trainer as hf_trainer
from tests.makers import llama
from wn_surgery.callbacks.lightning import WeightNorm, WeightNormMixin
from wn_surgery.callbacks.transformers import WeightNormCallback
from wn_surgery.huggingface import patch_model
from wn_surgery.model import records

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
ON = [{**RULES[0], "renormalize": "rms"}, RULES[1]]


def off(model: nn.Module) -> float:
    """How far the mean squares of the slices of v are from 1."""
    vs = [site.held.v for site in wn.sites(model) if site.normed]  # type: ignore[union-attr]
    return max(float((v.double().square().mean(1) - 1).abs().max().detach()) for v in vs)


class Watching(lp.Callback):
    """Notes after each batch whether v was put back."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(off(pl_module) < 1e-6)


def fit(folder: Path, callback: WeightNorm, module: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    watching = Watching()
    extra = options.pop("callbacks", [])
    path = options.pop("ckpt_path", None)
    made = trainer(callback, *extra, watching, default_root_dir=folder, **options)
    module = module or Module()
    made.fit(module, loader(), loader(4), ckpt_path=path)
    return module, made, watching.seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.1},
        {"callbacks": [lp.callbacks.EMAWeightAveraging(decay=0.9)]},
    ],
)
def test_every_step_of_a_run(tmp_path: Path, options: dict[str, Any]) -> None:
    options = copy.deepcopy(options)
    module, made, seen = fit(tmp_path, WeightNorm(ON), **options)
    assert seen == [True] * 8
    assert not made.optimizers[0]._optimizer_step_post_hooks
    assert [site["renormalize"] for site in records.record(module)] == ["rms", "rms"]


@pytest.mark.parametrize("every", [None, 3])
def test_a_run_without_it_and_a_run_with_now_and_then(tmp_path: Path, every: int | None) -> None:
    rules = RULES if every is None else ON
    _, _, seen = fit(tmp_path, WeightNorm(rules, renormalize_every_n_steps=every))
    expected = [every is not None and step % 3 == 0 for step in range(1, 9)]
    assert seen == expected


def test_an_argument_is_enough_and_the_rules_say_it_then() -> None:
    callback = WeightNorm(RULES, renormalize_every_n_steps=2)
    assert [rule.renormalize for rule in callback.rules] == [1.0, None]
    assert WeightNorm(ON, renormalize_every_n_steps=2).rules == WeightNorm(ON).rules
    assert WeightNorm("edm2").renormalize_every_n_steps == 1
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"renormalize_every_n_steps={wrong}; expected"):
            WeightNorm(ON, renormalize_every_n_steps=wrong)
        with pytest.raises(ValueError, match=f"renormalize_every_n_steps={wrong}; expected"):
            WeightNormCallback(renormalize_every_n_steps=wrong)
    again = pickle.loads(pickle.dumps(callback))
    assert again.renormalize_every_n_steps == 2


def test_what_is_trained_is_what_a_loop_trains(tmp_path: Path) -> None:
    module, _, _ = fit(tmp_path, WeightNorm(ON, fused="off"))
    torch.manual_seed(0)
    twin = Module()
    wn.apply(twin, ON)
    wn.renormalize(twin)
    found = twin.configure_optimizers()
    for _ in range(2):
        for batch in loader():
            found["optimizer"].zero_grad()
            twin.loss(batch).backward()
            found["optimizer"].step()
            wn.renormalize(twin)
        found["lr_scheduler"].step()
    assert_same_state(module.state_dict(), twin.state_dict())


@pytest.mark.parametrize("every", [1, 3])
def test_resuming_is_bit_exact(tmp_path: Path, every: int) -> None:
    def callbacks() -> Any:
        saving = lp.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
        return {"callbacks": [saving], "enable_checkpointing": True, "epochs": 3}

    def callback() -> WeightNorm:
        return WeightNorm(ON, renormalize_every_n_steps=every)

    whole, made, seen = fit(tmp_path, callback(), **callbacks())
    path = str(tmp_path / "step=8.ckpt")
    part, again, later = fit(tmp_path, callback(), ckpt_path=path, **callbacks())
    assert later == seen[8:]
    assert_same_state(whole.state_dict(), part.state_dict())
    assert_same_optimizer(made.optimizers[0], again.optimizers[0])


def test_a_checkpoint_says_it(tmp_path: Path) -> None:
    class Mixed(WeightNormMixin, Module):
        pass

    module, made, _ = fit(tmp_path, WeightNorm(ON), Mixed())
    made.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Mixed.load_from_checkpoint(tmp_path / "last.ckpt")
    assert records.record(loaded) == records.record(module)
    assert len(wn.renormalize(loaded)) == 2
    # It computes the same without: a run may stop, or begin, to put v back.
    plain, _, _ = fit(tmp_path, WeightNorm(RULES), ckpt_path=tmp_path / "last.ckpt", epochs=3)
    assert "renormalize" not in records.record(plain)[0]


class Gan(lp.LightningModule):
    """Two optimizers by hand: the second steps twice in a batch, the first in every other one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = layers(), layers()
        self.log_of: list[list[str]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        turns = [(self.one, optimizers[0], batch_idx % 2), (self.two, optimizers[1], 2)]
        for net, optimizer, count in turns:
            for _ in range(count):
                before = {name: p.detach().clone() for name, p in self.named_parameters()}
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]).square().mean())
                optimizer.step()
                moved = {
                    n.split(".")[0] for n, p in self.named_parameters() if not p.equal(before[n])
                }
                self.log_of.append(sorted(moved))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Nothing to see."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.one, self.two)]


def test_each_of_several_optimizers_puts_back_its_own(tmp_path: Path) -> None:
    module, _, seen = fit(tmp_path, WeightNorm(ON), Gan())
    assert seen == [True] * 8
    assert sorted({tuple(moved) for moved in module.log_of}) == [("one",), ("two",)]


def test_a_model_that_is_split_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from wn_surgery.callbacks.lightning import neighbours

    monkeypatch.setattr(neighbours, "shards", lambda trainer: True)
    with pytest.raises(wn.CallbackError, match="a rule says renormalize, which needs whole slices"):
        fit(tmp_path, WeightNorm(ON))


# The Trainer of transformers ----------------------------------------------------------------

ATTENTION = [{**LLAMA_RULES[0], "renormalize": "rms"}]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_a_trainer_resumes_bit_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, **options}
    every = 3 if not options else None

    def made(name: str) -> Any:
        callback = WeightNormCallback(ATTENTION, renormalize_every_n_steps=every)
        return hf_trainer(tmp_path / name, callback, **saving)

    whole, resumed = made("whole"), made("parts")
    whole.train()
    assert (off(whole.model) < 1e-6) == (every is None)  # 8 steps; the last was not the third
    assert not getattr(whole.optimizer, "optimizer", whole.optimizer)._optimizer_step_post_hooks
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_state(whole.model.state_dict(), resumed.model.state_dict())
    loaded = type(whole.model).from_pretrained(tmp_path / "whole" / "checkpoint-8")
    assert records.record(loaded) == records.record(whole.model)
    assert len(wn.renormalize(loaded)) == 8


def test_a_trainer_with_the_usual_rules(tmp_path: Path) -> None:
    callback = WeightNormCallback(renormalize_every_n_steps=1)
    made = hf_trainer(tmp_path, callback, max_steps=2)
    assert {site["renormalize"] for site in records.record(made.model)} == {1.0}
    noted = made.model.config.quantization_config
    assert {rule.renormalize for rule in noted.rules} == {1.0}
    made.train()
    vs = [site.held.v for site in wn.sites(made.model) if site.normed]
    for v in vs:
        torch.testing.assert_close(v.detach().norm(dim=1), torch.ones(len(v)))


def test_a_patched_model_that_does_not_say_it(tmp_path: Path) -> None:
    model = llama()
    patch_model(model, LLAMA_RULES)
    made = hf_trainer(tmp_path, WeightNormCallback(renormalize_every_n_steps=2), model=model)
    with pytest.raises(wn.CallbackError, match=r"renormalize_every_n_steps=2, and no weight norm"):
        made.train()
    assert math.isfinite(off(model))


class Clipping(Module):
    """A module that clips as docs/recipes.md says."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[tuple[float, float]] = []

    @override
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        before = wn.clip_gradients(self, 1e-3, optimizers=optimizer)
        after = wn.clip_gradients(self, math.inf, optimizers=optimizer)
        self.norms.append((float(before), float(after)))


def test_a_module_clips_by_direction(tmp_path: Path) -> None:
    module, _, _ = fit(tmp_path, WeightNorm(RULES), Clipping(), max_epochs=1)
    assert len(module.norms) == 4
    for before, after in module.norms:
        assert before > 1e-3 and after == pytest.approx(1e-3, rel=1e-4)
