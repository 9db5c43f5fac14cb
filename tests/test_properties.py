"""What must hold for every model and every rule set.

1,000 cases in the ordinary run, the same ones each time; ``make test-long`` draws more.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fingerprints import Fingerprint, difference, effective, of_model, of_optimizer, outputs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import Case, Tree, cases, noted, trees
from torch import nn
from torch.nn.utils import prune

import wn_surgery as wn
from wn_surgery import layouts, surgery
from wn_surgery.optimizers import OptimizerEdit
from wn_surgery.plan import Plan

CASES = int(os.environ.get("WN_SURGERY_CASES", "1000"))
_EXACT = (torch.float32, torch.float64, torch.complex64)


def share(percent: int) -> settings:
    """Settings for a property that gets ``percent`` of all cases."""
    return settings(
        max_examples=max(1, CASES * percent // 100),
        # The ordinary run is the same each time; the long one looks for something new.
        derandomize="WN_SURGERY_CASES" not in os.environ,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def planned(model: nn.Module, case: Case) -> Plan:
    return wn.plan(model, case.rules, on_unmatched="ignore", check=False)


def apply(model: nn.Module, case: Case, **options: Any) -> wn.Report:
    return wn.apply(model, case.rules, on_unmatched="ignore", **options)


def applied(case: Case, model: nn.Module) -> wn.Report | None:
    """Apply the rules; None if they cannot be, and then nothing may have changed."""
    problems = planned(model, case).problems
    if not problems:
        return apply(model, case)
    before = of_model(model, identity=True)
    with pytest.raises(wn.WeightNormError) as caught:
        apply(model, case)
    assert type(caught.value) is problems[0].kind
    assert not difference(before, of_model(model, identity=True))
    return None


# Planning ---------------------------------------------------------------------------------


@share(20)
@given(cases(), st.booleans())
def test_a_plan_changes_nothing_and_says_what_apply_does(case: Case, strict: bool) -> None:
    model = case.tree.build()
    on_unmatched: Any = "error" if strict else "ignore"
    before, random = of_model(model, identity=True), torch.random.get_rng_state()
    plan = wn.plan(model, case.rules, on_unmatched=on_unmatched, check=False)
    assert str(plan)
    expected = plan.to_dict()
    assert not difference(before, of_model(model, identity=True))
    assert torch.equal(random, torch.random.get_rng_state())
    if plan.problems:
        for call in (wn.plan, wn.apply):
            with pytest.raises(wn.WeightNormError) as caught:
                call(model, case.rules, on_unmatched=on_unmatched)
            assert type(caught.value) is plan.problems[0].kind
            assert not difference(before, of_model(model, identity=True))
        return
    report = wn.apply(model, case.rules, on_unmatched=on_unmatched)
    assert report.changed == tuple(step.site.name for step in plan.changes)
    assert list(report.steps) == expected["steps"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters_after"]
    for step in plan.changes:
        after = next(site for site in wn.sites(step.site.module) if site.param == step.site.param)
        assert (after.layout, after.norm and after.norm.extra_repr()) == (
            step.after,
            step.norm and step.norm.extra_repr(),
        )


# Apply and remove ---------------------------------------------------------------------------


@share(30)
@given(cases(only_apply=True), st.booleans())
def test_apply_then_remove_gives_the_model_back(case: Case, by_rule: bool) -> None:
    model = case.tree.build()
    plan = planned(model, case)
    before, weights, results = of_model(model), effective(model), outputs(model)
    if applied(case, model) is None or not plan.changes:
        return
    assert {step.action for step in plan.changes} == {"apply"}
    loose = _rounded(plan)
    now = effective(model)
    assert [name for name in weights if name not in loose and now[name] != weights[name]] == []
    if not loose:
        assert outputs(model) == results

    removal = [
        wn.Rule(action="remove", names=step.site.node.paths, params=step.site.param)
        for step in plan.changes
    ]
    everything = not any(site.normed for site in wn.sites(case.tree.build()))
    report = wn.remove(model) if everything and not by_rule else wn.remove(model, removal)
    assert set(report.changed) == {step.site.name for step in plan.changes}
    assert wn.remove(model, removal, on_unmatched="ignore").changed == ()
    untied = any(step.copies for step in plan.changes)
    skip = {
        key for key in before if key.endswith(": data") and _name_of(key) in loose
    } | {key for key in before if untied and key.endswith((": tensor", ": object"))}
    # What RNNs keep beside their parameters is the same list, and is compared through them.
    skip |= {key for key in before if loose and key.endswith("._flat_weights")}
    assert not difference(before, of_model(model), skip=skip)
    for step in plan.changes:
        if step.rule is not None and step.rule.g_init is None and step.site.name in loose:
            _assert_close(model, step.site.module, step.site.param, weights[step.site.name][1])


def _rounded(plan: Plan) -> set[str]:
    """The names of sites whose weight need not come back bit for bit, and of their RNN's copy."""
    found = set()
    for step in plan.changes:
        tensor, norm, rule = step.site.tensor, step.norm, step.rule
        assert tensor is not None and norm is not None and rule is not None
        narrow = tensor.dtype not in _EXACT
        # In another precision g is rounded, and so is the weight.
        other = norm.norm_dtype not in (None, tensor.dtype.to_real())
        if narrow or other or rule.g_init is not None:
            found.update(step.site.names)
    return found


def _name_of(key: str) -> str:
    where, name, _ = key.split(": ")
    return name if where == "(root)" else f"{where}.{name}"


def _assert_close(model: nn.Module, module: nn.Module, param: str, before: bytes) -> None:
    weight = getattr(module, param).detach()
    old = torch.frombuffer(bytearray(before), dtype=weight.dtype).reshape(weight.shape)
    tolerance = 4 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(weight, old, rtol=tolerance, atol=1e-7)


@share(15)
@given(cases())
def test_applying_twice_is_applying_once(case: Case) -> None:
    model = case.tree.build()
    if applied(case, model) is None:
        return
    before = of_model(model, identity=True)
    again = planned(model, case)
    assert [(p.where, p.message) for p in again.problems] == []
    assert [(step.site.name, step.action) for step in again.changes] == []
    assert apply(model, case).changed == ()
    assert not difference(before, of_model(model, identity=True))


@share(8)
@given(trees())
def test_removing_everything_gives_plain_modules_whoever_applied(tree: Tree) -> None:
    model, plain = tree.build(), tree.build(normed=False)
    weights, results = effective(model), outputs(model)
    wn.remove(model)
    assert effective(model) == weights
    assert outputs(model) == results
    # Beside weight norm there may be pruning and spectral norm, which stay.
    if any(site.held is not None for site in wn.sites(model)) or _has_other(model):
        return
    found, expected = of_model(model), of_model(plain)
    same = ("class", "attributes", "_parameters", "hooks", "order", "keys")
    for key in [key for key in found if not key.endswith(same)]:
        found.pop(key), expected.pop(key, None)
    assert not difference(expected, found, skip=set(expected) - set(found) - set(_structure(found)))


def _structure(found: Fingerprint) -> list[str]:
    return [key for key in found if ": " in key]


def _has_other(model: nn.Module) -> bool:
    return any(
        "parametrizations" in module._modules
        or any(hook is not noted for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )
