"""Rules × sites → Plan. Everything is decided and checked here; nothing is changed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import nn

from wn_surgery.errors import ModelError, WeightNormError
from wn_surgery.model.layouts import Normed, SiteLayout
from wn_surgery.model.sites import (
    Node,
    Site,
    sites_of,
    walk,
)
from wn_surgery.norm.module_class import FOLDED
from wn_surgery.norm.options import NormOptions
from wn_surgery.rules.sources import Rule, RulesLike, as_rules
from wn_surgery.surgery import checks
from wn_surgery.surgery.diagnosis import explain
from wn_surgery.surgery.matching import Match, match
from wn_surgery.surgery.plan import Plan, Step
from wn_surgery.surgery.ties import Index, resolve_ties

__all__ = [
    "OnUnmatched",
    "UnmatchedRuleWarning",
    "build",
    "build_migration",
    "build_removal",
    "plan",
]

OnUnmatched: TypeAlias = Literal["error", "warn", "ignore"]


class UnmatchedRuleWarning(UserWarning):
    """A rule decided nothing and ``on_unmatched="warn"``."""


def plan(
    model: nn.Module,
    rules: RulesLike,
    *,
    on_unmatched: OnUnmatched = "error",
    check: bool = True,
) -> Plan:
    """What ``apply(model, rules)`` would do, without doing it.

    Args:
        model: any module tree. It is only read.
        rules: a Rule, a list of rules or dicts, a path to YAML or JSON, or a preset's name.
        on_unmatched: what to do about a rule that decides nothing.
        check: raise when the plan cannot be carried out; ``False`` returns it with its
            problems, for printing.

    Returns:
        The plan.

    Raises:
        UnmatchedRuleError: a rule matches nothing; the message says which part of it
            failed and suggests near misses.
        WeightNormError: one of the other reasons in :mod:`wn_surgery.errors`.

    Example:
        >>> import wn_surgery as wn
        >>> from torch import nn
        >>> plan = wn.plan(nn.Sequential(nn.Linear(2, 3)), {"types": "Linear"})
        >>> [(step.site.name, step.action) for step in plan.steps]
        [('0.weight', 'apply')]
    """
    made = build(model, as_rules(rules), on_unmatched=on_unmatched)
    if check:
        made.check()
    return made


def build(model: nn.Module, rules: tuple[Rule, ...], on_unmatched: OnUnmatched = "error") -> Plan:
    """The plan with its problems, whether or not it can be carried out."""
    if on_unmatched not in ("error", "warn", "ignore"):
        raise ValueError(f"on_unmatched={on_unmatched!r}; expected 'error', 'warn' or 'ignore'")
    with _uncollected():
        return _build(model, rules, on_unmatched)


@contextmanager
def _uncollected() -> Generator[None]:
    """Keep the cycle collector out of the way: a plan makes many objects and no cycles.

    Each of its passes looks at everything made so far, so that large models would take more
    than their share of time (benchmarks/bench_plan.py).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _build(model: nn.Module, rules: tuple[Rule, ...], on_unmatched: OnUnmatched) -> Plan:
    nodes = _nodes(model)
    index = Index(nodes)
    made = Plan(model, rules, [], parameters=index.count)
    winning: set[int] = set()
    for found in match(nodes, rules):
        winning.update(found.winners.values())
        if len(found.winners) > 1:
            made.problems.extend(_conflicts(found, rules))
        _decide(made, found)
    resolve_ties(made, index)
    # Behind the ties, for what they skip is divided by nothing: BERT's decoder is tied to
    # embeddings whose padding is zero.
    made.problems.extend(
        checks.before_division(
            (step.site, step.norm, None if step.rule is None else step.rule.g_init)
            for step in made.changes
            if step.norm is not None
        )
    )
    _report_unmatched(made, nodes, winning, on_unmatched)
    return made


def _nodes(model: nn.Module) -> list[Node]:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"the model is a TorchScript module ({model.original_name}), whose parameters are "
            "fixed; change weight norm before torch.jit.script or torch.jit.trace"
        )
    return walk(model)


def build_removal(model: nn.Module) -> Plan:
    """The plan of :func:`wn_surgery.remove` without rules: everything, and nothing else listed."""
    rule = Rule(action="remove", names="**", params="*")
    made = build(model, (rule,), "ignore")
    made.rules, made.steps = (), made.changes
    for step in made.steps:
        step.why = f"by {step.site.held.maker}" if step.site.held is not None else ""
    return made


def build_migration(
    model: nn.Module, to: SiteLayout, of: Collection[SiteLayout] = ("legacy", "parametrized")
) -> Plan:
    """The plan of :func:`wn_surgery.migrate`, for the sites whose layout is among ``of``."""
    nodes = _nodes(model)
    made = Plan(model, (), [], parameters=Index(nodes).count)
    for node in nodes:
        for site in sites_of(node):
            if _is_open(site):
                made.problems.extend(checks.before_any_change(site))
                continue
            held = site.held
            if not isinstance(held, Normed) or held.layout not in of:
                continue
            there = held.layout == to and (to == "legacy" or held.maker == "wn_surgery")
            step = Step(site, "keep" if there else "migrate", to, held.norm, None)
            step.why = f"already {to}" if there else f"by {held.maker}"
            made.steps.append(step)
            if step.changes:
                made.problems.extend(checks.before_any_change(site))
                made.problems.extend(checks.before_migration(site, to))
    return made


