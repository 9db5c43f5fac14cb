"""State dicts in memory, from one layout to another."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from wn_surgery.errors import CheckpointError, ZeroNormError
from wn_surgery.norm import KERNEL_DTYPES, Dim, magnitude, weight_norm, zero_slices
from wn_surgery.patterns import PatternSet

from .pairs import Pair, find_pairs, keys_for

__all__ = ["Layout", "convert", "fold", "layout_of"]

Layout: TypeAlias = Literal["plain", "parametrized", "legacy"]
LAYOUTS = ("plain", "parametrized", "legacy")
MAX_DEPTH = 64


def fold(g: Tensor, v: Tensor, dim: Dim) -> Tensor:
    """The weight of g and v, computed in float32 or better and rounded once.

    Args:
        g: the magnitude, in any shape that ``find_pairs`` accepts.
        v: the direction, floating or complex.
        dim: the axes that keep a norm of their own.

    Returns:
        The weight, in v's shape and dtype: for g and v of one dtype what torch's kernel gives.

    Raises:
        CheckpointError: one of them is not floating-point.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints import fold
        >>> fold(torch.tensor([10.0]), torch.tensor([[3.0, 4.0]]), 0)
        tensor([[6., 8.]])
    """
    if g.is_complex() or not (v.is_floating_point() or v.is_complex()) or not g.is_floating_point():
        raise CheckpointError(f"g and v are {g.dtype} and {v.dtype}: expected floating-point ones")
    if dim is None:
        g = g.reshape(())
    elif g.ndim != v.ndim and isinstance(dim, int):
        g = g.reshape([-1 if axis == dim else 1 for axis in range(v.ndim)])
    with torch.no_grad():
        real = v.dtype.to_real() if v.dtype.is_complex else v.dtype
        if g.dtype == real and (
            real in (torch.float32, torch.float64)
            # The kernel itself widens these, and rounds once.
            or (v.dtype in KERNEL_DTYPES and dim in (0, v.ndim - 1))
        ):
            return weight_norm(v, g, dim)
        double = torch.float64 in (real, g.dtype)
        wide = torch.float64 if double else torch.float32
        wide_v = v.to(wide.to_complex() if v.is_complex() else wide)
        return weight_norm(wide_v, g.to(wide), dim).to(v.dtype)


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {k: t for k, t in state.items() if isinstance(k, str) and isinstance(t, Tensor)}


def _shapes(state: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(state).items()}


def layout_of(state: Mapping[str, Any], *, dim: Dim | str = "auto") -> dict[str, Pair]:
    """Where weight norm is in a state dict, by names and shapes alone.

    Args:
        state: tensors by key; containers of state dicts are walked, and the keys of what is in
            them are joined with ``/``.
        dim: see :func:`wn_surgery.checkpoints.pairs.find_pairs`.

    Returns:
        The pair for each weight-normed key (its plain name); empty for a plain state dict.

    Raises:
        CheckpointError: a pair does not fit, or is ambiguous.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints import layout_of
        >>> state = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 2)}
        >>> layout_of({"generator": state})["generator/weight"].layout
        'legacy'
    """
    found: dict[str, Pair] = {}
    _look(state, "", dim, found, 0)
    return found


def _look(value: Any, path: str, dim: Dim | str, found: dict[str, Pair], depth: int) -> None:
    _bound(depth)
    if isinstance(value, Mapping):
        for pair in find_pairs(_shapes(value), dim=dim):
            found[path + pair.weight] = pair
        for key, child in value.items():
            _look(child, f"{path}{key}/", dim, found, depth + 1)
    elif isinstance(value, (list, tuple)):
        for number, child in enumerate(value):
            _look(child, f"{path}{number}/", dim, found, depth + 1)


def _bound(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise CheckpointError(
            f"the checkpoint nests containers more than {MAX_DEPTH} deep, or holds itself; "
            "pass the state dict that is in it"
        )


def convert(
    state: Mapping[str, Any],
    to: Layout = "plain",
    *,
    names: str | Iterable[str] | None = None,
    dim: Dim | str = "auto",
) -> Any:
    """A state dict, or a container of some, in another layout.

    Args:
        state: tensors by key; dicts, lists and tuples in it are walked. It is not changed.
        to: ``"plain"``, ``"parametrized"`` or ``"legacy"``.
        names: patterns (docs/rules.md) over the keys of plain weights that get weight norm;
            by default none do.
        dim: the axes where g's shape is ambiguous, and of new weight norm (``"auto"`` is 0).

    Returns:
        A container of the same types, key order and ``_metadata``. What has nothing to do with
        weight norm is the same object; a pair that is there twice stays one tensor.

    Raises:
        CheckpointError: a pair does not fit or is ambiguous, a key is taken, or ``names``
            matches nothing.
        ZeroNormError: a weight that gets weight norm has a slice of zero or non-finite norm.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints import convert
        >>> state = {"weight_g": torch.tensor([[10.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> convert(state, "plain")
        {'weight': tensor([[6., 8.]])}
    """
    if to not in LAYOUTS:
        raise CheckpointError(f"unknown layout {to!r}: expected one of {', '.join(LAYOUTS)}")
    patterns = (
        None
        if names is None or to == "plain"
        else PatternSet.of((names,) if isinstance(names, str) else tuple(names))
    )
    work = _Conversion(to, patterns, dim)
    with torch.no_grad():
        result = work.walk(state, 0)
    if patterns is not None and not work.matched:
        raise CheckpointError(
            f"no plain tensor of 2 or more axes matches {names!r}; patterns are over whole keys, "
            "such as '**.weight'"
        )
    return result


class _Conversion:
    """What one call knows: the folded pairs, so that shared ones stay shared."""

    def __init__(self, to: Layout, patterns: PatternSet | None, dim: Dim | str) -> None:
        self.to, self.patterns, self.dim = to, patterns, dim
        self.made: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
        self.alive: list[Tensor] = []
        self.matched = False

    def walk(self, value: Any, depth: int) -> Any:
        _bound(depth)
        if isinstance(value, Mapping):
            return self.state(value, depth)
        if type(value) in (list, tuple):
            return type(value)(self.walk(child, depth + 1) for child in value)
        return value

    def state(self, state: Mapping[Any, Any], depth: int) -> Any:
        pairs = find_pairs(_shapes(state), dim=self.dim)
        by_g = {pair.g: pair for pair in pairs}
        by_v = {pair.v: pair for pair in pairs}
        items: list[tuple[Any, Any]] = []
        for key, value in state.items():
            if key in by_g:
                items += self.pair(by_g[key], value, state[by_g[key].v])
            elif key in by_v:
                if self.to != "plain":
                    items.append((keys_for(by_v[key].weight, self.to)[1], value))
            elif isinstance(value, Tensor):
                items += self.plain(key, value)
            else:
                items.append((key, self.walk(value, depth + 1)))
        result = _empty_like(state)
        for key, value in items:
            if key in result:
                raise CheckpointError(f"two tensors would be called {key!r}; rename one of them")
            result[key] = value
        return result

    def pair(self, pair: Pair, g: Tensor, v: Tensor) -> list[tuple[str, Tensor]]:
        if self.to != "plain":
            return [(keys_for(pair.weight, self.to)[0], g)]
        key = (*_identity(g), *_identity(v), pair.dim)
        if key not in self.made:
            self.made[key] = (fold(g, v, pair.dim),)
            self.alive += [g, v]
        return [(pair.weight, self.made[key][0])]

    def plain(self, key: Any, value: Tensor) -> list[tuple[Any, Tensor]]:
        wanted = (
            self.patterns is not None
            and isinstance(key, str)
            and value.ndim >= 2
            and (value.is_floating_point() or value.is_complex())
            and ".parametrizations." not in f".{key}"
            and self.patterns.matches(key)
        )
        if not wanted or self.to == "plain":
            return [(key, value)]
        self.matched = True
        dim: Any = 0 if self.dim == "auto" else self.dim
        axes = () if dim is None else (dim,) if isinstance(dim, int) else dim
        if any(not 0 <= axis < value.ndim for axis in axes):
            raise CheckpointError(f"{key!r} {tuple(value.shape)} has no axis {dim}")
        if count := zero_slices(value, dim):
            raise ZeroNormError(
                f"{key!r} has {count} slices of zero or non-finite norm along dim {dim}: "
                "weight norm would make them NaN; leave it out of names"
            )
        made = (*_identity(value), dim, "g")
        if made not in self.made:
            self.made[made] = (magnitude(value, dim),)
            self.alive.append(value)
        g_key, v_key = keys_for(key, self.to)
        return [(g_key, self.made[made][0]), (v_key, value)]


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # Views of one storage are made anew at each state_dict(); their place is what they share.
    if tensor.is_meta:
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _empty_like(state: Mapping[Any, Any]) -> Any:
    """An empty mapping of the same class that keeps attributes such as ``_metadata``."""
    if type(state) is dict:
        return {}
    if not isinstance(state, MutableMapping):
        return {}
    result = copy.copy(state)
    result.clear()
    return result
