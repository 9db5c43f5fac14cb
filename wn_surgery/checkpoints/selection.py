"""Rules on tensors: which plain ones of a checkpoint get weight norm."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from wn_surgery.checkpoints.pairs import Options, Shape
from wn_surgery.errors import ModelError, RuleError
from wn_surgery.rules.rule import Rule, has_axes, last_match
from wn_surgery.rules.sources import RulesLike, as_rules

__all__ = ["checked_rules", "select"]


def checked_rules(rules: RulesLike) -> tuple[Rule, ...]:
    """Rules that need nothing but names and shapes.

    Args:
        rules: anything that stands for rules (docs/rules.md).

    Returns:
        The rules.

    Raises:
        RuleError: one of them asks for what a checkpoint does not have: classes, a module for a
            predicate, the output channels of a layer, removal.

    Example:
        >>> from wn_surgery.checkpoints.selection import checked_rules
        >>> len(checked_rules([{"names": "decoder.**"}, {"names": "**.out", "action": "skip"}]))
        2
    """
    found = as_rules(rules)
    for rule in found:
        lacking = {
            "types": rule.types is not None,
            "exclude_types": bool(rule.exclude_types),
            "where": rule.where is not None,
            "dim='out'": rule.dim == "out",
            "replace": rule.replace,
        }
        for name, asked in lacking.items():
            if asked:
                raise RuleError(
                    f"rule `{rule.describe()}`: {name} needs modules, and a checkpoint has tensors "
                    "alone; use names, params and ranks, or build the model and call "
                    "wn_surgery.apply"
                )
        if rule.action == "remove":
            raise RuleError(
                f"rule `{rule.describe()}`: action='remove' is for models; convert a checkpoint "
                "to 'plain' without rules"
            )
        if rule.g_init is not None or not rule.train_g:
            raise RuleError(
                f"rule `{rule.describe()}`: g_init and train_g are about training; they would "
                "change the weights of a checkpoint, or be forgotten"
            )
    return found


def select(
    shapes: Mapping[str, Shape],
    rules: tuple[Rule, ...],
    ranks: Collection[int] | None = None,
) -> dict[str, Options]:
    """The tensors that rules match, and the options that they get.

    As on a model, a key is a module's path and a parameter's name, the last rule that matches
    wins, and tensors of fewer than two axes are matched only by their own name.

    Args:
        shapes: the shapes of the floating-point tensors by key.
        rules: what :func:`checked_rules` returned.
        ranks: how many axes a tensor may have; None for any number.

    Returns:
        Options by key.

    Raises:
        ModelError: a rule's dim is no axis of a tensor that it matches.

    Example:
        >>> import wn_surgery as wn
        >>> from wn_surgery.checkpoints.selection import select
        >>> list(select({"a.weight": (4, 2), "a.bias": (4,)}, (wn.Rule(names="a"),)))
        ['a.weight']
    """
    chosen: dict[str, Options] = {}
    for key, shape in shapes.items():
        path, _, param = key.rpartition(".")
        rule = last_match(rules, path, param, len(shape))
        if rule is None or rule.action == "skip":
            continue
        if ranks is not None and len(shape) not in ranks:
            continue
        chosen[key] = _options(rule, key, shape)
    return chosen


def _options(rule: Rule, key: str, shape: Shape) -> Options:
    dim: Any = rule.dim
    if not has_axes(len(shape), dim):
        raise ModelError(
            f"{key!r} {shape} has no axis {rule.dim}, which rule `{rule.describe()}` asks for; "
            "give another dim, or choose tensors by ranks=",
            kind="dim",
        )
    name = None if rule.norm_dtype is None else str(rule.norm_dtype).removeprefix("torch.")
    return Options(dim, rule.eps, name)
