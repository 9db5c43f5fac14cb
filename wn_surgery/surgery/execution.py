"""Carry a plan out: all of it, or none of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import Optimizer

from wn_surgery.model import layouts
from wn_surgery.model.undo import UndoLog
from wn_surgery.norm.drafts import follow_initializer
from wn_surgery.norm.math import g_shape, magnitude
from wn_surgery.norm.options import NormOptions
from wn_surgery.norm.slots import settle
from wn_surgery.rules.sources import Rule, RulesLike, as_rules
from wn_surgery.surgery.optimizers import OptimizerChange, OptimizerEdit, Replacement
from wn_surgery.surgery.plan import Plan, Step
from wn_surgery.surgery.planning import (
    OnUnmatched,
    build,
    build_migration,
    build_removal,
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

    Example:
        >>> import wn_surgery as wn
        >>> from torch import nn
        >>> report = wn.apply(nn.Sequential(nn.Linear(2, 3)), "linears")
        >>> report.changed
        ('0.weight',)
    """

    changed: tuple[str, ...]
    steps: tuple[dict[str, Any], ...] = field(repr=False)
    optimizers: tuple[OptimizerChange, ...]
    table: str = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {
            "changed": list(self.changed),
            "steps": list(self.steps),
            "optimizers": [change.to_dict() for change in self.optimizers],
        }

    def __str__(self) -> str:
        return "\n".join([self.table, *map(str, self.optimizers)])


def _report(plan: Plan, optimizers: Iterable[OptimizerChange]) -> Report:
    return Report(
        tuple(step.site.name for step in plan.changes),
        tuple(step.to_dict() for step in plan.steps),
        tuple(optimizers),
        str(plan).replace(" parameters change;", " parameters changed;"),
    )


def apply(
    model: nn.Module,
    rules: RulesLike,
    *,
    optimizers: Optimizer | Iterable[Any] = (),
    on_unmatched: OnUnmatched = "error",
) -> Report:
    """Put weight norm on the parameters that the rules match, in place.

    The model's outputs stay as they are, bit for bit in float32 and float64, unless a rule
    gives ``g_init``. Applying the same rules again changes nothing.

    Args:
        model: any module tree.
        rules: a Rule, a list of rules or dicts, a path to YAML or JSON, or a preset's name.
        optimizers: optimizers that hold the model's parameters; g and v take the weight's
            place in their groups. A single one need not be in a list.
        on_unmatched: ``error``, ``warn`` or ``ignore`` a rule that decides nothing.

    Returns:
        What was done.

    Raises:
        WeightNormError: see :mod:`wn_surgery.errors`; the model and the optimizers are
            then as they were.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> print(wn.apply(model, {"names": "0"}, optimizers=[optimizer]).optimizers[0])
        SGD: 1 parameter -> 2 in group 0; nothing to reset
        >>> sorted(model.state_dict())[:3]  # doctest: +NORMALIZE_WHITESPACE
        ['0.bias', '0.parametrizations.weight.original0',
         '0.parametrizations.weight.original1']
    """
    return execute(build(model, as_rules(rules), on_unmatched), optimizers)


