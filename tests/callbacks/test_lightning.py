"""The Lightning callback in real Trainers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import wn_surgery as wn
from tests.callbacks.lightning_tools import (
    QUIET,
    RULES,
    G,
    Halves,
    Late,
    LateInSetup,
    Module,
    OldModule,
    V,
    loader,
    normed,
    trainer,
)
from wn_surgery.callbacks.lightning import WeightNorm

pytestmark = QUIET


@pytest.mark.parametrize(
    ("package", "kind"), [(lp, Module), (pytorch_lightning, OldModule)], ids=["lp", "pl"]
)
def test_the_optimizer_holds_g_and_v_and_trains_them(package: Any, kind: Any) -> None:
    module, callback = kind(), WeightNorm(RULES)
    run = trainer(callback, package=package)
    before = module.model[0].weight.detach().clone()
    run.fit(module, loader())

    assert normed(module) == ["model.0.weight", "model.2.weight"]
    names = {id(p): name for name, p in module.named_parameters()}
    held = {names[id(p)] for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == set(names.values())
    assert {f"model.0.{G}", f"model.0.{V}", "model.head.weight"} < held
    assert not torch.equal(module.model[0].weight, before)
    assert callback.report is not None
    assert callback.report.changed == ("model.0.weight", "model.2.weight")


def test_a_model_is_patched_once_over_every_stage_and_trainer() -> None:
    module, callback = Module(), WeightNorm(RULES)
    run = trainer(callback)
    run.fit(module, loader(), loader())
    parameters, report = list(module.parameters()), callback.report
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    run.predict(module, loader())
    run.fit_loop.max_epochs = 3
    run.fit(module, loader())
    trainer(WeightNorm(RULES)).fit(module, loader())

    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert callback.report is report


def test_a_later_stage_does_not_fill_g_again(tmp_path: Path) -> None:
    rules = [{"types": "Linear", "g_init": 1.0, "replace": True}]
    module = Module()
    run = trainer(WeightNorm(rules))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    trained = module.state_dict()[f"model.0.{G}"].clone()
    assert not torch.equal(trained, torch.ones_like(trained))
    trainer(WeightNorm(rules)).test(module, loader(), verbose=False)
    assert torch.equal(module.state_dict()[f"model.0.{G}"], trained)
    # And a checkpoint is good for whatever other value a run fills g with.
    resumed = Module()
    run = trainer(WeightNorm([{**rules[0], "g_init": 3.0}]), epochs=3)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "end.ckpt")


def test_a_model_may_be_tested_before_it_is_trained() -> None:
    module, x = Module(), torch.randn(3, 4)
    expected = module.model(x)
    run = trainer(WeightNorm(RULES))
    run.test(module, loader(), verbose=False)
    assert torch.equal(module.model(x), expected)
    run.fit(module, loader())
    assert len(run.optimizers[0].param_groups[0]["params"]) == 8


@pytest.mark.parametrize("kind", [Late, LateInSetup])
def test_layers_built_after_the_callback_are_patched(kind: Any) -> None:
    module, callback = kind(), WeightNorm(RULES)
    run = trainer(callback)
    run.fit(module, loader())
    assert normed(module) == ["model.0.weight", "model.2.weight"]
    assert len(run.optimizers[0].param_groups[0]["params"]) == 8
    # One shot: the module is left with its class's own methods.
    assert not {"setup", "configure_model"} & vars(module).keys()
    run.test(module, loader(), verbose=False)
    assert not {"setup", "configure_model"} & vars(module).keys()


def test_layers_built_in_two_places_are_all_patched() -> None:
    module = Halves()
    trainer(WeightNorm(RULES)).fit(module, loader())
    assert normed(module) == ["model.0.0.weight", "model.0.2.weight", "model.1.weight"]


def test_configure_model_is_called_as_often_as_without_the_callback() -> None:
    module = Late()
    run = trainer(WeightNorm(RULES))
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert module.calls == 2


def test_a_hook_left_by_a_run_that_failed_is_replaced() -> None:
    class Fails(lp.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            raise RuntimeError("no such data")

    module = Late()
    with pytest.raises(RuntimeError, match="no such data"):
        trainer(WeightNorm(RULES), Fails()).fit(module, loader())
    trainer(WeightNorm(RULES)).fit(module, loader())
    assert module.calls == 1
    assert "configure_model" not in vars(module)
    assert len(normed(module)) == 2


def test_an_instance_level_hook_of_the_user_is_kept() -> None:
    module = Module()

    def mine() -> None:
        module.extra = nn.Linear(2, 2)

    module.configure_model = mine  # type: ignore[method-assign]
    trainer(WeightNorm(RULES)).fit(module, loader())
    assert "extra.weight" in normed(module)
    assert vars(module)["configure_model"] is mine


def test_bad_rules_raise_at_construction(tmp_path: Path) -> None:
    with pytest.raises(wn.RuleError, match="aply"):
        WeightNorm({"action": "aply"})
    with pytest.raises(wn.RuleError):
        WeightNorm(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="on_unmatched"):
        WeightNorm(RULES, on_unmatched="raise")  # type: ignore[arg-type]


def test_rules_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("rules:\n  - {types: Linear}\n  - {action: skip, names: '**.head'}\n")
    assert WeightNorm(path).rules == WeightNorm(RULES).rules


@pytest.mark.parametrize("kind", [Module, Late])
def test_a_rule_that_matches_nothing_raises_with_a_hint(kind: Any) -> None:
    module = kind()
    with pytest.raises(wn.UnmatchedRuleError, match=r"its children: model\).*configure_model"):
        trainer(WeightNorm([*RULES, {"types": "Conv2d"}])).fit(module, loader())


def test_unmatched_rules_may_be_allowed() -> None:
    module = Module()
    trainer(WeightNorm({"types": "Conv2d"}, on_unmatched="ignore")).fit(module, loader())
    assert normed(module) == []
    with pytest.warns(wn.UnmatchedRuleWarning):
        trainer(WeightNorm({"types": "Conv2d"}, on_unmatched="warn")).fit(module, loader())


def test_an_optimizer_built_too_early_is_refused() -> None:
    class Early(Module):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    with pytest.raises(wn.WeightNormError, match=r"holds model\.0\.weight.*configure_optimizers"):
        trainer(WeightNorm(RULES)).fit(Early(), loader())


def holding(pick: Any) -> Any:
    class Picky(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            chosen = [p for name, p in self.named_parameters() if pick(name)]
            return torch.optim.SGD(chosen, lr=0.1)

    return Picky()


@pytest.mark.parametrize(
    ("pick", "said"),
    [
        (lambda name: name.endswith((".weight", ".bias")), r"model\.0\.weight and 1 more"),
        (lambda name: name == "model.head.weight", r"model\.0\.weight and 1 more"),
        (lambda name: name != f"model.0.{G}", r"model\.0\.weight, which"),
        (lambda name: name not in (f"model.2.{G}", f"model.2.{V}"), r"model\.2\.weight, which"),
    ],
    ids=["by name", "none", "v alone", "bias alone"],
)
def test_optimizers_that_leave_out_g_and_v_are_refused(pick: Any, said: str) -> None:
    module = holding(pick)
    with pytest.raises(wn.CallbackError, match=rf"no optimizer holds g and v of {said}.*groups"):
        trainer(WeightNorm(RULES)).fit(module, loader())


def test_an_optimizer_may_have_a_part_of_the_model() -> None:
    module = holding(lambda name: "model.2." in name)
    trainer(WeightNorm(RULES)).fit(module, loader())
    module = holding(lambda name: "head" in name)
    callback = WeightNorm(RULES)
    callback.patch(module)
    for site in wn.sites(module):
        if site.held is not None:
            site.held.g.requires_grad_(False)  # type: ignore[union-attr]
            site.held.v.requires_grad_(False)  # type: ignore[union-attr]
    trainer(callback).fit(module, loader())


def test_layers_sharded_in_configure_model_are_refused(tmp_path: Path) -> None:
    class Shards(Late):
        def configure_model(self) -> None:
            super().configure_model()
            fully_shard(self.model, mesh=mesh)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(wn.WrappedModuleError, match=r"in configure_model\(\) before sharding"):
            trainer(WeightNorm(RULES)).fit(Shards(), loader())
    finally:
        torch.distributed.destroy_process_group()


def test_the_callback_can_be_copied_and_pickled_after_a_run() -> None:
    module, callback = Module(), WeightNorm(RULES)
    trainer(callback).test(module, loader(), verbose=False)
    assert copy.deepcopy(callback).rules == callback.rules
    assert pickle.loads(pickle.dumps(callback)).report == callback.report


def test_weight_averaging_after_it_copies_the_patched_model() -> None:
    module = Late()
    averaging = lp.callbacks.WeightAveraging()
    with pytest.warns(UserWarning, match="WeightAveraging callback with a model that overrides"):
        trainer(WeightNorm(RULES), averaging).fit(module, loader())
    assert averaging._average_model is not None
    assert len(normed(averaging._average_model)) == 2
    assert averaging._average_model.n_averaged > 0


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_prints_the_report(capsys: pytest.CaptureFixture[str], verbose: bool) -> None:
    trainer(WeightNorm(RULES, verbose=verbose)).test(Module(), loader(), verbose=False)
    assert ("model.0.weight" in capsys.readouterr().out) == verbose
