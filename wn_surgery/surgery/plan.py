"""The plan: what would change in one model, and why, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import nn

from wn_surgery.errors import WeightNormError
from wn_surgery.model.layouts import Normed, SiteLayout
from wn_surgery.model.sites import Site
from wn_surgery.norm.math import g_shape
from wn_surgery.norm.options import NormOptions
from wn_surgery.rules.rule import Rule, is_universal
from wn_surgery.surgery.diagnosis import Unmatched
from wn_surgery.tables import render

__all__ = ["Plan", "Step"]

StepAction: TypeAlias = Literal["apply", "replace", "remove", "migrate", "keep", "skip"]


@dataclass(eq=False, slots=True)
class Step:
    """What happens to one site.

    Attributes:
        site: the parameter, as it is now.
        action: ``apply``, ``replace`` (other options), ``remove``, ``migrate`` (layout
            only), ``keep`` (already as asked) or ``skip`` (a rule says so).
        after: the layout it has afterwards.
        norm: the options it has afterwards; ``None`` for a plain parameter.
        rule: the rule that decided; ``None`` for a whole-model remove or migrate.
        shadowed: the numbers (from 1) of earlier rules that matched too.
        why: one line for the table.
        group: a key shared by the steps of tied parameters that stay tied.
        copies: whether a tied parameter is copied first, so that the tie ends.
        leaves: whether the Parameter itself stays at another end of the tie.
    """

    site: Site
    action: StepAction
    after: SiteLayout
    norm: NormOptions | None
    rule: Rule | None
    shadowed: tuple[int, ...] = ()
    why: str = ""
    group: Hashable | None = None
    copies: bool = False
    leaves: bool = False

    @property
    def changes(self) -> bool:
        """Whether the step changes the model."""
        return self.action not in ("keep", "skip")

    def __repr__(self) -> str:
        moved = f", {self.site.layout} -> {self.after}" if self.changes else ""
        norm = "" if self.norm is None else f", {self.norm}"
        return f"<Step {self.site.name}: {self.action}{moved}{norm}>"

    def to_dict(self) -> dict[str, Any]:
        """The step as plain JSON data."""
        norm = self.norm
        return {
            **self.site.to_dict(),
            "action": self.action,
            "after": self.after,
            "dim_after": None if norm is None else norm.dim,
            "eps_after": None if norm is None else norm.eps,
            "g_shape": None if norm is None else list(g_shape(self.site.shape, norm.dim)),
            "shadowed": list(self.shadowed),
            "why": self.why,
        }


@dataclass(eq=False)
class Plan:
    """The ordered steps that rules give on one model. ``print`` it to see them.

    Attributes:
        model: the model it was made for.
        rules: the rules, in order; the last one that matches a site decides.
        steps: one for each matched site.
        unmatched: rules that decide nothing, with the reason and suggestions.
        problems: why it cannot be carried out; empty for a plan that can.
        leftovers: parameters without weight norm whose module still has its load hook, which will
            be taken off; with torch's, no module can be pickled.
        parameters: the model's number of parameters now.

    Example:
        >>> import wn_surgery as wn
        >>> from torch import nn
        >>> print(wn.plan(nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU()), {"types": "Conv1d"}))
        site      layout                 dim  shape      g          why
        --------  ---------------------  ---  ---------  ---------  ------
        0.weight  plain -> parametrized  0    (4, 2, 3)  (4, 1, 1)  rule 1
        1 of 1 matched parameters change; 28 parameters -> 32 (g adds 4)
        rule 1: apply types=Conv1d
    """

    model: nn.Module = field(repr=False)
    rules: tuple[Rule, ...]
    steps: list[Step]
    unmatched: list[Unmatched] = field(default_factory=list)
    problems: list[WeightNormError] = field(default_factory=list)
    leftovers: list[Site] = field(default_factory=list)
    parameters: int = 0

    @property
    def changes(self) -> list[Step]:
        """The steps that change the model."""
        return [step for step in self.steps if step.changes]

    @property
    def added(self) -> int:
        """How many parameters the model gains; negative for removal."""
        total, seen = 0, set[Any]()  # groups, and the identities of their Parameters
        for step in self.changes:
            held, tensor = step.site.held, step.site.tensor
            assert tensor is not None  # a site that changes has a weight or a v
            if step.group in seen:
                if id(tensor) not in seen:  # another Parameter in the same memory, which goes
                    total -= tensor.numel()
                seen.add(id(tensor))
                continue
            if step.group is not None:
                seen |= {step.group, id(tensor)}
            if step.norm is not None:
                total += math.prod(g_shape(step.site.shape, step.norm.dim))
            if step.leaves:
                total += tensor.numel()
            elif isinstance(held, Normed):
                total -= held.g.numel()
        return total

    def check(self) -> None:
        """Raise the first problem, and name every site that has one of its kind.

        Raises:
            WeightNormError: the plan has problems.
        """
        if not self.problems:
            return
        first = self.problems[0]
        places = [str(problem.site) for problem in self.problems if problem.kind == first.kind]
        message = str(first)
        if len(places) > 1:
            more = f" and {len(places) - 6} more" if len(places) > 6 else ""
            message += f"\nThe same holds for {', '.join(places[1:6])}{more}."
        raise type(first)(message, site=first.site)

    def to_dict(self) -> dict[str, Any]:
        """The whole plan as plain JSON data."""
        return {
            "rules": [rule.describe() for rule in self.rules],
            "steps": [step.to_dict() for step in self.steps],
            "unmatched": [{"rule": each.number, "reason": each.reason} for each in self.unmatched],
            "problems": [
                {"error": type(p).__name__, "kind": p.kind, "site": p.site, "message": str(p)}
                for p in self.problems
            ],
            "leftovers": [site.name for site in self.leftovers],
            "parameters": self.parameters,
            "parameters_after": self.parameters + self.added,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __repr__(self) -> str:
        return (
            f"<Plan: {len(self.changes)} of {len(self.steps)} matched parameters change; "
            f"rules={len(self.rules)}, problems={len(self.problems)}>"
        )

    def __str__(self) -> str:
        return self._table("change")

    def _table(self, verb: str) -> str:
        lines = [render(_HEADERS, [_row(step) for step in self.steps])] if self.steps else []
        added = self.added
        gives = f"adds {added:,}" if added > 0 else f"gives back {-added:,}"
        lines.append(
            f"{len(self.changes)} of {len(self.steps)} matched parameters {verb}; "
            f"{self.parameters:,} parameters"
            + (f" -> {self.parameters + added:,} (g {gives})" if added else "")
        )
        if self.leftovers:
            count, names = len(self.leftovers), [site.name for site in self.leftovers[:6]]
            more = f" and {count - 6} more" if count > 6 else ""
            taken = "to take" if verb == "change" else "taken"
            lines.append(
                f"{count} load hook{'' if count == 1 else 's'} left behind by another removal, "
                f"{taken} off: {', '.join(names)}{more}"
            )
        lines += [_legend(number, rule) for number, rule in enumerate(self.rules, 1)]
        lines += [f"rule {u.number} decides nothing: {u.reason}" for u in self.unmatched]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


_HEADERS = ("site", "layout", "dim", "shape", "g", "why", "shadowed")


def _row(step: Step) -> tuple[str, ...]:
    layout, norm = step.site.layout, step.norm
    return (
        " = ".join(step.site.names),
        f"{layout} -> {step.after}" if step.changes else f"{layout} ({step.action})",
        "" if norm is None else str(norm.dim),
        str(step.site.shape),
        "" if norm is None else str(g_shape(step.site.shape, norm.dim)),
        step.why,
        ", ".join(f"rule {number}" for number in step.shadowed),
    )


def _legend(number: int, rule: Rule) -> str:
    origin = f" ({rule.label})" if rule.label else ""
    everything = ", which is everything that may be matched" if is_universal(rule) else ""
    return f"rule {number}: {rule.describe()}{everything}{origin}"
