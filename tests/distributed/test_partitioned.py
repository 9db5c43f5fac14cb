"""Parameters that DeepSpeed holds, by the marks that it leaves on them: no DeepSpeed is needed.

``engine_runs.py`` does the same with DeepSpeed itself, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn


def build(*, normed: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    if normed:
        wn.apply(model, "linears")
    return model


def partition(model: nn.Module) -> None:
    """As ZeRO-3 leaves parameters outside a forward."""
    for number, parameter in enumerate(model.parameters()):
        marked: Any = parameter
        marked.ds_id, marked.ds_shape, marked.ds_numel = number, parameter.shape, parameter.numel()
        marked.ds_tensor = parameter.detach().flatten()[: -(-parameter.numel() // 2)].clone()
        parameter.data = torch.empty(0)


def state(model: nn.Module) -> Any:
    return {name: (id(p), type(p), p.shape, vars(p)) for name, p in model.named_parameters()}


def refused(model: nn.Module, call: Callable[[], Any]) -> str:
    """What an error says about the first weight, with the model as it was."""
    before, kinds = state(model), [type(module) for module in model.modules()]
    with pytest.raises(wn.WrappedModuleError) as caught:
        call()
    assert state(model) == before and kinds == [type(module) for module in model.modules()]
    assert caught.value.site == "0.weight"
    return str(caught.value)


RULES: list[Any] = ["linears", nn.Linear, {"names": "**", "dim": 1}]


@pytest.mark.parametrize("rules", RULES)
def test_apply_and_plan_say_who_has_partitioned_the_model(rules: Any) -> None:
    model = build(normed=False)
    partition(model)
    for call in (wn.apply, wn.plan):
        said = refused(model, lambda call=call: call(model, rules))  # type: ignore[misc]
        assert said.startswith("0.weight is partitioned by DeepSpeed ZeRO-3")
        assert "before deepspeed.initialize, outside zero.Init" in said
        assert "checkpoints.convert" not in said
    shown = wn.plan(model, rules, check=False)
    assert [(step.site.name, step.site.shape) for step in shown.steps] == [
        ("0.weight", (8, 4)),
        ("2.weight", (2, 8)),
    ]
    assert [site.shape for site in wn.sites(model)] == [(8, 4), (2, 8)]


def test_weight_norm_that_is_partitioned_stays_and_is_found_again() -> None:
    model = build(normed=True)
    partition(model)
    assert wn.apply(model, "linears").changed == ()
    said = refused(model, lambda: wn.remove(model))
    assert "GatheredParameters" in said and "wn_surgery.checkpoints.convert(state)" in said
    refused(model, lambda: wn.apply(model, {"types": "Linear", "dim": 1, "replace": True}))
    groups = wn.parameter_groups(model, weight_decay=0.1)
    assert len(groups.decayed) == 2 and all(name.endswith("original1") for name in groups.decayed)


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (wn.statistics, "inside deepspeed.zero.GatheredParameters"),
        (lambda model: wn.folded(model).__enter__(), "inside deepspeed.zero.GatheredParameters"),
        (lambda model: wn.writable(model).__enter__(), "before deepspeed.initialize"),
        (lambda m: wn.initialize_from_batch(m, torch.ones(4, 4)), "before deepspeed.initialize"),
        (lambda model: wn.renormalize(model, 1.0), "sharded by DeepSpeed ZeRO-3"),
    ],
    ids=["statistics", "folded", "writable", "initialize_from_batch", "renormalize"],
)
def test_values_of_parts_are_refused(call: Callable[[nn.Module], Any], advice: str) -> None:
    model = build(normed=True)
    partition(model)
    assert advice in refused(model, lambda: call(model))
    # Gathered, they can be read.
    whole = build(normed=True)
    for parameter, source in zip(model.parameters(), whole.parameters(), strict=True):
        parameter.data = source.data
    assert str(wn.statistics(model)) == str(wn.statistics(whole))


def test_parameters_of_which_the_optimizer_of_zero_has_copies() -> None:
    model = build(normed=True)
    for parameter in model.parameters():
        parameter._hp_mapping = None  # type: ignore[attr-defined]
    wn.statistics(model)
    renormalize = lambda model: wn.renormalize(model, "rms")  # noqa: E731
    for call in (wn.remove, renormalize, lambda m: wn.writable(m).__enter__()):
        assert "DeepSpeed ZeRO" in refused(model, lambda call=call: call(model))  # type: ignore[misc]


class DeepSpeedEngine(nn.Module):
    """Only its name counts, and where it keeps the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


def test_the_engine_is_a_wrapper() -> None:
    engine = DeepSpeedEngine(build(normed=False))
    assert [site.name for site in wn.sites(engine)] == ["0.weight", "2.weight"]
    assert "held by DeepSpeed" in refused(engine, lambda: wn.apply(engine, "linears"))
