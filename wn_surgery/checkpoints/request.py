"""What a conversion is to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from wn_surgery.checkpoints.pairs import Axes, Options
from wn_surgery.checkpoints.selection import checked_rules
from wn_surgery.errors import CheckpointError
from wn_surgery.rules.rule import Rule
from wn_surgery.rules.sources import RulesLike

__all__ = ["LAYOUTS", "Also", "Choice", "Layout", "Request", "request", "unmatched"]

Layout: TypeAlias = Literal["plain", "parametrized", "legacy"]
Also: TypeAlias = Literal["spectral_norm"]
Choice: TypeAlias = Literal["error", "keep"]
LAYOUTS = ("plain", "parametrized", "legacy")


@dataclass(frozen=True)
class Request:
    """What a conversion is to do, checked.

    Attributes:
        to: the layout.
        rules: for plain tensors that get weight norm; None for none.
        ranks: how many axes those may have.
        dim: the axes where g's shape is ambiguous.
        also: other norms to strip.
        orphans: ``"error"``, or ``"keep"`` for halves of pairs.
        non_finite: ``"error"``, or ``"keep"`` for weights that are not numbers.
        known: options by plain key, from beside the checkpoint.
        keep: plain keys that stay weight-normed.
    """

    to: Layout
    rules: tuple[Rule, ...] | None = None
    ranks: frozenset[int] | None = None
    dim: Axes = "auto"
    also: frozenset[Also] = frozenset()
    orphans: Choice = "error"
    non_finite: Choice = "error"
    known: Mapping[str, Options] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()


def request(
    to: Layout = "plain",
    rules: RulesLike | None = None,
    ranks: Iterable[int] | None = None,
    dim: Axes = "auto",
    also: Also | Iterable[Also] = (),
    orphans: Choice = "error",
    non_finite: Choice = "error",
) -> Request:
    """Check the arguments of :func:`convert`, which has the documentation.

    Raises:
        CheckpointError: an argument is unknown, or contradicts another.
        RuleError: a rule needs modules.
    """
    if to not in LAYOUTS:
        raise CheckpointError(f"unknown layout {to!r}: expected one of {', '.join(LAYOUTS)}")
    others: frozenset[Also] = frozenset((also,) if isinstance(also, str) else also)
    if others - {"spectral_norm"}:
        raise CheckpointError(f"also={sorted(others)}: only 'spectral_norm' is known")
    if others and to != "plain":
        raise CheckpointError(f"also={sorted(others)} is for to='plain', not {to!r}")
    for name, choice in (("orphans", orphans), ("non_finite", non_finite)):
        if choice not in ("error", "keep"):
            raise CheckpointError(f"{name}={choice!r}: expected 'error' or 'keep'")
    if rules is not None and to == "plain":
        raise CheckpointError("rules put weight norm on: say to='parametrized' or to='legacy'")
    if ranks is not None and rules is None:
        raise CheckpointError("ranks= narrows rules=, and there are none")
    return Request(
        to,
        None if rules is None else checked_rules(rules),
        None if ranks is None else frozenset(ranks),
        dim,
        others,
        orphans,
        non_finite,
    )


def unmatched(asked: Request) -> str:
    """The message for rules that match no tensor."""
    said = "; ".join(rule.describe() for rule in asked.rules or ())
    ranks = "" if asked.ranks is None else f" with ranks={sorted(asked.ranks)}"
    return (
        f"no plain tensor of the checkpoint matches `{said}`{ranks}; names are patterns over a "
        "key without its last part, which is for params: 'decoder.*' for 'decoder.0.weight'"
    )
