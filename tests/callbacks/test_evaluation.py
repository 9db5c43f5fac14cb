"""The Lightning callback while a Trainer validates, tests and predicts."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import nn

import wn_surgery as wn
from tests.callbacks.lightning_tools import (
    QUIET,
    RULES,
    Late,
    Module,
    assert_same_optimizer,
    assert_same_state,
    loader,
    trainer,
)
from wn_surgery.callbacks.lightning import WeightNorm

pytestmark = QUIET


class Watched(Module):
    """Says in each evaluation step whether the weights are plain, and what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.folded: list[bool] = []
        self.weights: list[torch.Tensor] = []

    def note(self) -> None:
        first = self.model[0]  # type: ignore[index]
        self.folded.append(first.weight is first.weight)
        self.weights.append(first.weight.detach().clone())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note()
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note()
        super().test_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        self.note()
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_weights_are_plain_in_every_stage(stage: str, inference_mode: bool) -> None:
    module = Watched()
    made = trainer(WeightNorm(RULES), inference_mode=inference_mode)
    getattr(made, stage)(module, [loader(), loader()])
    assert module.folded == [True] * 8
    assert module.model[0].weight is not module.model[0].weight
    assert not module.model[0].weight.is_inference()
    made.fit(module, loader())  # what evaluation computed does not stand in the way


def test_a_weight_is_computed_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from wn_surgery.norm import parametrization

    counted = []
    original = parametrization.weight_norm

    def count(*args: Any) -> torch.Tensor:
        counted.append(1)
        return original(*args)

    module = Module()
    made = trainer(WeightNorm(RULES))
    made.validate(module, loader(4), verbose=False)
    monkeypatch.setattr(parametrization, "weight_norm", count)
    made.validate(module, loader(64), verbose=False)
    assert len(counted) == 2


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("kind", [Watched, Late])
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
def test_training_goes_on_bit_exactly(averaging: bool, kind: Any) -> None:
    results = []
    for fold in (True, False):
        module = kind()
        callbacks: list[Any] = [WeightNorm(RULES, fold_on_eval=fold)]
        if averaging:
            callbacks.append(lp.callbacks.EMAWeightAveraging(decay=0.9))
        made = trainer(*callbacks, val_check_interval=2, num_sanity_val_steps=1)
        made.fit(module, loader(), loader())
        results.append((module, made.optimizers[0], made.callback_metrics["val_loss"]))
    (folded, optimizer, loss), (live, other, other_loss) = results
    assert_same_state(folded.state_dict(), live.state_dict())
    assert_same_optimizer(optimizer, other)
    assert torch.equal(loss, other_loss)
    if kind is Watched:
        assert set(folded.folded) == {True}
        assert len(folded.weights) == len(live.weights)
        for weight, expected in zip(folded.weights, live.weights, strict=True):
            assert torch.equal(weight, expected)


def test_the_average_is_what_is_validated() -> None:
    module = Watched()
    average = lp.callbacks.EMAWeightAveraging(decay=0.9)
    trainer(WeightNorm(RULES), average, epochs=3).fit(module, loader(), loader())
    last = module.weights[-1]
    # At the end of training the average is copied into the module.
    assert torch.equal(last, module.model[0].weight)


def test_an_evaluation_that_fails_leaves_nothing_folded() -> None:
    class Fails(Watched):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            raise RuntimeError("no such thing")

    module = Fails()
    with pytest.raises(RuntimeError, match="no such thing"):
        trainer(WeightNorm(RULES)).fit(module, loader(), loader())
    assert module.folded == [True]
    wn.remove(module)  # which is refused inside folded()


def test_gradients_with_respect_to_inputs_work_in_evaluation() -> None:
    class Penalty(Module):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.model(x).sum(), x)
            self.log("penalty", gradient.square().mean())

    penalties = []
    for fold in (True, False):
        made = trainer(WeightNorm(RULES, fold_on_eval=fold))
        penalties.append(made.validate(Penalty(), loader(), verbose=False)[0]["penalty"])
    assert penalties[0] == penalties[1] > 0


def test_a_checkpoint_written_during_validation_holds_g_and_v(tmp_path: Any) -> None:
    class Saves(Module):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    module = Saves()
    trainer(WeightNorm(RULES)).validate(module, loader(), verbose=False)
    state = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == module.state_dict().keys()


def test_models_without_weight_norm_are_evaluated_as_ever() -> None:
    module = Watched()
    callback = WeightNorm({"types": nn.Conv3d}, on_unmatched="ignore")
    trainer(callback).validate(module, loader(), verbose=False)
    assert len(module.folded) == 4