def _decide(made: Plan, found: Match) -> None:
    site, number = found.site, found.winner
    rule = made.rules[number]
    step = Step(site, "keep", site.layout, site.norm, rule)
    step.shadowed = tuple(index + 1 for index in found.shadowed)
    step.why = f"rule {number + 1}"
    made.steps.append(step)
    if rule.action == "skip":
        step.action = "skip"
    elif rule.action == "remove":
        made.problems.extend(_plan_removal(step))
    elif site.normed:
        made.problems.extend(_plan_replacement(step, rule))
    elif site.held is not None:
        made.problems.append(_stacked(site))
    else:
        made.problems.extend(_plan_application(step, rule))


def _plan_removal(step: Step) -> Iterator[WeightNormError]:
    site = step.site
    if site.normed:
        step.action, step.after, step.norm = "remove", "plain", None
        yield from checks.before_any_change(site)
    elif site.held is not None and "WeightNorm" in site.held.maker:
        yield _stacked(site)
    elif _is_open(site):  # it only looks plain
        yield from checks.before_any_change(site)
    else:
        step.why += ", no weight norm here"


def _is_open(site: Site) -> bool:
    """Whether the parameter itself is inside ``folded`` or ``writable`` now."""
    return site.param in FOLDED.get(site.module, ())


def _plan_application(step: Step, rule: Rule) -> Iterator[WeightNormError]:
    step.action, step.after = "apply", "parametrized"
    problem = None
    for problem in checks.before_apply(step.site):
        yield problem
    if problem is not None:
        return
    dim = checks.resolve_dim(step.site, rule)
    if isinstance(dim, ModelError):
        yield dim
        return
    step.norm = NormOptions(dim, rule.eps, rule.norm_dtype)
    yield from checks.before_norm(step.site, step.norm, rule.g_init)


def _plan_replacement(step: Step, rule: Rule) -> Iterator[WeightNormError]:
    site = step.site
    held = site.held
    assert isinstance(held, Normed)
    dim = checks.resolve_dim(site, rule)
    if isinstance(dim, ModelError):
        yield dim
        return
    wanted = NormOptions(dim, rule.eps, rule.norm_dtype)
    if wanted == held.norm and not _differs(rule, held):
        fills = rule.g_init is not None and rule.g_init != held.g_init
        step.why += ", already there" + (" (replace=True fills g)" if fills else "")
        return
    if not rule.replace:
        frozen = "" if rule.train_g else ", train_g=False"
        yield ModelError(
            f"{site.name} already carries weight norm with {held.norm}; the rule asks "
            f"for {wanted}{frozen}; give the rule replace=True, or remove first",
            kind="existing",
            site=site.name,
        )
        return
    problems = [
        *checks.before_any_change(site),
        *checks.before_norm(site, wanted, rule.g_init),
    ]
    if not problems:
        step.action, step.after, step.norm = "replace", "parametrized", wanted
    yield from problems


def _differs(rule: Rule, held: Normed) -> bool:
    """Whether a g that is there is not as the rule wants it.

    Without ``replace`` only a g that trains, and should not, is another one: ``g_init`` is where
    it began, and whoever froze it may have done so since. With ``replace``, g is thawed; and it
    is filled, but once, for to give the same rules again must not undo a training.
    """
    if not rule.train_g and held.g.requires_grad:
        return True
    thaws = rule.train_g and held.v.requires_grad and not held.g.requires_grad
    fills = rule.g_init is not None and rule.g_init != held.g_init
    return rule.replace and (thaws or fills)


def _stacked(site: Site) -> ModelError:
    maker = site.held.maker if site.held is not None else ""
    return ModelError(
        f"{site.name} is computed by {maker}; weight norm cannot be put on it or taken out of it "
        "alone; remove the other parametrization first",
        kind="stacked",
        site=site.name,
    )


def _conflicts(found: Match, rules: tuple[Rule, ...]) -> Iterator[WeightNormError]:
    instructions = {
        path: (rules[i].action, tuple(rules[i].options().items()))
        for path, i in found.winners.items()
    }
    if len(set(instructions.values())) > 1:
        told = "; ".join(
            f"{path or '(root)'} by rule {i + 1} ({rules[i].describe()})"
            for path, i in found.winners.items()
        )
        yield ModelError(
            f"{found.site.name} is one shared module with several names, told different things: "
            f"{told}; let the last rule match all of its names, e.g. with "
            f"{{{','.join(found.site.node.paths)}}}",
            kind="names",
            site=found.site.name,
        )


def _report_unmatched(
    made: Plan, nodes: list[Node], winning: set[int], on_unmatched: OnUnmatched
) -> None:
    for index, rule in enumerate(made.rules):
        if index in winning:
            continue
        unmatched = explain(index, made.rules, nodes)
        made.unmatched.append(unmatched)
        message = f"rule {unmatched.number} ({rule.describe()}) decides nothing: {unmatched.reason}"
        if on_unmatched == "error":
            made.problems.append(
                WeightNormError(message, kind=unmatched.kind, site=f"rule {index + 1}")
            )
        elif on_unmatched == "warn":
            warnings.warn(message, UnmatchedRuleWarning, stacklevel=5)
