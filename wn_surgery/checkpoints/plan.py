"""What becomes of each key of a state dict: decided once, from names, shapes and dtypes.

:mod:`wn_surgery.checkpoints.convert` carries a plan out in memory, and
:mod:`wn_surgery.checkpoints.streaming` from file to file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from wn_surgery.checkpoints.pairs import Pair, Shape, find_pairs
from wn_surgery.checkpoints.request import Request
from wn_surgery.checkpoints.spectral import find_spectral
from wn_surgery.errors import CheckpointError, ModelError, UnmatchedRuleError
from wn_surgery.norm.math import g_shape, real_dtype
from wn_surgery.norm.naming import keys_for
from wn_surgery.norm.options import NormOptions, dtype_name
from wn_surgery.rules.rule import has_axes, last_match

__all__ = ["Kind", "Line", "Plan", "plan", "refuse_unused_rules", "unfoldable"]

Kind: TypeAlias = torch.dtype | torch.layout | str
"""The dtype of a dense tensor, the layout of another one, or the name of a dtype torch lacks."""


@dataclass(frozen=True)
class Line:
    """One tensor of the output, and the keys of what it is made of.

    ``do`` says how: ``"copy"`` one tensor, perhaps in another shape; ``"fold"`` a g and a v; divide
    a weight by its ``"spectral"`` norm, given u and v; take the ``"magnitude"`` of a weight.
    """

    key: str
    do: Literal["copy", "fold", "spectral", "magnitude"]
    sources: tuple[str, ...]
    shape: Shape
    kind: Kind
    options: NormOptions = NormOptions()  # noqa: RUF009 - it is frozen


@dataclass(frozen=True)
class Plan:
    """What becomes of each key; the plain keys are those of ``Converted`` in ``files``."""

    lines: dict[str, tuple[Line, ...]]  # by the key in whose place they are, in the source's order
    weights: tuple[str, ...]
    spectral: tuple[str, ...]
    kept_spectral: tuple[str, ...]
    kept: tuple[str, ...]


def plan(
    shapes: Mapping[str, Shape],
    kinds: Mapping[str, Kind],
    asked: Request,
    known: Mapping[str, NormOptions],
    others: Iterable[Any] = (),
) -> Plan:
    """Decide what becomes of each tensor.

    ``others`` are the keys that everything else in the state dict will have.
    """
    lines: dict[str, tuple[Line, ...]] = {
        key: (Line(key, "copy", (key,), shapes[key], kinds[key]),) for key in shapes
    }
    pairs = find_pairs(shapes, dim=asked.dim, known=known, orphans=asked.orphans)
    spectral = find_spectral(shapes)
    taken = {part for pair in pairs for part in (pair.g, pair.v)}
    taken |= {part for one in spectral for part in one.parts}
    changed = [pair for pair in pairs if pair.weight not in asked.keep]
    for pair in changed:
        lines |= _of_pair(pair, shapes, kinds, asked)
    strip = "spectral_norm" in asked.also
    for one in spectral if strip else ():
        shape, kind = shapes[one.original], kinds[one.original]
        lines |= dict.fromkeys(one.parts, ())
        lines[one.original] = (Line(one.weight, "spectral", one.parts, shape, kind),)
    chosen = {
        key: options
        for key, shape in shapes.items()
        if key not in taken
        and ".parametrizations." not in f".{key}"
        and _computable(kinds[key], complex_too=True)
        and (options := _chosen(key, shape, asked)) is not None
    }
    for key, options in chosen.items():
        shape, kind = shapes[key], kinds[key]
        assert isinstance(kind, torch.dtype)
        real = real_dtype(kind)
        g, v = keys_for(key, asked.to)
        magnitude = Line(g, "magnitude", (key,), g_shape(shape, options.dim), real, options)
        lines[key] = (magnitude, Line(v, "copy", (key,), shape, kind))
    keys = Counter([line.key for place in lines.values() for line in place])
    keys.update(others)
    if (twice := next((key for key, count in keys.items() if count > 1), None)) is not None:
        raise CheckpointError(f"two tensors would be called {twice!r}; rename one of them")
    normed = tuple(one.weight for one in spectral)
    return Plan(
        lines,
        weights=(*(pair.weight for pair in changed), *chosen),
        spectral=normed if strip else (),
        kept_spectral=() if strip else normed,
        kept=tuple(pair.weight for pair in pairs if pair.weight in asked.keep),
    )


def refuse_unused_rules(asked: Request, plans: Iterable[Plan]) -> None:
    """Raise :class:`UnmatchedRuleError` if rules match no tensor of all that were planned."""
    if asked.rules is None or any(each.weights for each in plans):
        return
    said = "; ".join(rule.describe() for rule in asked.rules)
    ranks = "" if asked.ranks is None else f" with ranks={sorted(asked.ranks)}"
    raise UnmatchedRuleError(
        f"no plain tensor of the checkpoint matches `{said}`{ranks}; names are patterns over a "
        "key without its last part, which is for params: 'decoder.*' for 'decoder.0.weight'"
    )


def unfoldable(g: Kind, v: Kind) -> str:
    """Why a g and a v have no weight, after "g and v"; empty where they have one."""
    names = [kind if isinstance(kind, str) else dtype_name(kind) for kind in (g, v)]
    said = f"are {' and '.join(names)}: expected"
    if torch.layout in (type(g), type(v)):
        return f"{said} dense tensors"
    if _computable(g, complex_too=False) and _computable(v, complex_too=True):
        return ""
    return (
        f"{said} floating-point ones of 16 bits or more; was the checkpoint quantized before its "
        "weight norm was stripped?"
    )


def _computable(kind: Kind, *, complex_too: bool) -> bool:
    # 8 bits of floating point are storage, with scales elsewhere that this library does not know.
    return isinstance(kind, torch.dtype) and (
        (kind.is_floating_point and kind.itemsize > 1) or (complex_too and kind.is_complex)
    )


def _of_pair(
    pair: Pair, shapes: Mapping[str, Shape], kinds: Mapping[str, Kind], asked: Request
) -> dict[str, tuple[Line, ...]]:
    g, v = shapes[pair.g], shapes[pair.v]
    if asked.to == "plain":
        if said := unfoldable(kinds[pair.g], kinds[pair.v]):
            raise CheckpointError(f"g and v of {pair.weight!r} {said}")
        # The weight takes v's place: it has v's size, while g may be in another file.
        weight = Line(pair.weight, "fold", (pair.g, pair.v), v, kinds[pair.v], pair.options)
        return {pair.g: (), pair.v: (weight,)}
    g_key, v_key = keys_for(pair.weight, asked.to)
    # torch does not read a g of one axis beside a v of several.
    g = g_shape(v, pair.dim) if len(g) == 1 < len(v) else g
    return {
        pair.g: (Line(g_key, "copy", (pair.g,), g, kinds[pair.g]),),
        pair.v: (Line(v_key, "copy", (pair.v,), v, kinds[pair.v]),),
    }


def _chosen(key: str, shape: Shape, asked: Request) -> NormOptions | None:
    """The options that the rules give to a plain tensor; None where they do not choose it.

    As on a model, a key is a module's path and a parameter's name, the last rule that matches
    wins, and tensors of fewer than two axes are matched only by their own name.
    """
    path, _, param = key.rpartition(".")
    rule = last_match(asked.rules or (), path, param, len(shape))
    if rule is None or rule.action == "skip":
        return None
    if asked.ranks is not None and len(shape) not in asked.ranks:
        return None
    dim: Any = rule.dim
    if not has_axes(len(shape), dim):
        raise ModelError(
            f"{key!r} {shape} has no axis {rule.dim}, which rule `{rule.describe()}` asks for; "
            "give another dim, or choose tensors by ranks=",
            kind="dim",
        )
    return NormOptions(dim, rule.eps, rule.norm_dtype)
