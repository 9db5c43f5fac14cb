"""Finding g and v by the names and shapes of tensors, without a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from wn_surgery.errors import CheckpointError
from wn_surgery.norm.naming import NormedLayout, Part, keys_for, part_of
from wn_surgery.norm.options import Dim, NormOptions, kept_axes

__all__ = ["Axes", "Pair", "PairProblem", "Shape", "axes_of", "examine", "find_pairs"]

Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = "Dim | Literal['auto']"

_OTHERS = re.compile(r"(?P<stem>(?:.*\.)?parametrizations\.[^.]+)\.(?P<rest>.+)", re.DOTALL)
_ORIGINALS = frozenset({"original0", "original1"})


@dataclass(frozen=True)
class Pair:
    """One weight-normed tensor.

    Attributes:
        weight: its key in the plain layout.
        layout: ``"legacy"`` or ``"parametrized"``.
        g: the key of the magnitude.
        v: the key of the direction.
        options: the axes; eps and norm_dtype where a record beside the tensors has them.
    """

    weight: str
    layout: NormedLayout
    g: str
    v: str
    options: NormOptions

    @property
    def dim(self) -> Dim:
        """The axes that keep a norm of their own."""
        return self.options.dim


@dataclass(frozen=True)
class PairProblem:
    """What keeps a tensor from being read: ``key`` names it, ``message`` says what to do."""

    kind: str  # "orphan", "shape", "ambiguous", "stacked", "twice" or "record"
    key: str
    message: str


def axes_of(g: Shape, v: Shape) -> list[Dim]:
    """Every reading of g's shape, the usual one first; empty where g is not v's magnitude.

    There are several only if they differ in the bits or, for a g of one axis beside a v of
    several, in the weight itself.
    """
    if g == ():
        return [None]
    if len(g) == 1 and len(v) > 1:
        fitting: list[Dim] = [axis for axis, size in enumerate(v) if size == g[0]]
        return fitting or ([None] if g == (1,) else [])
    if len(g) != len(v) or any(a not in (1, b) for a, b in zip(g, v, strict=True)):
        return []
    kept = tuple(axis for axis, size in enumerate(g) if size != 1)
    if kept:
        return [kept[0] if len(kept) == 1 else kept]
    return [axis for axis, size in enumerate(v) if size == 1] or [None]


def find_pairs(
    shapes: Mapping[str, Shape],
    *,
    dim: Axes = "auto",
    known: Mapping[str, NormOptions] | None = None,
    orphans: Literal["error", "keep"] = "error",
) -> list[Pair]:
    """The pairs that :func:`examine` finds; the first problem is raised."""
    pairs, problems = examine(shapes, dim=dim, known=known)
    for problem in problems:
        if problem.kind != "orphan" or orphans == "error":
            raise CheckpointError(problem.message)
    return pairs


def examine(
    shapes: Mapping[str, Shape],
    *,
    dim: Axes = "auto",
    known: Mapping[str, NormOptions] | None = None,
) -> tuple[list[Pair], list[PairProblem]]:
    """Every pair that can be read, and what keeps the others from being read.

    ``dim`` has the axes to take where g's shape can be read in two ways; ``"auto"`` takes those
    that the pairs with only one reading have, if they agree. ``known`` has the options by plain
    key, from a record beside the tensors.
    """
    candidates = _candidates(shapes)
    problems = list(_orphans(shapes, candidates))
    readings: dict[tuple[str, NormedLayout], tuple[str, str, list[Dim]]] = {}
    for key, halves in candidates.items():
        if len(halves) == 2:
            g, v = halves["g"], halves["v"]
            dims = axes_of(shapes[g], shapes[v])
            if not _weight_like(key[0]) and not (dims and len(shapes[g]) == len(shapes[v]) > 1):
                continue  # `gate_g` and `gate_v` are names as good as any other
            if dims:
                readings[key] = (g, v, dims)
                continue
            message = (
                f"{g!r} {shapes[g]} is not a magnitude of {v!r} {shapes[v]}: its size must be that "
                "of v or 1 along each axis; one of the two is from another model"
            )
            problems.append(PairProblem("shape", g, message))
    mixed = {problem.key: problem for problem in _mixtures(shapes, readings)}
    problems += mixed.values()
    alone = {dims[0] for _, _, dims in readings.values() if len(dims) == 1}
    usual: Axes = next(iter(alone)) if len(alone) == 1 else "auto"
    pairs: list[Pair] = []
    for (weight, layout), (g, v, dims) in readings.items():
        if weight in mixed:
            continue
        fitting = f"dim={' or '.join(map(str, dims))}"
        if known and weight in known:
            options = known[weight]
            kind, clear = "record", _fits(options.dim, dims, shapes[v])
            message = (
                f"{weight!r} has dim={options.dim} in the record beside its tensors, but its g "
                f"fits {fitting}; the record is of another checkpoint"
            )
        else:
            wanted: Any = usual if dim == "auto" else dim
            options = NormOptions(wanted if wanted in dims else dims[0])
            # Axes of size 1 give one weight, up to the order of a sum; a g of one axis does not.
            same_ranks = len(shapes[g]) == len(shapes[v])
            kind, clear = "ambiguous", len(dims) == 1 or wanted in dims or same_ranks
            message = f"{g!r} {shapes[g]} fits several axes of {v!r} {shapes[v]}: pass {fitting}"
        if clear:
            pairs.append(Pair(weight, layout, g, v, options))
        else:
            problems.append(PairProblem(kind, weight, message))
    return pairs, problems


def _fits(recorded: Dim, dims: list[Dim], v: Shape) -> bool:
    """Whether the axes of a record are a reading of g's shape."""
    kept = kept_axes(recorded)
    readings = [kept_axes(one) for one in dims]
    # A kept axis of size 1 does not show in g's shape.
    seen = tuple(axis for axis in kept if axis < len(v) and v[axis] != 1)
    return kept in readings or (seen in readings if seen else bool(kept and v))


