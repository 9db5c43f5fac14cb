"""Carry a plan out: all of it, or none of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Unpack, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from wn_surgery.model import layouts
from wn_surgery.model.undo import UndoLog
from wn_surgery.norm.cuts import is_dtensor
from wn_surgery.norm.drafts import follow_initializer
from wn_surgery.norm.local_reads import follow_styles
from wn_surgery.norm.math import filled, magnitude
from wn_surgery.norm.slots import settle
from wn_surgery.rules.sources import Rule, RuleFields, RulesLike, given_rules
from wn_surgery.surgery.agreement import Ranks
from wn_surgery.surgery.optimizers import OptimizerChange, OptimizerEdit, Replacement
from wn_surgery.surgery.plan import Plan, Step
from wn_surgery.surgery.planning import (
    OnUnmatched,
    build,
    build_migration,
    build_removal,
    divided_in_parts,
)

__all__ = ["Report", "apply", "execute", "migrate", "remove"]


@dataclass(frozen=True)
class Report:
    """What was done, as data and as a table: ``print`` it.

    It holds no tensor and no module, so keeping it keeps no replaced weight alive.

    Attributes:
        changed: the names of the parameters that changed.
        steps: every matched site, as :meth:`wn_surgery.Step.to_dict` gives it.
        optimizers: what changed in the optimizers that were given.
        table: the table.
        leftovers: the parameters that had no weight norm, but its load hook, which is gone now.

    Example:
        >>> import wn_surgery as wn
        >>> from torch import nn
        >>> report = wn.apply(nn.Sequential(nn.Linear(2, 3)), "linears")
        >>> report, report.changed
        (<Report: 1 parameter changed>, ('0.weight',))
    """

    changed: tuple[str, ...]
    steps: tuple[dict[str, Any], ...]
    optimizers: tuple[OptimizerChange, ...]
    table: str
    leftovers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {
            "changed": list(self.changed),
            "steps": list(self.steps),
            "optimizers": [change.to_dict() for change in self.optimizers],
            "leftovers": list(self.leftovers),
        }

    def __repr__(self) -> str:
        count, others = len(self.changed), len(self.optimizers)
        optimizers = f", {others} optimizer{'' if others == 1 else 's'}" if others else ""
        left = len(self.leftovers)
        hooks = f", {left} load hook{'' if left == 1 else 's'}" if left else ""
        return f"<Report: {count} parameter{'' if count == 1 else 's'} changed{optimizers}{hooks}>"

    def __str__(self) -> str:
        return "\n".join([self.table, *map(str, self.optimizers)])

    if not TYPE_CHECKING:  # a type checker reports these itself

        def __call__(self, *_: object, **__: object) -> NoReturn:
            """Raise a TypeError that says how to use the model."""
            raise TypeError(f"a Report cannot be called{_IN_PLACE}")

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"a Report has no {name!r}{_IN_PLACE}", name=name, obj=self)


_IN_PLACE = (
    ": apply, remove and migrate change the model in place and return what they did; "
    "write `wn.apply(model, rules)` in place of `model = wn.apply(model, rules)`"
)


def apply(
    model: nn.Module,
    rules: RulesLike | None = None,
    *,
    optimizers: Optimizer | Iterable[Any] = (),
    on_unmatched: OnUnmatched = "error",
    **fields: Unpack[RuleFields],
) -> Report:
    """Put weight norm on the parameters that the rules match, in place; report what was done.

    The model's outputs stay as they are, bit for bit in float32 and float64, unless a rule
    gives ``g_init``. Applying the same rules again changes nothing.

    Args:
        model: any module tree.
        rules: a Rule, a list of rules or dicts, a path to YAML or JSON, or a preset's name; a
            class, or several, stands for one rule with these ``types``.
        optimizers: optimizers that hold the model's parameters; g and v take the weight's
            place in their groups. A single one need not be in a list.
        on_unmatched: ``error``, ``warn`` or ``ignore`` a rule that decides nothing.
        fields: the fields of one :class:`Rule`, in place of ``rules``.

    Raises:
        WeightNormError: see :mod:`wn_surgery.errors`; the model and the optimizers are
            then as they were.
        TypeError: both ``rules`` and fields of a rule are given, or neither.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> print(wn.apply(model, names="0", optimizers=[optimizer]).optimizers[0])
        SGD: 1 parameter -> 2 in group 0; nothing to reset
        >>> sorted(model.state_dict())[:3]  # doctest: +NORMALIZE_WHITESPACE
        ['0.bias', '0.parametrizations.weight.original0',
         '0.parametrizations.weight.original1']
    """

    def planned() -> Plan:
        return build(model, given_rules("apply", rules, fields), on_unmatched)

    return _carry_out("apply", model, planned, optimizers)


def remove(
    model: nn.Module,
    rules: RulesLike | None = None,
    *,
    optimizers: Optimizer | Iterable[Any] = (),
    on_unmatched: OnUnmatched = "error",
    **fields: Unpack[RuleFields],
) -> Report:
    """Make weight-normed parameters plain again, in place, bit for bit; report what was done.

    Every layout is removed, whoever applied it: this library, both of torch's functions,
    or a model's own method. So is the load hook that torch's ``remove_parametrizations`` leaves
    behind, with which no module can be pickled: see the report's ``leftovers``.

    Args:
        model: any module tree.
        rules: which parameters; all of them by default. ``apply`` rules are taken as
            ``remove``, so that the rules that were applied can be given again.
        optimizers: optimizers that hold g and v; the weight takes v's place.
        on_unmatched: ``error``, ``warn`` or ``ignore`` a rule that decides nothing.
        fields: the fields of one :class:`Rule`, in place of ``rules``.

    Raises:
        WeightNormError: see :mod:`wn_surgery.errors`; the model and the optimizers are
            then as they were.

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8))
        >>> weight = layer.weight.detach().clone()
        >>> report = wn.remove(layer)
        >>> type(layer) is torch.nn.Linear, torch.equal(layer.weight, weight)
        (True, True)
    """

    def planned() -> Plan:
        if rules is None and not fields:
            return build_removal(model)
        wanted = tuple(map(_removing, given_rules("remove", rules, fields)))
        return build(model, wanted, on_unmatched)

    return _carry_out("remove", model, planned, optimizers)


def _removing(rule: Rule) -> Rule:
    if rule.action != "apply":
        return rule
    kept = ("names", "types", "params", "where", "exclude_names", "exclude_types", "label")
    return Rule(action="remove", **{name: getattr(rule, name) for name in kept})


def migrate(model: nn.Module, *, to: Literal["parametrized", "legacy"] = "parametrized") -> Report:
    """Move every weight-normed parameter to another layout, in place; report what was done.

    g and v stay the same Parameter objects: outputs, gradients (to rounding, along axes that
    torch has no kernel for), ``requires_grad`` and optimizers are not affected. torch's own
    parametrizations become this library's, which can be pickled and copied.

    Args:
        model: any module tree.
        to: ``parametrized`` (``parametrizations.weight.original0/1``) or ``legacy``
            (``weight_g``, ``weight_v`` and torch's forward pre-hook).

    Raises:
        ValueError: ``to`` is something else.
        WeightNormError: a site cannot be stored that way; nothing has changed.

    Example:
        >>> import torch, warnings, wn_surgery as wn
        >>> with warnings.catch_warnings(action="ignore"):
        ...     layer = torch.nn.utils.weight_norm(torch.nn.Linear(4, 8))
        >>> print(wn.migrate(layer).steps[0]["why"])
        by torch
        >>> [name for name, _ in layer.named_parameters()]
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    if to not in ("parametrized", "legacy"):
        raise ValueError(
            f"migrate(to={to!r}): expected 'parametrized' or 'legacy'; "
            "to get plain weights, use remove()"
        )
    return _carry_out("migrate", model, lambda: build_migration(model, to), ())


def execute(plan: Plan, optimizers: Optimizer | Iterable[Any] = ()) -> Report:
    """Carry out a plan that was just made; if anything is raised, nothing has changed."""
    return _carry_out("execute", plan.model, lambda: plan, optimizers)


def _carry_out(
    verb: str, model: nn.Module, planned: Callable[[], Plan], optimizers: Optimizer | Iterable[Any]
) -> Report:
    ranks = Ranks(model)
    with ranks.agree(verb) as body:
        plan = planned()
        edit = OptimizerEdit(optimizers)
        plan.check()
        body.steps = plan.changes
    log = UndoLog()
    work = _Work(log)
    plan.problems += divided_in_parts(plan)
    work.compute_parts(plan.changes)
    try:
        with ranks.agree(verb) as body:
            plan.check()
            for step in plan.changes:
                body.at = step.site.name
                work.do(step)
            for site in plan.leftovers:
                log.record(site.module)
                layouts.drop_load_hooks(site.module, site.param)
            for step in plan.changes:
                layouts.refresh(step.site.module)
            changes = edit.replace(work.replacements)
    except BaseException:
        edit.rollback()
        log.rollback()
        raise
    if plan.changes:
        settle(plan.model)
        follow_initializer(plan.model)
        follow_styles(plan.model)
    return Report(
        tuple(step.site.name for step in plan.changes),
        tuple(step.to_dict() for step in plan.steps),
        tuple(changes),
        plan._table("changed"),
        tuple(site.name for site in plan.leftovers),
    )


class _Work:
    """Executes steps, giving tied ends the same tensors."""

    def __init__(self, log: UndoLog) -> None:
        self._log = log
        self._made: dict[Hashable, tuple[nn.Parameter, ...]] = {}
        self._computed: dict[int, _Values] = {}
        self.replacements: list[Replacement] = []

    def compute_parts(self, steps: Iterable[Step]) -> None:
        """Compute what ranks compute together, while no rank can have anything else to say."""
        for step in steps:
            if step.action != "migrate" and is_dtensor(step.site.tensor):
                self._computed[id(step)] = _values(step)

    def do(self, step: Step) -> None:
        """Change one site."""
        module, param, held = step.site.module, step.site.param, step.site.held
        self._log.record(module)
        if step.action == "migrate":
            assert isinstance(held, layouts.Normed)
            self._put(step, layouts.clear(module, param), held.g, held.v)
            layouts.note(module, param, held)
            return
        if isinstance(held, layouts.Normed):
            old: tuple[nn.Parameter, ...] = (held.g, held.v)
        else:
            old = (cast(nn.Parameter, module._parameters[param]),)
        # A tie that goes on gets its new tensors once, at its first end.
        key: Hashable = (step.action, *map(id, old))
        if step.group is not None:
            key = (step.action, step.group)
        elif step.action == "apply" or step.copies:
            key = (step.action, id(step))
        new = self._made[key] = self._made.get(key) or self._new(step)
        self.replacements.append(Replacement(step.site.name, old, new, step.leaves))
        order = layouts.clear(module, param)
        if step.action == "remove":
            layouts.put_plain(module, param, new[0], order)
        else:
            self._put(step, order, *new)
            layouts.note(module, param, step.rule)

    @staticmethod
    def _put(step: Step, order: Sequence[str], g: nn.Parameter, v: nn.Parameter) -> None:
        assert step.norm is not None
        put = layouts.put_legacy if step.after == "legacy" else layouts.put_parametrized
        put(step.site.module, step.site.param, step.norm, g, v, order)

    def _new(self, step: Step) -> tuple[nn.Parameter, ...]:
        held = step.site.held
        computed = self._computed.get(id(step)) or _values(step)
        weight = computed.weight
        if isinstance(held, layouts.Normed):
            weight = held.parameter(weight)
        assert isinstance(weight, nn.Parameter)
        if step.action == "remove":
            return (weight,)
        assert step.rule is not None and computed.g is not None
        v = weight.detach().clone() if step.copies else weight.detach()  # or in its memory
        direction = nn.Parameter(v, weight.requires_grad)
        layouts.hand_over(weight, direction)
        return nn.Parameter(computed.g, weight.requires_grad and step.rule.train_g), direction


class _Values(NamedTuple):
    """The weight of a step, and the g that it gets, if it gets one."""

    weight: Tensor
    g: Tensor | None = None


def _values(step: Step) -> _Values:
    held = step.site.held
    weight = held.computed() if isinstance(held, layouts.Normed) else step.site.tensor
    assert weight is not None  # nothing is planned for a site without a tensor
    if step.action == "remove":
        return _Values(weight)
    assert step.norm is not None and step.rule is not None
    g_init = step.rule.g_init
    if isinstance(held, layouts.Normed) and (held.g_init, held.norm) == (g_init, step.norm):
        g_init = None  # it is thawed, and has been filled before
    if g_init is None:
        return _Values(weight, magnitude(weight, *step.norm))
    return _Values(weight, filled(weight, step.norm.dim, g_init))
