"""Finding g and v by the names and shapes of tensors, without a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from wn_surgery.errors import CheckpointError
from wn_surgery.norm import Dim

__all__ = ["Pair", "axes_of", "find_orphans", "find_pairs", "keys_for"]

Shape = tuple[int, ...]
_LEGACY = re.compile(r"(?:(?P<prefix>.*)\.)?(?P<param>[^.]+)_(?P<part>[gv])", re.DOTALL)
_PARAMETRIZED = re.compile(
    r"(?:(?P<prefix>.*)\.)?parametrizations\.(?P<param>[^.]+)\.original(?P<part>[01])", re.DOTALL
)

_PART = re.compile(r"(?P<stem>(?:.*\.)?parametrizations\.[^.]+)\.(?P<rest>.+)", re.DOTALL)
_ORIGINALS = frozenset({"original0", "original1"})


@dataclass(frozen=True)
class Pair:
    """One weight-normed tensor.

    Attributes:
        weight: its key in the plain layout.
        layout: ``"legacy"`` or ``"parametrized"``.
        g: the key of the magnitude.
        v: the key of the direction.
        dim: the axes that keep a norm of their own, as in ``wn_surgery.norm``.
    """

    weight: str
    layout: str
    g: str
    v: str
    dim: Dim


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
        return [axis for axis, size in enumerate(v) if size == g[0]] or (
            [None] if g == (1,) else []
        )
    if len(g) != len(v) or any(a not in (1, b) for a, b in zip(g, v, strict=True)):
        return []
    kept = tuple(axis for axis, size in enumerate(g) if size != 1)
    if len(kept) == 1:
        return [kept[0]]
    if kept:
        return [kept]
    return [axis for axis, size in enumerate(v) if size == 1] or [None]


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
            # A lone v beside these is torch's spectral norm, whatever else is there.
            if layout == "legacy" and f"{weight}_orig" in shapes:
                continue
            halves.setdefault((weight, layout), {})[part] = name
    return halves


def find_pairs(shapes: Mapping[str, Shape], *, dim: Dim | str = "auto") -> list[Pair]:
    """The weight-normed tensors of a state dict.

    Args:
        shapes: the shape of every tensor by its key.
        dim: the axes to take where g's shape can be read in two ways; ``"auto"`` takes those
            that the pairs with only one reading have, if they agree.

    Returns:
        In the order of the keys.

    Raises:
        CheckpointError: g and v do not fit, another parametrization is stacked on them, the
            weight is there a second time, or the axes are ambiguous.

    Example:
        >>> from wn_surgery.checkpoints.pairs import find_pairs
        >>> find_pairs({"a.weight_g": (3, 1), "a.weight_v": (3, 2)})[0].weight
        'a.weight'
    """
    readings: dict[tuple[str, str], tuple[str, str, list[Dim]]] = {}
    for key, halves in _candidates(shapes).items():
        if len(halves) == 2:
            g, v = halves["g"], halves["v"]
            dims = axes_of(shapes[g], shapes[v])
            if not dims:
                raise CheckpointError(
                    f"{g!r} {shapes[g]} is not a magnitude of {v!r} {shapes[v]}: its size has to "
                    "be that of v or 1 along each axis; one of the two is from another model"
                )
            readings[key] = (g, v, dims)
    _refuse_mixtures(shapes, readings)
    clear = Counter(dims[0] for _, _, dims in readings.values() if len(dims) == 1)
    usual = next(iter(clear)) if len(clear) == 1 else 0
    pairs: list[Pair] = []
    for (weight, layout), (g, v, dims) in readings.items():
        choice = dims[0]
        if len(dims) > 1:
            wanted = usual if dim == "auto" else dim
            # Axes of size 1 give one weight, up to the order of a sum; a g of one axis does not.
            harmless = len(shapes[g]) == len(shapes[v])
            if not harmless and dim == "auto" and len(clear) != 1:
                wanted = "unknown"
            if wanted in dims:
                choice = next(one for one in dims if one == wanted)
            elif not harmless:
                raise CheckpointError(
                    f"{g!r} {shapes[g]} fits several axes of {v!r} {shapes[v]}: "
                    f"say which it is, dim={' or '.join(map(str, dims))}"
                )
        pairs.append(Pair(weight, layout, g, v, choice))
    return pairs


def _refuse_mixtures(shapes: Mapping[str, Shape], found: Mapping[tuple[str, str], object]) -> None:
    stacked = {
        found_part["stem"]
        for name in shapes
        if (found_part := _PART.fullmatch(name)) and found_part["rest"] not in _ORIGINALS
    }
    for weight, layout in found:
        if layout == "parametrized":
            stem = keys_for(weight, layout)[0].rpartition(".")[0]
            if stem in stacked:
                raise CheckpointError(
                    f"{weight!r} has another parametrization beside weight norm; load it into "
                    "its model and remove the other one first"
                )
            if (weight, "legacy") in found:
                raise CheckpointError(f"{weight!r} is there in both layouts; delete one of them")
        if weight in shapes:
            raise CheckpointError(
                f"{weight!r} is there beside its own g and v; delete the one that is stale"
            )


def find_orphans(shapes: Mapping[str, Shape]) -> list[str]:
    """Keys that look like a g or a v whose other half is missing.

    Args:
        shapes: the shape of every tensor by its key.

    Returns:
        In the order of the keys; nothing of spectral norm.

    Example:
        >>> from wn_surgery.checkpoints.pairs import find_orphans
        >>> find_orphans({"a.weight_v": (3, 2), "b.weight_v": (2,), "b.weight_orig": (3, 2)})
        ['a.weight_v']
    """
    lone = [
        next(iter(halves.values())) for halves in _candidates(shapes).values() if len(halves) < 2
    ]
    # Only of weights: `pos_v` and its like are names as good as any other.
    return [name for name in lone if _match(name)[0].rpartition(".")[2].startswith("weight")]  # type: ignore[index]