def remove(
    model: nn.Module,
    rules: RulesLike | None = None,
    *,
    optimizers: Optimizer | Iterable[Any] = (),
    on_unmatched: OnUnmatched = "error",
) -> Report:
    """Make weight-normed parameters plain again, in place and bit for bit.

    Every layout is removed, whoever applied it: this library, both of torch's functions,
    or a model's own method.

    Args:
        model: any module tree.
        rules: which parameters; all of them by default. ``apply`` rules are taken as
            ``remove``, so that the rules that were applied can be given again.
        optimizers: optimizers that hold g and v; the weight takes v's place.
        on_unmatched: ``error``, ``warn`` or ``ignore`` a rule that decides nothing.

    Returns:
        What was done.

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
    if rules is None:
        return execute(build_removal(model), optimizers)
    return execute(build(model, tuple(map(_removing, as_rules(rules))), on_unmatched), optimizers)


def migrate(model: nn.Module, *, to: Literal["parametrized", "legacy"] = "parametrized") -> Report:
    """Move every weight-normed parameter to another layout, in place.

    g and v stay the same Parameter objects: outputs, gradients (to rounding, along axes that
    torch has no kernel for), ``requires_grad`` and optimizers are not affected. torch's own
    parametrizations become this library's, which can be pickled and copied.

    Args:
        model: any module tree.
        to: ``parametrized`` (``parametrizations.weight.original0/1``) or ``legacy``
            (``weight_g``, ``weight_v`` and torch's forward pre-hook).

    Returns:
        What was done.

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
    return execute(build_migration(model, to), ())


def execute(plan: Plan, optimizers: Optimizer | Iterable[Any] = ()) -> Report:
    """Carry out a plan on the model it was made for.

    Args:
        plan: what to do, just made: nothing is decided here.
        optimizers: see :func:`apply`.

    Returns:
        What was done.

    Raises:
        WeightNormError: the plan has problems. Whatever is raised, from wherever, the
            model and the optimizers are as they were.
    """
    edit = OptimizerEdit(optimizers)
    plan.check()
    log = UndoLog()
    work = _Work(log)
    try:
        for step in plan.changes:
            work.do(step)
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
    return _report(plan, changes)


class _Work:
    """Executes steps, giving tied ends the same tensors."""

    def __init__(self, log: UndoLog) -> None:
        self._log = log
        self._made: dict[Hashable, tuple[nn.Parameter, ...]] = {}
        self.replacements: list[Replacement] = []

    def do(self, step: Step) -> None:
        """Change one site."""
        module, param, held = step.site.module, step.site.param, step.site.held
        self._log.record(module)
        if step.action == "migrate":
            assert isinstance(held, layouts.Normed)
            self._put(step, layouts.clear(module, param), held.g, held.v)
            return
        old = self._old(step)
        # A tie that goes on gets its new tensors once, at its first end.
        key: Hashable = (step.action, *map(id, old))
        if step.group is not None:
            key = (step.action, step.group)
        elif step.action == "apply" or step.copies:
            key = (step.action, id(step))
        if key not in self._made:
            self._made[key] = self._new(step)
        new = self._made[key]
        self.replacements.append(Replacement(step.site.name, old, new, step.copies))
        order = layouts.clear(module, param)
        if step.action == "remove":
            layouts.put_plain(module, param, new[0], order)
        else:
            self._put(step, order, *new)

    @staticmethod
    def _put(step: Step, order: Sequence[str], g: nn.Parameter, v: nn.Parameter) -> None:
        assert step.norm is not None
        put = layouts.put_legacy if step.after == "legacy" else layouts.put_parametrized
        put(step.site.module, step.site.param, step.norm, g, v, order)
        if step.rule is not None and step.rule.g_init is not None:
            plist = cast(Any, step.site.module._modules["parametrizations"])[step.site.param]
            plist.g_init = step.rule.g_init

    @staticmethod
    def _old(step: Step) -> tuple[nn.Parameter, ...]:
        held = step.site.held
        if held is None:
            return (step.site.module._parameters[step.site.param],)  # type: ignore[return-value]
        assert isinstance(held, layouts.Normed)
        return held.g, held.v

    @staticmethod
    def _new(step: Step) -> tuple[nn.Parameter, ...]:
        held = step.site.held
        weight = held.weight() if isinstance(held, layouts.Normed) else step.site.tensor
        assert isinstance(weight, nn.Parameter)
        if step.action == "remove":
            return (weight,)
        assert step.norm is not None and step.rule is not None
        g_init = step.rule.g_init
        if isinstance(held, layouts.Normed) and (held.g_init, held.norm) == (g_init, step.norm):
            g_init = None  # it is thawed, and has been filled before
        return split(weight, step.norm, g_init, step.rule.train_g, step.copies)


def split(
    weight: nn.Parameter,
    norm: NormOptions,
    g_init: float | None = None,
    train_g: bool = True,
    copies: bool = False,
) -> tuple[nn.Parameter, nn.Parameter]:
    """The g and v for a weight; v shares its memory unless ``copies``."""
    direction = weight.detach().clone() if copies else weight.detach()
    if g_init is None:
        g = magnitude(weight, *norm)
    else:
        real = weight.dtype.to_real() if weight.dtype.is_complex else weight.dtype
        shape = g_shape(weight.shape, norm.dim)
        g = torch.full(shape, g_init, dtype=real, device=weight.device)
    v = nn.Parameter(direction, weight.requires_grad)
    layouts.hand_over(weight, v)
    return nn.Parameter(g, weight.requires_grad and train_g), v


def _removing(rule: Rule) -> Rule:
    if rule.action != "apply":
        return rule
    return Rule(
        action="remove",
        names=rule.names,
        types=rule.types,
        params=rule.params,
        where=rule.where,
        exclude_names=rule.exclude_names,
        exclude_types=rule.exclude_types,
        label=rule.label,
    )