def _candidates(shapes: Mapping[str, Shape]) -> dict[tuple[str, NormedLayout], dict[str, str]]:
    """The keys of g and v, or of one of them, by the weight and the layout that they name."""
    halves: dict[tuple[str, NormedLayout], dict[str, str]] = {}
    for name in shapes:
        match part_of(name):
            # A v beside an orig is torch's spectral norm, whatever else is there.
            case Part(weight, layout, part) if layout != "legacy" or f"{weight}_orig" not in shapes:
                halves.setdefault((weight, layout), {})[part] = name
    return halves


def _weight_like(weight: str) -> bool:
    return "weight" in weight.rpartition(".")[2] or ".parametrizations." in weight


def _orphans(
    shapes: Mapping[str, Shape], candidates: Mapping[tuple[str, NormedLayout], dict[str, str]]
) -> Iterator[PairProblem]:
    for (weight, layout), halves in candidates.items():
        # Low-rank factors are called weight_u and weight_v.
        other = not _weight_like(weight) or f"{weight}_u" in shapes
        if len(halves) == 2 or (layout == "legacy" and other):
            continue
        ((part, name),) = halves.items()
        missing = keys_for(weight, layout)[part == "g"]
        message = (
            f"{name!r} is there without {missing!r}: half of a weight-normed tensor is lost; take "
            "it from another copy of the checkpoint, or pass orphans='keep' to keep what is there"
        )
        yield PairProblem("orphan", name, message)


def _mixtures(
    shapes: Mapping[str, Shape], found: Mapping[tuple[str, NormedLayout], object]
) -> Iterator[PairProblem]:
    stacked = {
        other["stem"]
        for name in shapes
        if (other := _OTHERS.fullmatch(name)) and other["rest"] not in _ORIGINALS
    }
    for weight, layout in found:
        kind = "twice"
        if weight in shapes:
            said = "is there beside its own g and v; delete the one that is stale"
        elif layout == "legacy":
            continue
        elif keys_for(weight, layout)[0].rpartition(".")[0] in stacked:
            kind = "stacked"
            said = "has another parametrization besides weight norm; remove that in its model first"
        elif (weight, "legacy") in found:
            said = "is there in both layouts, as after an interrupted migration; delete one of them"
        else:
            continue
        yield PairProblem(kind, weight, f"{weight!r} {said}")
