"""Finding g and v by the names and shapes of tensors, without a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from wn_surgery.errors import CheckpointError
from wn_surgery.norm.math import Dim

__all__ = ["Options", "Pair", "Problem", "Shape", "axes_of", "examine", "find_pairs", "keys_for"]

Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = "Dim | Literal['auto']"

_LEGACY = re.compile(r"(?:(?P<prefix>.*)\.)?(?P<param>[^.]+)_(?P<part>[gv])", re.DOTALL)
_PARAMETRIZED = re.compile(
    r"(?:(?P<prefix>.*)\.)?parametrizations\.(?P<param>[^.]+)\.original(?P<part>[01])", re.DOTALL
)
_OTHERS = re.compile(r"(?P<stem>(?:.*\.)?parametrizations\.[^.]+)\.(?P<rest>.+)", re.DOTALL)
_ORIGINALS = frozenset({"original0", "original1"})


@dataclass(frozen=True)
class Options:
    """What names and shapes do not tell.

    Attributes:
        dim: the axes that keep a norm of their own, as in ``wn_surgery.norm``.
        eps: lower clamp of the norm.
        norm_dtype: the name of the dtype that norms are computed in; None for v's own.
    """

    dim: Dim = 0
    eps: float = 0.0
    norm_dtype: str | None = None


@dataclass(frozen=True)
class Pair:
    """One weight-normed tensor.

    Attributes:
        weight: its key in the plain layout.
        layout: ``"legacy"`` or ``"parametrized"``.
        g: the key of the magnitude.
        v: the key of the direction.
        options: the axes; eps and norm_dtype where a record beside the tensors says them.
    """

    weight: str
    layout: str
    g: str
    v: str
    options: Options

    @property
    def dim(self) -> Dim:
        """The axes that keep a norm of their own."""
        return self.options.dim


@dataclass(frozen=True)
class Problem:
    """Something that keeps a tensor from being read.

    Attributes:
        kind: ``"orphan"``, ``"shape"``, ``"ambiguous"``, ``"stacked"``, ``"twice"`` or
            ``"record"``.
        key: the tensor.
        message: a sentence that names it and says what to do.
    """

    kind: str
    key: str
    message: str


def keys_for(weight: str, layout: str) -> tuple[str, str]:
    """The keys of g and v for the key of a weight.

    Args:
        weight: the plain key.
        layout: ``"legacy"`` or ``"parametrized"``.

    Returns:
        The two keys, g first.

    Example:
        >>> from wn_surgery.checkpoints.pairs import keys_for
        >>> keys_for("a.weight", "parametrized")[0]
        'a.parametrizations.weight.original0'
    """
    if layout == "legacy":
        return f"{weight}_g", f"{weight}_v"
    prefix, dot, param = weight.rpartition(".")
    stem = f"{prefix}{dot}parametrizations.{param}.original"
    return f"{stem}0", f"{stem}1"


def axes_of(g: Shape, v: Shape) -> list[Dim]:
    """Every reading of g's shape, the usual one first; empty where g is not v's magnitude.

    Args:
        g: the shape of the magnitude.
        v: the shape of the direction.

    Returns:
        Axes as in ``wn_surgery.norm``. More than one only if they differ in the bits or, for a
        g of one axis beside a v of several, in the weight itself.

    Example:
        >>> from wn_surgery.checkpoints.pairs import axes_of
        >>> axes_of((64, 1, 1), (64, 32, 7)), axes_of((), (64, 32)), axes_of((8,), (8, 8))
        ([0], [None], [0, 1])
    """
    if g == ():
        return [None]
    if len(g) == 1 and len(v) > 1:
        fitting: list[Dim] = [axis for axis, size in enumerate(v) if size == g[0]]
        return fitting or ([None] if g == (1,) else [])
    if len(g) != len(v) or any(a not in (1, b) for a, b in zip(g, v, strict=True)):
        return []
    kept = tuple(axis for axis, size in enumerate(g) if size != 1)
    if len(kept) == 1:
        return [kept[0]]
    if kept:
        return [kept]
    return [axis for axis, size in enumerate(v) if size == 1] or [None]


def find_pairs(
    shapes: Mapping[str, Shape],
    *,
    dim: Axes = "auto",
    known: Mapping[str, Options] | None = None,
    orphans: Literal["error", "keep"] = "error",
) -> list[Pair]:
    """The weight-normed tensors of a state dict.

    Args:
        shapes: the shape of every tensor by its key.
        dim: the axes to take where g's shape can be read in two ways; ``"auto"`` takes those
            that the pairs with only one reading have, if they agree.
        known: options by plain key, from a record beside the tensors.
        orphans: whether a g without its v, or a v without its g, is an error.

    Returns:
        In the order of the keys.

    Raises:
        CheckpointError: g and v do not fit, one of them is missing, another parametrization is
            stacked on them, the weight is there a second time, or the axes are ambiguous.

    Example:
        >>> from wn_surgery.checkpoints.pairs import find_pairs
        >>> find_pairs({"a.weight_g": (3, 1), "a.weight_v": (3, 2)})[0].weight
        'a.weight'
    """
    pairs, problems = examine(shapes, dim=dim, known=known)
    for problem in problems:
        if problem.kind != "orphan" or orphans == "error":
            raise CheckpointError(problem.message)
    return pairs


def examine(
    shapes: Mapping[str, Shape],
    *,
    dim: Axes = "auto",
    known: Mapping[str, Options] | None = None,
) -> tuple[list[Pair], list[Problem]]:
    """Every pair that can be read, and what stands against the others.

    Args:
        shapes: as in :func:`find_pairs`.
        dim: as in :func:`find_pairs`.
        known: as in :func:`find_pairs`.

    Returns:
        The pairs and the problems.

    Example:
        >>> from wn_surgery.checkpoints.pairs import examine
        >>> examine({"a.weight_v": (3, 2), "b.weight_v": (2,), "b.weight_orig": (3, 2)})[1][0].key
        'a.weight_v'
    """
    problems = list(_orphans(shapes))
    readings: dict[tuple[str, str], tuple[str, str, list[Dim]]] = {}
    for key, halves in _candidates(shapes).items():
        if len(halves) == 2:
            g, v = halves["g"], halves["v"]
            dims = axes_of(shapes[g], shapes[v])
            if not _weight_like(key[0]) and not (dims and len(shapes[g]) == len(shapes[v]) > 1):
                continue  # `gate_g` and `gate_v` are names as good as any other
            if not dims:
                problems.append(_misfit(g, shapes[g], v, shapes[v]))
                continue
            readings[key] = (g, v, dims)
    mixed = {problem.key: problem for problem in _mixtures(shapes, readings)}
    problems += mixed.values()
    clear = Counter(dims[0] for _, _, dims in readings.values() if len(dims) == 1)
    usual = next(iter(clear)) if len(clear) == 1 else None
    pairs: list[Pair] = []
    for (weight, layout), (g, v, dims) in readings.items():
        if weight in mixed:
            continue
        chosen = _choose(weight, (g, shapes[g]), (v, shapes[v]), dims, dim, usual, known or {})
        if isinstance(chosen, Problem):
            problems.append(chosen)
        else:
            pairs.append(Pair(weight, layout, g, v, chosen))
    return pairs, problems


def _choose(
    weight: str,
    g: tuple[str, Shape],
    v: tuple[str, Shape],
    dims: list[Dim],
    dim: Axes,
    usual: Any,
    known: Mapping[str, Options],
) -> Options | Problem:
    recorded = known.get(weight)
    if recorded is not None:
        return _checked(weight, recorded, dims, v[1])
    if len(dims) == 1:
        return Options(dims[0])
    wanted = usual if dim == "auto" else dim
    # Axes of size 1 give one weight, up to the order of a sum; a g of one axis does not.
    harmless = len(g[1]) == len(v[1])
    if wanted in dims and (harmless or dim != "auto" or usual is not None):
        return Options(next(one for one in dims if one == wanted))
    if harmless:
        return Options(dims[0])
    return Problem(
        "ambiguous",
        weight,
        f"{g[0]!r} {g[1]} fits several axes of {v[0]!r} {v[1]}: "
        f"say which it is, dim={' or '.join(map(str, dims))} (--dim)",
    )


def _checked(weight: str, recorded: Options, dims: list[Dim], v: Shape) -> Options | Problem:
    kept = recorded.dim if isinstance(recorded.dim, tuple) else (recorded.dim,)
    ones = tuple(axis for axis in kept if axis is None or (axis < len(v) and v[axis] != 1))
    readings = [one if isinstance(one, tuple) else (one,) for one in dims]
    # An axis of size 1 that is kept is not to be seen in g's shape.
    if kept in readings or ones in readings or (not ones and len(v) > 0):
        return recorded
    return Problem(
        "record",
        weight,
        f"{weight!r} has dim={recorded.dim} in the record beside its tensors, and a g that fits "
        f"dim={' or '.join(map(str, dims))}; the record is of another checkpoint",
    )


def _misfit(g: str, g_shape: Shape, v: str, v_shape: Shape) -> Problem:
    return Problem(
        "shape",
        g,
        f"{g!r} {g_shape} is not a magnitude of {v!r} {v_shape}: its size has to "
        "be that of v or 1 along each axis; one of the two is from another model",
    )


def _match(name: str) -> tuple[str, str, str] | None:
    """The plain key, the layout and the part (g or v) that a key stands for."""
    if found := _PARAMETRIZED.fullmatch(name):
        layout, part = "parametrized", "gv"[int(found["part"])]
    elif found := _LEGACY.fullmatch(name):
        layout, part = "legacy", found["part"]
    else:
        return None
    prefix = found["prefix"]
    return (found["param"] if prefix is None else f"{prefix}.{found['param']}"), layout, part


def _candidates(shapes: Mapping[str, Shape]) -> dict[tuple[str, str], dict[str, str]]:
    halves: dict[tuple[str, str], dict[str, str]] = {}
    for name in shapes:
        if (match := _match(name)) is not None:
            weight, layout, part = match
            # A v beside this is torch's spectral norm, whatever else is there.
            if layout == "legacy" and f"{weight}_orig" in shapes:
                continue
            halves.setdefault((weight, layout), {})[part] = name
    return halves


def _weight_like(weight: str) -> bool:
    return "weight" in weight.rpartition(".")[2] or ".parametrizations." in weight


def _orphans(shapes: Mapping[str, Shape]) -> Iterator[Problem]:
    for (weight, layout), halves in _candidates(shapes).items():
        if len(halves) == 2 or (layout == "legacy" and not _weight_like(weight)):
            continue
        # Low-rank factors are called weight_u and weight_v.
        if layout == "legacy" and f"{weight}_u" in shapes:
            continue
        ((part, name),) = halves.items()
        missing = keys_for(weight, layout)[part == "g"]
        yield Problem(
            "orphan",
            name,
            f"{name!r} is there without {missing!r}: half of a weight-normed tensor is lost; take "
            "it from another copy of the checkpoint, or keep what is there by orphans='keep' "
            "(--keep-orphans)",
        )


def _mixtures(
    shapes: Mapping[str, Shape], found: Mapping[tuple[str, str], object]
) -> Iterator[Problem]:
    stacked = {
        other["stem"]
        for name in shapes
        if (other := _OTHERS.fullmatch(name)) and other["rest"] not in _ORIGINALS
    }
    for weight, layout in found:
        if layout == "parametrized":
            stem = keys_for(weight, layout)[0].rpartition(".")[0]
            if stem in stacked:
                yield Problem(
                    "stacked",
                    weight,
                    f"{weight!r} has another parametrization beside weight norm; load it into "
                    "its model and remove the other one first",
                )
            elif (weight, "legacy") in found:
                yield Problem(
                    "twice",
                    weight,
                    f"{weight!r} is there in both layouts, as in a migration that stopped half "
                    "way; delete one of them",
                )
        if weight in shapes:
            yield Problem(
                "twice",
                weight,
                f"{weight!r} is there beside its own g and v; delete the one that is stale",
            )
