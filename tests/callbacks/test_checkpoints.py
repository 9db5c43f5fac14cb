"""The Lightning callback's checkpoints: resuming, layouts, foreign ones, ones that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as legacy_weight_norm

import wn_surgery as wn
from tests.callbacks.lightning_tools import (
    QUIET,
    RULES,
    G,
    Late,
    Module,
    OldModule,
    V,
    assert_same_optimizer,
    assert_same_state,
    loader,
    normed,
    trainer,
)
from wn_surgery.callbacks.lightning import SaveLayout, WeightNorm, WeightNormMixin
from wn_surgery.model.records import KEY

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # Deprecated in favour of the parametrization, and still what old checkpoints come from.
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
]


class Noisy(Module):
    """Consumes random numbers in training, and keeps their state in its checkpoints."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss([batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        if hasattr(self, "rng"):
            torch.set_rng_state(self.rng)


class Mixed(WeightNormMixin, Module):
    pass


class MixedLate(WeightNormMixin, Late):
    pass


def run(
    module: Any, folder: Path, epochs: int = 2, resume: str | None = None, **options: Any
) -> tuple[Any, str]:
    """Train, and return the Trainer and the last checkpoint's path."""
    callbacks = options.pop("callbacks", None) or [WeightNorm(RULES)]
    package = options.pop("package", lp)
    saver = package.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    made = trainer(
        *callbacks, saver, package=package, epochs=epochs, enable_checkpointing=True, **options
    )
    made.fit(module, loader(), ckpt_path=resume)
    return made, str(folder / f"epoch={epochs - 1}.ckpt")


