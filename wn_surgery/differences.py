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
        largest: the largest magnitude in the first, which ``max_abs`` is to be read by.
        max_abs: the largest absolute difference; infinite where one is NaN and the other is not.
        max_ulp: the same in units in the last place of the coarser of the two dtypes: how many
            numbers of it lie between. For integers the difference itself.
        differing: how many elements are not equal; two NaN are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    largest: float
    max_abs: float
    max_ulp: float
    differing: int

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain data; JSON knows no infinity, so check ``max_abs`` first."""
        return {**dataclasses.asdict(self), "shape": list(self.shape)}


def difference(name: str, expected: Tensor, actual: Tensor) -> Difference:
    """How one tensor differs from another.

    Args:
        name: what to call it.
        expected: any dtype.
        actual: of the same shape.

    Returns:
        The difference.

    Example:
        >>> import torch
        >>> from wn_surgery.differences import difference
        >>> one = torch.tensor([1.0, 2.0])
        >>> found = difference("weight", one, one.nextafter(torch.tensor(9.0)))
        >>> found.max_ulp, found.differing
        (1.0, 2)
    """
    kinds = [str(each.dtype).removeprefix("torch.") for each in (expected, actual)]
    dtype = kinds[0] if kinds[0] == kinds[1] else " -> ".join(kinds)
    one, other = _comparable(expected, actual)
    if one.numel() == 0:
        return Difference(name, tuple(expected.shape), dtype, 0.0, 0.0, 0, 0)
    same = (one == other) | (one.isnan() & other.isnan())
    distance = (one.double() - other.double()).abs()
    distance = distance.masked_fill(distance.isnan(), math.inf).masked_fill(same, 0.0)
    ulps = _ulps(one, other).masked_fill(one.isnan() | other.isnan(), math.inf)
    finite = one.double().abs()
    return Difference(
        name,
        tuple(expected.shape),
        dtype,
        float(finite[finite.isfinite()].max()) if bool(finite.isfinite().any()) else math.nan,
        float(distance.max()),
        float(ulps.masked_fill(same, 0.0).max()),
        int((~same).sum()),
    )


def _comparable(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both as real tensors of one dtype: the coarser where they differ."""
    if one.is_complex() and other.is_complex():
        one, other = (
            torch.view_as_real(one.resolve_conj()),
            torch.view_as_real(other.resolve_conj()),
        )
    if one.is_floating_point() and other.is_floating_point():
        coarser = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        # Numbers of one byte are few: as float32 they are compared well enough.
        coarser = torch.float32 if coarser.itemsize == 1 else coarser
        return one.to(coarser), other.to(coarser)
    if one.is_floating_point() or other.is_floating_point():
        return one.double(), other.double()
    return one.long(), other.long()


_AS_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _ulps(one: Tensor, other: Tensor) -> Tensor:
    """How many steps from number to number lead from ``one`` to ``other``, as float64."""
    if not one.is_floating_point():
        return (one - other).abs().double()
    first, second = _ordered(one), _ordered(other)
    # Exact in integers where it cannot overflow, which is where it can be small.
    apart = first.double().abs() + second.double().abs()
    return torch.where((first < 0) == (second < 0), (first - second).abs().double(), apart)


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers; both zeros are 0."""
    integer = _AS_INTEGER[tensor.dtype.itemsize]
    bits = tensor.contiguous().view(integer).long()
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)
