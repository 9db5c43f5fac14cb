"""Rules × sites → Plan. Everything is decided and checked here; nothing is changed."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Collection, Generator, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, Unpack, get_args

import torch
from torch import nn

from wn_surgery.errors import ModelError, WeightNormError
from wn_surgery.model.holders import in_parts
from wn_surgery.model.layouts import Foreign, Normed, SiteLayout, leftovers
from wn_surgery.model.sites import Node, Site, sites_of, walk
from wn_surgery.norm.module_class import FOLDED
from wn_surgery.norm.options import NormOptions
from wn_surgery.rules.sources import Rule, RuleFields, RulesLike, given_rules
from wn_surgery.surgery import checks
from wn_surgery.surgery.diagnosis import explain
from wn_surgery.surgery.matching import Match, match, takes
from wn_surgery.surgery.plan import Plan, Step
from wn_surgery.surgery.ties import Index, resolve_ties

__all__ = [
    "OnUnmatched",
    "UnmatchedRuleWarning",
    "build",
    "build_migration",
    "divided_in_parts",
    "plan",
]

OnUnmatched: TypeAlias = Literal["error", "warn", "ignore"]


class UnmatchedRuleWarning(UserWarning):
    """A rule decided nothing and ``on_unmatched="warn"``."""


def plan(
    model: nn.Module,
    rules: RulesLike | None = None,
    *,
    on_unmatched: OnUnmatched = "error",
    check: bool = True,
    **fields: Unpack[RuleFields],
) -> Plan:
    """What ``apply`` with the same arguments would do, without doing it.

    Args:
        model: any module tree. It is only read.
        rules: see :func:`wn_surgery.apply`.
        on_unmatched: ``error``, ``warn`` or ``ignore`` a rule that decides nothing.
        check: raise when the plan cannot be carried out; ``False`` returns it with its
            problems, for printing.
        fields: the fields of one rule, in place of ``rules``.

    Raises:
        UnmatchedRuleError: a rule matches nothing; the message says which part of it
            failed and suggests near misses.
        WeightNormError: one of the other reasons in :mod:`wn_surgery.errors`.

    Example:
        >>> import wn_surgery as wn
        >>> from torch import nn
        >>> plan = wn.plan(nn.Sequential(nn.Linear(2, 3)), types=nn.Linear)
        >>> plan.steps
        [<Step 0.weight: apply, plain -> parametrized, dim=0>]
    """
    made = build(model, given_rules("plan", rules, fields), on_unmatched)
    if check:
        made.check()
    return made


@contextmanager
def _uncollected() -> Generator[None]:
    """Keep the cycle collector from slowing down large plans, which make no cycles.

    Each of its passes looks at everything made so far (benchmarks/plan.py).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def build(model: nn.Module, rules: tuple[Rule, ...], on_unmatched: OnUnmatched = "error") -> Plan:
    """The plan with its problems, whether or not it can be carried out."""
    if on_unmatched not in get_args(OnUnmatched):
        raise ValueError(f"on_unmatched={on_unmatched!r}; expected 'error', 'warn' or 'ignore'")
    nodes = _nodes(model)
    index = Index(nodes)
    made = Plan(model, rules, [], parameters=index.count)
    winning: set[int] = set()
    sound: _Sound = {}
    for found in match(nodes, rules):
        _, winners, _ = found
        winning.update(winners.values())
        if len(winners) > 1:
            made.problems += _conflicts(found, rules)
        _decide(made, found, sound)
    resolve_ties(made, index)
    # Checked after ties are resolved: a tied site that is skipped is never divided by its norm.
    # BERT's decoder is tied to embeddings whose padding is zero.
    made.problems += checks.before_division(_divided(made), in_parts=False)
    made.leftovers += _leftovers(nodes, rules)
    _report_unmatched(made, nodes, winning, on_unmatched)
    return made


def divided_in_parts(plan: Plan) -> list[WeightNormError]:
    """What :func:`build` leaves out, since every rank has to ask: what is wrong with DTensors."""
    return checks.before_division(_divided(plan), in_parts=True)


