"""The Lightning callback beside Lightning's own callbacks, and what cannot stand beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

import wn_surgery as wn
from tests.callbacks.lightning_tools import (
    QUIET,
    RULES,
    G,
    Late,
    Module,
    V,
    assert_same_state,
    loader,
    trainer,
)
from wn_surgery.callbacks.lightning import WeightNorm

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*swa_lrs|.*SWA")]


@pytest.mark.parametrize("kind", [Module, Late])
@pytest.mark.parametrize(
    "make",
    [
        WeightAveraging,
        EMAWeightAveraging,
        lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
    ],
    ids=["average", "ema", "swa"],
)
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
def test_a_callback_that_copies_the_model_has_to_come_after(kind: Any, make: Any) -> None:
    if kind is Late and make is not WeightAveraging:
        pytest.skip("once is enough")
    with pytest.raises(wn.CallbackError, match=r"put WeightNorm first: callbacks=\[WeightNorm"):
        trainer(make(), WeightNorm(RULES)).fit(kind(), loader())
    module = kind()
    trainer(WeightNorm(RULES), make(), epochs=3).fit(module, loader())
    assert sum(site.normed for site in wn.sites(module)) == 2


@pytest.mark.parametrize("fold", [True, False])
def test_averages_are_those_of_g_and_v(tmp_path: Path, fold: bool) -> None:
    """The averaged model after training is the average, as if computed by hand."""
    seen: list[dict[str, torch.Tensor]] = []

    class Keep(lp.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            seen.append({key: value.clone() for key, value in module.state_dict().items()})

    module = Module()
    callbacks = [WeightNorm(RULES, fold_on_eval=fold), Keep(), EMAWeightAveraging(decay=0.5)]
    trainer(*callbacks).fit(module, loader(), loader())
    average = seen[0]
    for state in seen[1:]:
        average = {key: 0.5 * average[key] + 0.5 * state[key] for key in state}
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, average[key])


def test_stochastic_weight_averaging_trains(tmp_path: Path) -> None:
    module = Module()
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    trainer(WeightNorm(RULES), averaging, epochs=4).fit(module, loader())
    assert averaging._average_model is not None
    assert sum(site.normed for site in wn.sites(averaging._average_model)) == 2
    assert torch.equal(averaging._average_model.model[0].weight, module.model[0].weight)


class Freeze(BaseFinetuning):
    """The body stands still in the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model[:3])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[:3], optimizer)


@pytest.mark.parametrize("first", ["finetuning", "weight norm"])
def test_finetuning_freezes_and_unfreezes_g_and_v(tmp_path: Path, first: str) -> None:
    class HeadFirst(Module):
        def configure_optimizers(self) -> Any:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trainable, lr=1e-2)

    def fit(epochs: int, resume: str | None = None) -> tuple[Any, Any, str]:
        module, finetuning = HeadFirst(), Freeze()
        own = [finetuning, WeightNorm(RULES)]
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callbacks = own if first == "finetuning" else own[::-1]
        made = trainer(*callbacks, saver, epochs=epochs, enable_checkpointing=True)
        made.fit(module, loader(), ckpt_path=resume)
        return module, made.optimizers[0], str(tmp_path / f"epoch={epochs - 1}.ckpt")

    start = Module()
    wn.apply(start, RULES)
    frozen, optimizer, path = fit(1)
    parts = [f"model.{i}.{end}" for i in (0, 2) for end in (G, V)]
    for name in parts:
        assert torch.equal(frozen.state_dict()[name], start.state_dict()[name])
    assert len(optimizer.param_groups) == 1
    whole, optimizer, _ = fit(3)
    assert len(optimizer.param_groups) == 2
    held = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert held == {id(p) for p in whole.model[:3].parameters()}
    for name in parts:
        assert not torch.equal(whole.state_dict()[name], start.state_dict()[name])
    resumed, _, _ = fit(3, path)
    assert_same_state(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("package", [lp, pytorch_lightning], ids=["lp", "pl"])
def test_pruning_is_refused(package: Any) -> None:
    from tests.callbacks.lightning_tools import OldModule

    module = Module() if package is lp else OldModule()
    kind = ModelPruning if package is lp else pytorch_lightning.callbacks.ModelPruning
    with pytest.raises(wn.CallbackError, match=r"ModelPruning prunes parameters.*after training"):
        trainer(WeightNorm(RULES), kind("l1_unstructured"), package=package).fit(module, loader())
    assert not any(site.normed for site in wn.sites(module))


def test_a_second_callback_is_refused() -> None:
    module = Module()
    with pytest.raises(wn.CallbackError, match="2 WeightNorm callbacks; give one of them all"):
        trainer(WeightNorm(RULES), WeightNorm("linears")).fit(module, loader())
    assert not any(site.normed for site in wn.sites(module))


def test_the_usual_company(tmp_path: Path) -> None:
    callbacks = [
        RichProgressBar(),
        EarlyStopping("val_loss", patience=1, min_delta=10.0),
        LearningRateMonitor("step"),
        WeightNorm(RULES, log_every_n_steps=1),
        ModelCheckpoint(tmp_path, "best", monitor="val_loss"),
    ]
    made = trainer(
        *callbacks,
        epochs=5,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path),
        enable_progress_bar=True,
    )
    module = Module()
    made.fit(module, loader(), loader())
    assert made.current_epoch == 2  # stopped early
    table = (Path(made.logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr-AdamW", "weight_norm/g_mean", "val_loss"} <= set(table)
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    made.test(module, loader(), ckpt_path="best", verbose=False)
    assert trained.keys() == module.state_dict().keys()


def test_parameter_groups_and_their_names_in_the_monitor(tmp_path: Path) -> None:
    class Grouped(Module):
        def configure_optimizers(self) -> Any:
            self.groups = wn.parameter_groups(self, weight_decay=0.1)
            return torch.optim.AdamW(self.groups, lr=1e-2)

    module, logger = Grouped(), CSVLogger(tmp_path)
    trainer(WeightNorm(RULES), LearningRateMonitor("step"), logger=logger).fit(module, loader())
    logger.save()
    assert f"model.0.{G}" in module.groups.exempt
    assert module.groups.decayed == (f"model.0.{V}", f"model.2.{V}", "model.head.weight")
    table = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "lr-AdamW/decay" in table and "lr-AdamW/no_decay" in table


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train(precision: str) -> None:
    losses = []

    class Noting(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step([part.to(self.dtype) for part in batch], batch_idx)
            losses.append(float(loss.detach()))
            return loss

    module = Noting()
    made = trainer(WeightNorm(RULES), precision=precision, epochs=10)
    made.fit(module, loader(), loader())
    assert losses[-1] < losses[0]
    g = module.state_dict()[f"model.0.{G}"]
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert g.dtype == expected.get(precision, torch.float32)


def test_the_learning_rate_finder_leaves_everything_as_it_was(tmp_path: Path) -> None:
    class Tunable(Module):
        lr = 1e-3

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Tunable()
    callback = WeightNorm(RULES, init_from_batch=True, save_layout="plain")
    made = trainer(callback, default_root_dir=tmp_path, epochs=1)
    found = lp.tuner.Tuner(made).lr_find(module, loader(), num_training=5, update_attr=False)
    assert found is not None
    expected = Tunable()
    wn.apply(expected, RULES)
    assert_same_state(expected.state_dict(), module.state_dict())
    assert not callback.initialized  # only the finder's run was
    made.fit(module, loader())
    assert callback.initialized
