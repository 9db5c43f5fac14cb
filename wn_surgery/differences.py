"""How two tensors differ: absolutely, and in units in the last place."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Difference", "difference"]


@dataclass(frozen=True)
class Difference:
    """One tensor against another that should be the same.

    Attributes:
        name: its key, or position.
        shape: its shape.
        dtype: its dtype, and after an arrow that of the other where they differ.
        largest: the largest magnitude in the first, the scale for ``max_abs``.
        max_abs: the largest absolute difference; infinite where one is NaN and the other is not.
        max_ulp: the same in units in the last place of the coarser dtype: how many of its numbers
            lie between. For integers the difference itself.
        differing: how many elements are not equal; two NaN are equal.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    largest: float
    max_abs: float
    max_ulp: float
    differing: int

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain data. JSON has no infinity, so check ``max_abs`` first."""
        return {**dataclasses.asdict(self), "shape": list(self.shape)}


def difference(name: str, expected: Tensor, actual: Tensor) -> Difference:
    """How ``actual`` differs from ``expected``, which has the same shape and any dtype."""
    kinds = dict.fromkeys(str(each.dtype).removeprefix("torch.") for each in (expected, actual))
    shape, dtype = tuple(expected.shape), " -> ".join(kinds)
    one, other = _comparable(expected, actual)
    if one.numel() == 0:
        return Difference(name, shape, dtype, 0.0, 0.0, 0, 0)
    same = (one == other) | (one.isnan() & other.isnan())
    distance = (one.double() - other.double()).abs()
    distance = distance.masked_fill(distance.isnan(), math.inf).masked_fill(same, 0.0)
    ulps = _ulps(one, other).masked_fill(one.isnan() | other.isnan(), math.inf)
    sizes = one.double().abs()
    finite = sizes[sizes.isfinite()]
    largest = float(finite.max()) if finite.numel() else math.nan
    max_ulp = float(ulps.masked_fill(same, 0.0).max())
    return Difference(
        name, shape, dtype, largest, float(distance.max()), max_ulp, int((~same).sum())
    )


def _comparable(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both as real tensors of one dtype: the coarser where they differ."""
    if one.is_complex() and other.is_complex():
        one, other = (torch.view_as_real(each.resolve_conj()) for each in (one, other))
    if one.is_floating_point() and other.is_floating_point():
        coarser = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        # One-byte dtypes have no integer view here; float32 holds them exactly.
        coarser = torch.float32 if coarser.itemsize == 1 else coarser
        return one.to(coarser), other.to(coarser)
    if one.is_floating_point() or other.is_floating_point():
        return one.double(), other.double()
    return one.long(), other.long()


_AS_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _ulps(one: Tensor, other: Tensor) -> Tensor:
    """How many steps between adjacent numbers lead from ``one`` to ``other``, as float64."""
    if not one.is_floating_point():
        return (one - other).abs().double()
    first, second = _ordered(one), _ordered(other)
    # Integers are exact where they cannot overflow, and only there the count can be small.
    apart = first.double().abs() + second.double().abs()
    return torch.where((first < 0) == (second < 0), (first - second).abs().double(), apart)


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers; both zeros are 0."""
    integer = _AS_INTEGER[tensor.dtype.itemsize]
    bits = tensor.contiguous().view(integer).long()
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)