def _divided(plan: Plan) -> Iterator[tuple[Site, NormOptions, float | None]]:
    for step in plan.changes:
        if step.norm is not None and step.action != "migrate":
            yield step.site, step.norm, None if step.rule is None else step.rule.g_init


def _nodes(model: nn.Module) -> list[Node]:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"the model is a TorchScript module ({model.original_name}), whose parameters are "
            "fixed; change weight norm before torch.jit.script or torch.jit.trace"
        )
    return walk(model)


def _leftovers(nodes: list[Node], rules: tuple[Rule, ...]) -> Iterator[Site]:
    """Where a rule removes weight norm that is gone already, but for its load hook."""
    removes = any(rule.action == "remove" for rule in rules)
    for node in nodes if removes else ():
        for param in leftovers(node.module):
            # torch's removal makes a frozen weight a buffer, which is no site.
            site = Site(node, param, None, None)
            deciding = [rule for rule in rules if takes(rule, site)]
            if deciding and deciding[-1].action == "remove":
                yield site


def build_removal(model: nn.Module) -> Plan:
    """The plan of :func:`wn_surgery.remove` without rules: everything, and nothing else listed."""
    rule = Rule(action="remove", names="**", params="*")
    made = build(model, (rule,), "ignore")
    made.rules, made.steps = (), made.changes
    for step in made.steps:
        held = step.site.held
        step.why = "" if held is None else f"by {held.maker}"
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
                made.problems += checks.before_any_change(site)
                continue
            held = site.held
            if not isinstance(held, Normed) or held.layout not in of:
                continue
            there = held.layout == to and (to == "legacy" or held.maker == "wn_surgery")
            step = Step(site, "keep" if there else "migrate", to, held.norm, None)
            step.why = f"already {to}" if there else f"by {held.maker}"
            made.steps.append(step)
            if step.changes:
                made.problems += checks.before_any_change(site)
                made.problems += checks.before_migration(site, to)
    return made


_Sound: TypeAlias = dict[Hashable, NormOptions]
"""The options of weights that have been checked: models have many that are alike."""


def _decide(made: Plan, found: Match, sound: _Sound) -> None:
    site, _, numbers = found
    *others, last = numbers
    shadowed = tuple([index + 1 for index in others]) if others else ()
    rule, held = made.rules[last], site.held
    step = Step(site, "keep", site.layout, site.norm, rule, shadowed, f"rule {last + 1}")
    made.steps.append(step)
    if rule.action == "skip":
        step.action = "skip"
    elif rule.action == "remove":
        made.problems += _plan_removal(step)
    elif held is None:
        made.problems += _plan_application(step, rule, sound)
    elif isinstance(held, Normed):
        made.problems += _plan_replacement(step, rule, held)
    else:
        made.problems += _stacked(site, held)


def _plan_removal(step: Step) -> Iterator[WeightNormError]:
    site = step.site
    if site.normed:
        step.action, step.after, step.norm = "remove", "plain", None
        yield from checks.before_any_change(site)
    elif isinstance(site.held, Foreign) and "WeightNorm" in site.held.maker:
        yield from _stacked(site, site.held)
    elif _is_open(site):  # it only looks plain
        yield from checks.before_any_change(site)
    else:
        step.why += ", no weight norm here"


def _is_open(site: Site) -> bool:
    """Whether the parameter itself is inside ``folded`` or ``writable`` now."""
    return site.param in FOLDED.get(site.module, ())


def _plan_application(step: Step, rule: Rule, sound: _Sound) -> Iterable[WeightNormError]:
    step.action, step.after = "apply", "parametrized"
    site = step.site
    alike = checks.kind_of(site, rule)
    if alike in sound:
        step.norm = sound[alike]
        return checks.before_any_change(site)
    if problems := checks.before_apply(site):
        return problems
    norm = checks.resolve_norm(site, rule)
    if isinstance(norm, WeightNormError):
        return [norm]
    step.norm = norm
    problems = checks.before_norm(site, norm, rule)
    if alike is not None and not problems:
        sound[alike] = norm
    return problems


