"""What the Lightning callback does at the first batch, on the way, and at the end."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as fabric_package
import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import wn_surgery as wn
from tests.callbacks.lightning_tools import (
    QUIET,
    RULES,
    Late,
    Module,
    assert_same_state,
    loader,
    normed,
    trainer,
)
from wn_surgery.callbacks.lightning import WeightNorm
from wn_surgery.fused import is_fused

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*is a deprecated:DeprecationWarning"),
]


def plain(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's state dict without weight norm."""
    state = module.state_dict()
    for site in wn.sites(module):
        if site.normed:
            state[site.name] = site.module.weight.detach()  # type: ignore[operator]
    return {key: value for key, value in state.items() if "parametrizations" not in key}


# The end ------------------------------------------------------------------------------------


def test_strip_on_end_leaves_a_plain_module_and_a_true_optimizer(tmp_path: Path) -> None:
    kept, stripped = Module(), Module()
    trainer(WeightNorm(RULES)).fit(kept, loader())
    made = trainer(WeightNorm(RULES, strip_on_end=True))
    made.fit(stripped, loader())
    assert normed(stripped) == []
    assert type(stripped.model[0]) is nn.Linear
    assert stripped.state_dict().keys() == plain(kept).keys()
    for key, value in plain(kept).items():
        assert torch.equal(value, stripped.state_dict()[key])
    held = {id(p) for p in made.optimizers[0].param_groups[0]["params"]}
    assert held == {id(p) for p in stripped.parameters()}
    made.save_checkpoint(tmp_path / "after.ckpt")
    Module().load_state_dict(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"])


def test_strip_on_end_and_other_stages(tmp_path: Path) -> None:
    module = Module()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    made = trainer(WeightNorm(RULES, strip_on_end=True))
    made.test(module, loader(), verbose=False)
    assert_same_state(before, module.state_dict())
    made.fit(module, loader())
    made.fit_loop.max_epochs = 3
    made.fit(module, loader())
    assert normed(module) == []
    # A module that had weight norm before keeps it when it is only tested.
    other = Module()
    wn.apply(other, RULES)
    made.test(other, loader(), verbose=False)
    assert len(normed(other)) == 2


def test_a_run_that_fails_is_not_stripped(tmp_path: Path) -> None:
    class Fails(Module):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("no such luck")

    module = Fails()
    callback = WeightNorm(RULES, strip_on_end=True, export_to=tmp_path / "x.pt")
    with pytest.raises(RuntimeError, match="no such luck"):
        trainer(callback).fit(module, loader())
    assert len(normed(module)) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("strip", [False, True])
def test_weights_are_exported(tmp_path: Path, suffix: str, strip: bool) -> None:
    path = tmp_path / "new" / f"weights{suffix}"
    module = Module()
    trainer(WeightNorm(RULES, export_to=path, strip_on_end=strip)).fit(module, loader())
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    state = state["state_dict"] if suffix == ".ckpt" else state
    expected = plain(module)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(value, state[key])
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert len(normed(module)) == (0 if strip else 2)


class Exportable(Module):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(x)
        return out


def test_a_program_is_exported(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    module = Exportable()
    trainer(WeightNorm(RULES, export_to=path)).fit(module, loader())
    program = torch.export.load(path)
    assert "norm" not in str(program.graph)
    x = torch.randn(2, 4)
    torch.testing.assert_close(program.module()(x), module(x))
    assert len(normed(module)) == 2


class Remembering(Exportable):
    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        self.last = super().loss(batch)  # with its graph, which copy.deepcopy refuses
        return self.last


def test_a_module_that_keeps_its_loss_is_exported(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    module = Remembering()
    trainer(WeightNorm(RULES, export_to=path)).fit(module, loader())
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.export.load(path).module()(x), module(x))
    assert not module.last.is_leaf and len(normed(module)) == 2


def test_onnx_is_exported(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    path = tmp_path / "model.onnx"
    module = Exportable()
    trainer(WeightNorm(RULES, export_to=str(path))).fit(module, loader())
    assert not {node.op_type for node in onnx.load(path).graph.node} & {"Div", "ReduceL2"}
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(2, 4)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), module(x).detach(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"export_to='model\.bin'; expected .*\.safetensors"):
        WeightNorm(RULES, export_to="model.bin")
    module = Module()
    with pytest.raises(wn.CallbackError, match="example_input_array in Module"):
        trainer(WeightNorm(RULES, export_to=tmp_path / "model.onnx")).fit(module, loader())
    assert normed(module) == []


# On the way ---------------------------------------------------------------------------------


def test_statistics_are_logged(tmp_path: Path) -> None:
    module, logger = Module(), CSVLogger(tmp_path)
    callback = WeightNorm(RULES, log_every_n_steps=3)
    made = trainer(callback, logger=logger, accumulate_grad_batches=1, epochs=2)
    made.fit(module, loader())
    logger.save()
    assert callback.history.steps == [3, 6]
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    values = dict(zip(names, lines[-1].split(","), strict=True))
    assert int(values["step"]) == 5
    recorded = callback.history.records[-1]["model.0.weight"]
    assert float(values["weight_norm/model.0.weight/g"]) == pytest.approx(recorded["g"])
    assert {"weight_norm/model.2.weight/effective_lr", "weight_norm/v_norm_max"} <= set(names)


def test_statistics_are_logged_at_the_steps_of_the_losses(tmp_path: Path) -> None:
    class Logs(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    logger = CSVLogger(tmp_path)
    callbacks = [WeightNorm(RULES, log_every_n_steps=2), LearningRateMonitor("step")]
    made = trainer(*callbacks, logger=logger, log_every_n_steps=2, epochs=2)
    made.fit(Logs(), loader())
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = {
        name: [int(row["step"]) for row in rows if row[name]]
        for name in ("loss", "weight_norm/g_mean", "lr-AdamW")
    }
    assert steps == {name: [1, 3, 5, 7] for name in steps}


def test_steps_are_the_optimizers(tmp_path: Path) -> None:
    callback = WeightNorm(RULES, log_every_n_steps=1)
    trainer(callback, accumulate_grad_batches=2).fit(Module(), loader())
    assert callback.history.steps == [1, 2, 3, 4]


def test_histograms_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer(WeightNorm(RULES, log_every_n_steps=4), logger=logger).fit(Module(), loader())
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    assert "weight_norm/model.0.weight/v_norm" in tags["histograms"]
    assert [event.step for event in events.Histograms("weight_norm/model.0.weight/g")] == [3, 7]
    assert "weight_norm/g_mean" in tags["scalars"]


def test_nothing_is_recorded_unless_asked_for() -> None:
    with pytest.raises(ValueError, match="log_every_n_steps=100"):
        _ = WeightNorm(RULES).history
    with pytest.raises(ValueError, match="expected at least 1"):
        WeightNorm(RULES, log_every_n_steps=0)


# The first batch ----------------------------------------------------------------------------


class Probed(Module):
    """Keeps what the first layer gives in its first training step."""

    first: torch.Tensor | None = None

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.first is None:
            self.first = self.model[0](batch[0]).detach()  # type: ignore[index]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["automatic", "fused off"])
def test_the_first_batch_initializes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = Probed()
    fused = "off" if kind == "fused off" else "auto"
    callback = WeightNorm(RULES, init_from_batch=True, fused=fused, verbose=True)
    roots: list[bool] = []

    class Look(lp.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            roots.append(is_fused(pl_module.model))

    trainer(callback, Look()).fit(module, loader())
    assert module.first is not None
    torch.testing.assert_close(module.first.std(0, correction=0), torch.ones(8))
    torch.testing.assert_close(module.first.mean(0), torch.zeros(8), rtol=0, atol=1e-6)
    assert callback.initialization is not None
    assert str(callback.initialization) in capsys.readouterr().out
    assert sorted(callback.initialization.initialized) == ["model.0.weight", "model.2.weight"]
    # The first batch runs unfused: a fused group has read its g before the second layer's is set.
    assert roots == [False] + [fused == "auto"] * 7


def test_a_resumed_run_is_not_initialized_again(tmp_path: Path) -> None:
    def fit(epochs: int, resume: str | None = None) -> tuple[Any, Any]:
        module, callback = Module(), WeightNorm(RULES, init_from_batch=True)
        saver = lp.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        made = trainer(callback, saver, epochs=epochs, enable_checkpointing=True)
        made.fit(module, loader(), ckpt_path=resume)
        return module, callback

    whole, _ = fit(3)
    resumed, callback = fit(3, str(tmp_path / "epoch=0.ckpt"))
    assert_same_state(whole.state_dict(), resumed.state_dict())
    assert callback.initialization is None and callback.initialized
    made = trainer(callback)
    before = resumed.model[0].bias.detach().clone()
    made.validate(resumed, loader(), verbose=False)
    made.fit(resumed, loader(4))  # another run, the same callback
    assert callback.initialization is None
    assert not torch.equal(before, resumed.model[0].bias)


def test_a_first_batch_that_fails_changes_nothing() -> None:
    class Fails(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("no loss")

    module = Fails()
    expected = Module()
    wn.apply(expected, RULES)
    with pytest.raises(RuntimeError, match="no loss"):
        trainer(WeightNorm(RULES, init_from_batch=True)).fit(module, loader())
    assert_same_state(expected.state_dict(), module.state_dict())


# Fabric -------------------------------------------------------------------------------------


def test_fabric(tmp_path: Path) -> None:
    def train(patched: bool) -> nn.Module:
        callback = WeightNorm(RULES)
        fabric = fabric_package.Fabric(accelerator="cpu", devices=1, callbacks=[callback])
        model = Exportable()
        if patched:
            callback.patch(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped, optimizer = fabric.setup(model, optimizer)
        for x, y in loader():
            optimizer.zero_grad()
            loss = (wrapped(x) - y).square().mean()
            fabric.backward(loss)
            optimizer.step()
        return model

    trained = train(patched=True)
    assert normed(trained) == ["model.0.weight", "model.2.weight"]
    with pytest.raises(wn.CallbackError, match=r"callback\.patch\(model\)"):
        train(patched=False)


def test_late_layers_are_stripped_and_exported_too(tmp_path: Path) -> None:
    module = Late()
    path = tmp_path / "late.pt"
    trainer(WeightNorm(RULES, strip_on_end=True, export_to=path)).fit(module, loader())
    assert normed(module) == []
    state = torch.load(path)
    assert state.keys() == module.state_dict().keys()
    for key, value in state.items():
        assert torch.equal(value, module.state_dict()[key])


# A page -------------------------------------------------------------------------------------


def test_report_to_writes_a_page_at_the_end_of_fit(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    callback = WeightNorm(RULES, report_to=target, log_every_n_steps=1, strip_on_end=True)
    made = trainer(callback)
    module = Module()
    made.fit(module, loader())
    text = target.read_text(encoding="utf-8")
    rates = [callback.history.records[-1][name]["effective_lr"] for name in callback.report.changed]
    assert len(rates) > 1
    for name in callback.report.changed:
        assert f"<title>{name}</title>" in text  # its curves
    assert all(f"{rate:.3g}" in text for rate in rates)
    assert "rule 1" in text and f"<h1>{type(module).__name__}</h1>" in text
    target.unlink()
    made.validate(module, loader())
    assert not target.exists()
    trainer(WeightNorm(RULES, report_to=target)).fit(Module(), loader())
    assert "<figure>" not in target.read_text(encoding="utf-8")


def test_report_to_is_checked_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"another ending than \.html"):
        WeightNorm(RULES, report_to="last.ckpt")