def load(path: str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("save_layout", ["parametrized", "plain", "legacy"])
@pytest.mark.parametrize("kind", [Noisy, Late], ids=["built in init", "built late"])
def test_resuming_is_bit_exact(tmp_path: Path, kind: Any, save_layout: SaveLayout) -> None:
    def callbacks() -> list[Any]:
        return [WeightNorm(RULES, save_layout=save_layout)]

    torch.manual_seed(3)
    whole = kind()
    run_whole, _ = run(whole, tmp_path / "whole", 4, callbacks=callbacks())
    random_after = torch.get_rng_state()
    torch.manual_seed(3)
    _, path = run(kind(), tmp_path / "parts", callbacks=callbacks())
    torch.manual_seed(99)
    resumed = kind()
    run_resumed, _ = run(resumed, tmp_path / "parts", 4, resume=path, callbacks=callbacks())

    assert_same_state(whole.state_dict(), resumed.state_dict())
    assert f"model.2.{V}" in resumed.state_dict()
    assert_same_optimizer(run_whole.optimizers[0], run_resumed.optimizers[0])
    schedulers = [each.lr_scheduler_configs[0].scheduler for each in (run_whole, run_resumed)]
    assert schedulers[0].state_dict() == schedulers[1].state_dict()
    assert schedulers[1].last_epoch == 4
    assert len(run_resumed.optimizers[0].state) == 8
    if kind is Noisy:
        assert torch.equal(torch.get_rng_state(), random_after)


def test_the_callback_consumes_no_random_numbers(tmp_path: Path) -> None:
    states = []
    for callbacks in ([WeightNorm(RULES)], [lp.Callback()]):
        module = Module()
        torch.manual_seed(5)
        run(module, tmp_path / str(len(states)), callbacks=callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_plain_checkpoint_loads_without_this_library(tmp_path: Path, weights_only: bool) -> None:
    module, callback = Module(), WeightNorm(RULES, save_layout="plain")
    made, path = run(module, tmp_path, callbacks=[callback])
    if weights_only:
        path = str(tmp_path / "weights.ckpt")
        made.save_checkpoint(path, weights_only=True)
    plain = Module.load_from_checkpoint(path)
    assert normed(plain) == []
    x = torch.randn(3, 4)
    assert torch.equal(plain.model(x), module.model(x))
    wn.remove(module)
    assert plain.state_dict().keys() == module.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[key])
    lp.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(
        Module(), loader(), ckpt_path=path, verbose=False
    )


def test_a_legacy_checkpoint_has_weight_g_and_weight_v(tmp_path: Path) -> None:
    module = Module()
    _, path = run(module, tmp_path, callbacks=[WeightNorm(RULES, save_layout="legacy")])
    state = load(path)["state_dict"]
    old = Module()
    for layer in (old.model[0], old.model[2]):
        legacy_weight_norm(layer)
    assert set(old.state_dict()) == set(state)
    old.load_state_dict(state)
    x = torch.randn(3, 4)
    assert torch.equal(old.model(x), module.model(x))


def test_checkpoints_say_where_weight_norm_is(tmp_path: Path) -> None:
    rules = [
        wn.Rule(types=nn.Linear, eps=1e-6),
        wn.Rule(action="skip", where=lambda name, _: name == "model.2"),
    ]
    made, path = run(Module(), tmp_path, callbacks=[WeightNorm(rules)])
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for each in (path, str(tmp_path / "weights.ckpt")):
        said = load(each)[KEY]
        assert said["version"] == 1
        assert said["layout"] == "parametrized"
        assert said["rules"][0] == rules[0].to_dict()
        assert said["sites"] == [
            {"name": name, "dim": 0, "eps": 1e-6, "norm_dtype": None}
            for name in ("model.0.weight", "model.head.weight")
        ]


def plain_run(tmp_path: Path, module: Any, **options: Any) -> tuple[Any, str]:
    return run(module, tmp_path / "before", callbacks=[lp.Callback()], **options)


def test_a_plain_checkpoint_is_converted_and_its_optimizer_goes_on_by_name(tmp_path: Path) -> None:
    before = Module()
    old_run, path = plain_run(tmp_path, before)
    old_state = old_run.optimizers[0].state
    old = {name: old_state[parameter] for name, parameter in before.named_parameters()}

    seen: dict[str, Any] = {}

    class Look(lp.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen["weights"] = pl_module.model[0].weight.detach().clone()
            names = {id(p): name for name, p in pl_module.named_parameters()}
            seen["state"] = {
                names[id(p)]: {key: value.clone() for key, value in state.items()}
                for p, state in trainer.optimizers[0].state.items()
            }
            seen["lr"] = trainer.optimizers[0].param_groups[0]["lr"]

    module = Module()
    run(module, tmp_path / "after", 3, resume=path, callbacks=[WeightNorm(RULES), Look()])

    assert torch.equal(seen["weights"], before.model[0].weight)
    kept = {"model.0.bias", "model.2.bias", "model.head.weight", "model.head.bias"}
    assert set(seen["state"]) == kept  # g and v start without
    for name in kept:
        for key, value in old[name].items():
            assert torch.equal(value, seen["state"][name][key]), (name, key)
    assert seen["lr"] == 1e-2 * 0.5**2
    assert normed(module) == ["model.0.weight", "model.2.weight"]


@pytest.mark.parametrize("form", ["legacy", "parametrized"])
def test_a_run_with_torchs_weight_norm_goes_on_as_it_would_have(tmp_path: Path, form: str) -> None:
    def old() -> Module:
        module = Module()
        for layer in (module.model[0], module.model[2]):
            if form == "legacy":
                legacy_weight_norm(layer)
            else:
                parametrizations.weight_norm(layer)
        return module

    _, path = plain_run(tmp_path, old())
    expected = old()
    expected_run, _ = run(expected, tmp_path / "there", 4, resume=path, callbacks=[lp.Callback()])
    module = Module()
    module_run, _ = run(module, tmp_path / "here", 4, resume=path)
    pairs = {"_g": f".{G}", "_v": f".{V}"}
    for name, parameter in expected.named_parameters():
        new = name
        for suffix, other in pairs.items():
            if form == "legacy" and name.endswith(f"weight{suffix}"):
                new = name.removesuffix(f".weight{suffix}") + other
        mine = dict(module.named_parameters())[new]
        assert torch.equal(mine, parameter), name
        state = module_run.optimizers[0].state[mine]
        for key, value in expected_run.optimizers[0].state[parameter].items():
            assert torch.equal(state[key], value), (name, key)


def test_an_optimizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    class Other(Module):
        def configure_optimizers(self) -> Any:
            weights = [p for p in self.parameters() if p.ndim > 1]
            return torch.optim.AdamW([{"params": weights}, {"params": self.model.head.bias}])

    _, path = plain_run(tmp_path, Module())
    with pytest.raises(wn.CheckpointMismatchError, match=r"groups of \[6\] parameters"):
        run(Other(), tmp_path / "after", 3, resume=path)


def test_a_checkpoint_of_other_rules_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    _, path = run(Module(), tmp_path)
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    others = [{"types": "Linear", "eps": 1e-6}, {"action": "skip", "names": "model.0"}]
    with pytest.raises(wn.CheckpointMismatchError) as caught:
        run(module, tmp_path, 3, resume=path, callbacks=[WeightNorm(others)])
    assert [line for line in str(caught.value).splitlines() if line[0] in "-+"] == [
        "- model.0.weight dim=0",
        "- model.2.weight dim=0",
        "+ model.2.weight dim=0 eps=1e-06",
        "+ model.head.weight dim=0 eps=1e-06",
    ]
    assert "epoch=1.ckpt" in str(caught.value)
    for name in ("model.0.weight", "model.0.bias", "model.head.bias"):
        assert torch.equal(before[name], module.state_dict()[name])
    # The same sites by other rules are the same.
    run(Module(), tmp_path, 3, resume=path, callbacks=[WeightNorm({"names": "model.{0,2}"})])


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    class Deep(Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.ModuleList(nn.Linear(2, 2) for _ in range(25))

    _, path = run(Deep(), tmp_path, callbacks=[WeightNorm({"types": "Linear"})])
    with pytest.raises(wn.CheckpointMismatchError, match=r"\.\.\. and \d+ more") as caught:
        run(Deep(), tmp_path, 3, resume=path, callbacks=[WeightNorm({"types": "Linear", "eps": 1})])
    assert sum(line[0] in "-+" for line in str(caught.value).splitlines()) == 20


def test_what_is_no_checkpoint_of_a_model_passes(tmp_path: Path) -> None:
    module = Module()
    made, _ = run(module, tmp_path, callbacks=[WeightNorm(RULES, save_layout="plain")])
    io = made.strategy.checkpoint_io
    io.save_checkpoint({"step": 3}, tmp_path / "other.ckpt")
    assert io.load_checkpoint(tmp_path / "other.ckpt") == {"step": 3}


def test_other_stages_refuse_it_too(tmp_path: Path) -> None:
    _, path = run(Module(), tmp_path)
    made = trainer(WeightNorm({"types": "Linear"}))
    with pytest.raises(wn.CheckpointMismatchError, match=r"\+ model\.head\.weight"):
        made.test(Module(), loader(), ckpt_path=path, verbose=False)


def test_weight_norm_in_a_foreign_checkpoint_that_no_rule_matches_is_refused(
    tmp_path: Path,
) -> None:
    module = Module()
    parametrizations.weight_norm(module.model.head)
    _, path = plain_run(tmp_path, module)
    with pytest.raises(wn.CheckpointMismatchError, match=r"weight norm on model\.head\.weight"):
        run(Module(), tmp_path / "after", 3, resume=path)


def test_a_checkpoint_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    _, path = run(Module(), tmp_path)
    checkpoint = load(path)
    checkpoint[KEY]["version"] = 99
    torch.save(checkpoint, path)
    with pytest.raises(wn.CheckpointMismatchError, match=r"version 99.*newer"):
        run(Module(), tmp_path, 3, resume=path)


@pytest.mark.parametrize("save_layout", ["parametrized", "plain", "legacy"])
@pytest.mark.parametrize("kind", [Mixed, MixedLate])
def test_load_from_checkpoint(tmp_path: Path, kind: Any, save_layout: SaveLayout) -> None:
    module = kind()
    made, path = run(module, tmp_path, callbacks=[WeightNorm(RULES, save_layout=save_layout)])
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    x = torch.randn(3, 4)
    for each in (path, tmp_path / "weights.ckpt"):
        loaded = kind.load_from_checkpoint(each)
        expected = [] if save_layout == "plain" else ["model.0.weight", "model.2.weight"]
        assert normed(loaded) == expected
        assert torch.equal(loaded.model(x), module.model(x))


def test_the_mixin_leaves_a_module_alone_that_has_weight_norm(tmp_path: Path) -> None:
    whole, parts = Mixed(), Mixed()
    run(whole, tmp_path / "whole", 3)
    _, path = run(parts, tmp_path)
    resumed = Mixed()
    run(resumed, tmp_path, 3, resume=path)
    assert_same_state(whole.state_dict(), resumed.state_dict())
    resumed.on_load_checkpoint({"state_dict": {}})  # of a run without the callback


class MixedNormed(Mixed):
    """Puts weight norm on itself, and the callback another."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.model[0])


def test_the_mixin_replaces_what_the_class_puts_on(tmp_path: Path) -> None:
    module = MixedNormed()
    rule = {"names": "model.0", "dim": 1, "replace": True}
    _, path = run(module, tmp_path, callbacks=[WeightNorm(rule)])
    loaded = MixedNormed.load_from_checkpoint(path)
    assert_same_state(loaded.state_dict(), module.state_dict())


def test_the_older_package_resumes_too(tmp_path: Path) -> None:
    whole, resumed = OldModule(), OldModule()
    for save_layout in ("parametrized", "plain"):
        callbacks = [WeightNorm(RULES, save_layout=save_layout)]
        options: dict[str, Any] = {"package": pytorch_lightning, "callbacks": callbacks}
        whole, resumed = OldModule(), OldModule()
        run(whole, tmp_path / "whole", 3, **options)
        _, path = run(OldModule(), tmp_path, **options)
        run(resumed, tmp_path, 3, resume=path, **options)
        assert_same_state(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("save_layout", ["parametrized", "plain", "legacy"])
def test_weight_averaging_resumes_exactly_in_every_layout(
    tmp_path: Path, save_layout: SaveLayout
) -> None:
    def callbacks() -> list[Any]:
        average = lp.callbacks.EMAWeightAveraging(decay=0.9)
        return [WeightNorm(RULES, save_layout=save_layout), average]

    whole, resumed = Module(), Module()
    run_whole, _ = run(whole, tmp_path / "whole", 4, callbacks=callbacks())
    _, path = run(Module(), tmp_path, callbacks=callbacks())
    checkpoint = load(path)
    for name in ("state_dict", "current_model_state"):
        state: Mapping[str, Any] = checkpoint[name]
        assert ("model.0.weight" in state) == (save_layout == "plain")
        assert ("model.0.weight_g" in state) == (save_layout == "legacy")
    run_resumed, _ = run(resumed, tmp_path, 4, resume=path, callbacks=callbacks())
    assert_same_state(whole.state_dict(), resumed.state_dict())
    assert_same_optimizer(run_whole.optimizers[0], run_resumed.optimizers[0])


def test_an_io_plugin_of_the_user_is_kept(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

    class Counting(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            type(self).saved += 1
            super().save_checkpoint(*args, **kwargs)

    module = Module()
    callback = WeightNorm(RULES, save_layout="plain")
    made, path = run(module, tmp_path, callbacks=[callback], plugins=[Counting()])
    assert Counting.saved == 2
    made.fit_loop.max_epochs = 3
    made.fit(module, loader())
    assert Counting.saved == 3  # wrapped once, however often it is set up
    Module.load_from_checkpoint(path)
    _, path = run(Module(), tmp_path / "async", callbacks=[callback], plugins=[AsyncCheckpointIO()])
    assert normed(Module.load_from_checkpoint(path)) == []


def test_a_compiled_child_is_saved_plain(tmp_path: Path) -> None:
    class Compiled(Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.compile(self.model, backend="eager")  # type: ignore[assignment]

    module = Compiled()
    callback = WeightNorm([{"names": "model.{0,2}"}], save_layout="plain")
    made = trainer(callback)
    made.test(module, loader(), verbose=False)
    made.save_checkpoint(tmp_path / "compiled.ckpt")
    state = load(str(tmp_path / "compiled.ckpt"))["state_dict"]
    assert set(state) == set(Compiled().state_dict())
    assert torch.equal(state["model._orig_mod.0.weight"], module.model._orig_mod[0].weight)  # type: ignore[union-attr,index]
