"""What a conversion is asked to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from wn_surgery.checkpoints.pairs import Axes
from wn_surgery.errors import CheckpointError, RuleError
from wn_surgery.norm.naming import Layout
from wn_surgery.norm.options import NormOptions
from wn_surgery.rules.rule import Rule
from wn_surgery.rules.sources import RulesLike, as_rules

__all__ = ["Also", "Choice", "Layout", "Request"]

Also: TypeAlias = Literal["spectral_norm"]
Choice: TypeAlias = Literal["error", "keep"]
LAYOUTS = ("plain", "parametrized", "legacy")


@dataclass(frozen=True)
class Request:
    """What a conversion is asked to do; :func:`wn_surgery.checkpoints.convert` explains it."""

    to: Layout = "plain"
    rules: tuple[Rule, ...] | None = None
    ranks: frozenset[int] | None = None
    dim: Axes = "auto"
    also: frozenset[str] = frozenset()
    orphans: Choice = "error"
    non_finite: Choice = "error"
    known: Mapping[str, NormOptions] = field(default_factory=dict)  # from beside the checkpoint
    keep: frozenset[str] = frozenset()  # plain keys that stay weight-normed

    def __post_init__(self) -> None:
        if self.to not in LAYOUTS:
            raise CheckpointError(f"unknown layout {self.to!r}: expected {', '.join(LAYOUTS)}")
        if self.also - {"spectral_norm"}:
            raise CheckpointError(f"also={sorted(self.also)}: only 'spectral_norm' is known")
        if self.also and self.to != "plain":
            raise CheckpointError(f"also={sorted(self.also)} is for to='plain', not {self.to!r}")
        for name in ("orphans", "non_finite"):
            if (choice := getattr(self, name)) not in ("error", "keep"):
                raise CheckpointError(f"{name}={choice!r}: expected 'error' or 'keep'")
        if self.rules is not None and self.to == "plain":
            raise CheckpointError("rules put weight norm on: pass to='parametrized' or to='legacy'")
        if self.ranks is not None and self.rules is None:
            raise CheckpointError("ranks= narrows rules=, but there are no rules")

    @classmethod
    def of(
        cls,
        to: Layout,
        rules: RulesLike | None,
        ranks: Iterable[int] | None,
        dim: Axes,
        also: Also | Iterable[Also],
        orphans: Choice,
        non_finite: Choice,
    ) -> Request:
        """The request for the arguments that a user gave."""
        return cls(
            to,
            None if rules is None else _checked_rules(rules),
            None if ranks is None else frozenset(ranks),
            dim,
            frozenset((also,) if isinstance(also, str) else also),
            orphans,
            non_finite,
        )


def _checked_rules(rules: RulesLike) -> tuple[Rule, ...]:
    """Rules that need only names and shapes."""
    found = as_rules(rules)
    for rule in found:
        modules = {
            "types": rule.types is not None,
            "exclude_types": bool(rule.exclude_types),
            "where": rule.where is not None,
            "dim='out'": rule.dim == "out",
            "replace": rule.replace,
        }
        if lacking := next((name for name, asked in modules.items() if asked), None):
            said = f"{lacking} needs modules, a checkpoint has only tensors; use names and ranks"
        elif rule.action == "remove":
            said = "action='remove' is for models; convert a checkpoint to 'plain' without rules"
        elif (rule.g_init, rule.train_g, rule.renormalize) != (None, True, None):
            said = (
                "g_init, train_g and renormalize are about training; leave them out for a "
                "checkpoint"
            )
        else:
            continue
        raise RuleError(f"rule `{rule.describe()}`: {said}")
    return found