def _plan_replacement(step: Step, rule: Rule, held: Normed) -> list[WeightNormError]:
    site = step.site
    wanted = checks.resolve_norm(site, rule)
    if isinstance(wanted, WeightNormError):
        # Of a part, the axes are not those of the weight.
        return [*checks.before_any_change(site)] if in_parts(held.v) else [wanted]
    if wanted == held.norm and not _differs(rule, held):
        fills = rule.g_init is not None and rule.g_init != held.g_init
        step.why += ", already there" + (" (replace=True fills g)" if fills else "")
        return []
    if not rule.replace:
        frozen = "" if rule.train_g else ", train_g=False"
        if rule.renormalize != held.renormalize:
            frozen += f", renormalize={rule.renormalize}"
        message = (
            f"{site.name} already carries weight norm with {held.norm}; the rule asks "
            f"for {wanted}{frozen}; give the rule replace=True, or remove first"
        )
        return [checks.error_at(site, "existing", message)]
    problems = [*checks.before_any_change(site), *checks.before_norm(site, wanted, rule)]
    if not problems:
        step.action, step.after, step.norm = "replace", "parametrized", wanted
    return problems


def _differs(rule: Rule, held: Normed) -> bool:
    """Whether a g that is there, or what v is put back to, is not as the rule wants it.

    Without ``replace``, only a g that trains and should not: ``g_init`` is only where g began,
    and a frozen g may have been frozen since. With ``replace``, g is thawed and filled; but filled
    only once, so that the same rules given again do not undo a training.
    """
    if not rule.train_g and held.g.requires_grad:
        return True
    if rule.renormalize != held.renormalize and (rule.renormalize or rule.replace):
        return True
    thaws = rule.train_g and held.v.requires_grad and not held.g.requires_grad
    fills = rule.g_init is not None and rule.g_init != held.g_init
    return rule.replace and (thaws or fills)


def _stacked(site: Site, held: Foreign) -> Iterator[WeightNormError]:
    if site.holder:  # FSDP1 makes g and v of our own weight norm something else than Parameters
        yield from checks.before_any_change(site)
        return
    message = (
        f"{site.name} is computed by {held.maker}; weight norm cannot be put on it or taken out "
        "of it alone; remove the other parametrization first"
    )
    yield checks.error_at(site, "stacked", message)


def _conflicts(found: Match, rules: tuple[Rule, ...]) -> Iterator[WeightNormError]:
    site, winners, _ = found
    deciding = [rules[i] for i in winners.values()]
    if len({(rule.action, *rule.options().values()) for rule in deciding}) > 1:
        told = "; ".join(
            f"{path or '(root)'} by rule {i + 1} ({rules[i].describe()})"
            for path, i in winners.items()
        )
        message = (
            f"{site.name} is one shared module with conflicting rules under its names: {told}; let "
            f"the last rule match all of its names, e.g. with {{{','.join(site.node.paths)}}}"
        )
        yield checks.error_at(site, "names", message)


def _level_of_caller() -> int:
    """The stack level, seen from who asks, of the code that called this library."""
    level, frame = 1, sys._getframe(1)
    own = ("wn_surgery", "contextlib")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in own:
        level, frame = level + 1, frame.f_back
    return level


def _report_unmatched(
    made: Plan, nodes: list[Node], winning: set[int], on_unmatched: OnUnmatched
) -> None:
    for index, rule in enumerate(made.rules):
        if index in winning:
            continue
        unmatched = explain(index, made.rules, nodes)
        made.unmatched.append(unmatched)
        site = f"rule {unmatched.number}"
        message = f"{site} ({rule.describe()}) decides nothing: {unmatched.reason}"
        if on_unmatched == "error":
            made.problems.append(WeightNormError(message, kind=unmatched.kind, site=site))
        elif on_unmatched == "warn":
            warnings.warn(message, UnmatchedRuleWarning, stacklevel=_level_of_caller())
