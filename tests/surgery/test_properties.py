"""What must hold for every model and every rule set.

1,000 cases in the ordinary run, the same ones each time; ``make test-long`` draws more.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import wn_surgery as wn
from tests.fingerprints import assert_same, difference, effective, of_model, of_optimizer, outputs
from tests.surgery.property_tools import (
    Injected,
    applied,
    apply,
    failing_at,
    optimizer_of,
    other,
    planned,
    removed,
    share,
    stacked,
    ties_of_one_parameter,
)
from tests.surgery.strategies import Case, Tree, cases, trees
from tests.torch_facts.versions import OLD
from wn_surgery.model.layouts import Normed
from wn_surgery.surgery import execution
from wn_surgery.surgery.checks import runs_no_hook
from wn_surgery.surgery.plan import Plan
from wn_surgery.surgery.planning import build_migration, build_removal

_EXACT = (torch.float32, torch.float64, torch.complex64)


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
    assert_same(before, of_model(model, identity=True))
    assert torch.equal(random, torch.random.get_rng_state())
    if plan.problems:
        for call in (wn.plan, wn.apply):
            with pytest.raises(wn.WeightNormError) as caught:
                call(model, case.rules, on_unmatched=on_unmatched)
            assert type(caught.value) is type(plan.problems[0])
            assert_same(before, of_model(model, identity=True))
        return
    report = wn.apply(model, case.rules, on_unmatched=on_unmatched)
    assert report.changed == tuple(step.site.name for step in plan.changes)
    assert list(report.steps) == expected["steps"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters_after"]
    for step in plan.changes:
        after = next(site for site in wn.sites(step.site.module) if site.param == step.site.param)
        assert (after.layout, after.norm) == (step.after, step.norm)


# Apply and remove ---------------------------------------------------------------------------


@share(25)
@given(cases(only_apply=True), st.booleans())
def test_apply_then_remove_gives_the_model_back(case: Case, by_rule: bool) -> None:
    model = case.tree.build()
    plan = planned(model, case)
    # Outputs first: RNNs then hold the weights that they have.
    results, weights, before = outputs(model), effective(model), of_model(model)
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
    fresh = case.tree.build()
    everything = not any(site.normed for site in wn.sites(fresh)) and not stacked(fresh)
    report = wn.remove(model) if everything and not by_rule else wn.remove(model, removal)
    assert set(report.changed) == {step.site.name for step in plan.changes}
    assert wn.remove(model, removal, on_unmatched="ignore").changed == ()
    skip = {key for key in before if key.endswith(": data") and _name_of(key) in loose}
    if any(step.copies for step in plan.changes):
        apart = (": which", ": object", "named_parameters: order")
        skip |= {key for key in before if key.endswith(apart)}
    if not all(whole for _, _, whole in case.tree.ties):
        skip.add("named_parameters: order")  # tied by memory before, and one Parameter after
    # What RNNs keep beside their parameters is the same list, and is compared through them.
    skip |= {key for key in before if loose and key.endswith("._flat_weights")}
    assert_same(before, of_model(model), skip=skip)
    for step in plan.changes:
        if step.rule is not None and step.rule.g_init is None and step.site.name in loose:
            _assert_close(step.site.module, step.site.param, weights[step.site.name][1])


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


def _assert_close(module: nn.Module, param: str, before: bytes) -> None:
    weight = getattr(module, param).detach()
    old = torch.frombuffer(bytearray(before), dtype=weight.dtype).reshape(weight.shape)
    tolerance = 4 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(weight, old, rtol=tolerance, atol=1e-7)


@share(15)
@given(cases())
def test_applying_twice_is_applying_once(case: Case) -> None:
    model = case.tree.build()
    # A rule that removes is about all that carries weight norm: also about vectors, which a glob of
    # it leaves to the other rules while they are plain.
    removes = any(rule.action == "remove" for rule in case.rules)
    if removes and any(len(step.site.shape) < 2 for step in planned(model, case).changes):
        return
    if applied(case, model) is None:
        return
    before = of_model(model, identity=True)
    again = planned(model, case)
    assert [(p.site, str(p)) for p in again.problems] == []
    assert [(step.site.name, step.action) for step in again.changes] == []
    assert apply(model, case).changed == ()
    assert_same(before, of_model(model, identity=True))


@share(8)
@given(trees())
def test_removing_everything_gives_plain_modules_whoever_applied(tree: Tree) -> None:
    model, plain = tree.build(), tree.build(normed=False)
    weights, results = effective(model), outputs(model)
    if not removed(model):
        return
    assert effective(model) == weights
    assert outputs(model) == results
    if other(model):
        return  # pruning and spectral norm stay
    # Nobody has noted where in a user's own class the weight stood before torch took it out.
    in_order = not {leaf.kind for leaf in tree.leaves if leaf.norms} & {"gated", "parameter_list"}
    found, expected = (
        {key: fact for key, fact in of_model(m).items() if key.endswith(_STRUCTURE)}
        for m in (model, plain)
    )
    if not in_order:
        found, expected = _sorted(found), _sorted(expected)
    assert_same(expected, found)


_STRUCTURE = ("class", "attributes", "_parameters", "_buffers", "_modules", "hooks", "keys")


def _sorted(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        key: sorted(fact[-1] if key.endswith("_parameters") else fact)
        if key.endswith(("_parameters", "keys"))
        else fact
        for key, fact in facts.items()
    }


# Migration, copies --------------------------------------------------------------------------


@share(10)
@given(trees())
def test_migration_there_and_back(tree: Tree) -> None:
    # A pickle ends a tie by memory, with or without surgery.
    model = ties_of_one_parameter(tree).build()
    # An older legacy hook rounds each step in float16, and sums a whole tensor in another order.
    norms = [site.norm for site in wn.sites(model) if site.norm is not None]
    half = any(p.dtype is torch.float16 for p in model.parameters())
    assume(not (OLD and (half or any(norm.dim in (None, ()) for norm in norms))))
    outputs(model)  # hooks of others have run, also those that attention does not call
    pairs, weights, results = _pairs(model), effective(model), outputs(model)
    trained = [(name, p.requires_grad) for name, p in _g_and_v(model)]

    def same(layout: str) -> bool:
        assert {site.layout for site in wn.sites(model) if site.normed} <= {layout}
        assert effective(model) == weights and outputs(model) == results
        assert [(name, p.requires_grad) for name, p in _g_and_v(model)] == trained
        return _pairs(model) == pairs

    wn.migrate(model)
    assert same("parametrized")
    assert wn.migrate(model).changed == ()
    if not other(model):
        again = pickle.loads(pickle.dumps(model))
        assert_same(of_model(model), of_model(again))
        assert outputs(again) == results
        assert outputs(copy.deepcopy(model)) == results
    before, objects = of_model(model), of_model(model, identity=True)
    normed = [site for site in wn.sites(model) if site.norm is not None]
    if any(site.norm.eps or runs_no_hook(site) for site in normed if site.norm is not None):
        says = "legacy hook cannot compute|attention, which never calls"
        with pytest.raises(wn.StackedParametrizationError, match=says):
            wn.migrate(model, to="legacy")
        assert_same(objects, of_model(model, identity=True))
        return
    wn.migrate(model, to="legacy")
    assert same("legacy")
    assert wn.migrate(model, to="legacy").changed == ()
    wn.migrate(model, to="parametrized")
    assert same("parametrized")
    assert_same(before, of_model(model))


def _pairs(model: nn.Module) -> list[tuple[str, int, int]]:
    held = [(site.name, site.held) for site in wn.sites(model)]
    return sorted((name, id(h.g), id(h.v)) for name, h in held if h is not None and h.norm)


def _g_and_v(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    held = sorted((site.name, site) for site in wn.sites(model) if site.normed)
    return [(name, p) for name, site in held for p in (site.held.g, site.held.v)]  # type: ignore[union-attr, misc]


Copier = Callable[[nn.Module], nn.Module]


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


@share(10)
@given(cases(), st.sampled_from([copy.deepcopy, _pickled]), st.booleans())
def test_copies_commute_with_surgery(case: Case, copier: Copier, migrated: bool) -> None:
    # Copying ends a tie by memory, with or without surgery.
    case = replace(case, tree=ties_of_one_parameter(case.tree))
    model = case.tree.build()
    if migrated:
        wn.migrate(model)
    outputs(model)  # RNNs read their weights again
    try:
        twin = copier(model)
    except (RuntimeError, AttributeError, pickle.PicklingError):
        # torch's own parametrized modules never pickle; its hooks leave a graph.
        assert other(model) or not migrated
        return
    before = of_model(model, identity=True)
    assert_same(of_model(model), of_model(twin))
    done = applied(case, twin) is not None
    assert_same(before, of_model(model, identity=True))
    assert (applied(case, model) is not None) == done
    again = copier(model)
    assert_same(of_model(twin), of_model(again))
    assert_same(of_model(model), of_model(again))
    assert outputs(again) == outputs(twin) == outputs(model)


# Failures, optimizers, contexts -------------------------------------------------------------


@share(4)
@given(cases(), st.sampled_from(["rules", "remove", "parametrized", "legacy"]))
def test_a_failure_at_any_step_leaves_all_as_it_was(case: Case, what: str) -> None:
    model = case.tree.build()
    optimizer = optimizer_of(model)
    if what == "rules":
        plan = planned(model, case)
    else:
        plan = build_removal(model) if what == "remove" else build_migration(model, what)  # type: ignore[arg-type]
    if plan.problems or not plan.changes:
        return
    before, steps = of_model(model, identity=True), of_optimizer(optimizer)
    for number in range(1, 10_000):
        try:
            with failing_at(number):
                execution.execute(plan, [optimizer])
        except Injected:
            assert_same(before, of_model(model, identity=True))
            assert_same(steps, of_optimizer(optimizer))
        else:
            assert number > 2 * len(plan.changes)
            assert difference(before, of_model(model, identity=True))
            return


@share(5)
@given(cases())
def test_an_optimizer_holds_what_the_model_holds(case: Case) -> None:
    model = case.tree.build()
    optimizer = optimizer_of(model)
    if (plan := planned(model, case)).problems:
        return
    kept = dict(optimizer.state)
    gone: set[int] = set()
    for step in plan.changes:
        held = step.site.held
        old = (held.g, held.v) if isinstance(held, Normed) else (step.site.tensor,)
        gone.update(map(id, old))
    apply(model, case, optimizers=[optimizer])
    _holds_all(optimizer, model)
    gone -= set(map(id, model.parameters()))  # but what stays at the other end of a tie
    assert {id(p) for p in optimizer.state} == {id(p) for p in kept} - gone
    assert all(optimizer.state[p] is state for p, state in kept.items() if id(p) not in gone)
    if removed(model, [optimizer]):
        _holds_all(optimizer, model)
        optimizer.step()


def _holds_all(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.dtype != torch.int64}


@share(3)
@given(trees())
def test_contexts_leave_nothing_behind(tree: Tree) -> None:
    model = tree.build()
    outputs(model)  # hooks of others have run, also those that attention does not call
    results = outputs(model)
    before = of_model(model, identity=True)
    lists = {key for key in before if "._flat_weight" in key}  # read again on the way out
    # What hooks of others compute is another tensor after each forward.
    lists |= {
        f"{path or '(root)'}: .{name.removesuffix('_orig')}"
        for path, module in model.named_modules()
        for name in module._parameters
        if name.endswith("_orig")
    }
    for context in (wn.folded, wn.writable):
        with context(model):
            inside = of_model(model, identity=True)
            for site in [site for site in wn.sites(model) if site.normed]:
                with pytest.raises((wn.FoldedModelError, wn.StackedParametrizationError)):
                    wn.remove(site.module)
            assert_same(inside, of_model(model, identity=True))
            assert outputs(model) == results
        assert_same(before, of_model(model, identity=True), skip=lists)
