"""The kernels: w = g · v / max(‖v‖, eps) and its gradients, for all weights of a group at once.

A weight is seen as (before, kept, after), one norm for each index of ``kept``. Every kernel
takes the tables of :mod:`wn_surgery.fused.triton.tables`, and one program does one item:

- ``rows_*``: some rows of a weight with ``before == 1``, held in registers and read once;
- ``split_*``: a tile of a weight whose slices are longer: first ``split_sums`` writes the sum
  of its squares (or products), then ``finish_*`` adds those of a slice up, always in the same
  order, then ``split_*`` reads the tile again and writes the result.

Arithmetic is in float32. ``vector`` is how many elements of the narrowest dtype are 16 bytes:
where addresses and sizes are multiples of it, the compiler is told so and moves 16 bytes at a
time. That is decided by each program, since one odd weight must not slow down its group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .tables import COLUMNS, FIELDS, FINISH_KEPT, FINISH_PARTS, HEIGHT, TILE, WIDTHS

__all__ = [
    "WARPS",
    "finish_backward",
    "finish_forward",
    "rows_backward",
    "rows_forward",
    "split_backward",
    "split_forward",
    "split_sums",
]

WARPS = 8

# Named anew, since the decorator is untyped where triton is missing.
jit: Callable[[Callable[..., Any]], Any] = triton.jit

_FIELDS = tl.constexpr(FIELDS)
_TILE = tl.constexpr(TILE)
_HEIGHT = tl.constexpr(HEIGHT)
_COLUMNS = tl.constexpr(COLUMNS)
_FINISH_KEPT = tl.constexpr(FINISH_KEPT)
_FINISH_PARTS = tl.constexpr(FINISH_PARTS)
_WIDTH_0 = tl.constexpr(WIDTHS[0])
_WIDTH_1 = tl.constexpr(WIDTHS[1])
_WIDTH_2 = tl.constexpr(WIDTHS[2])
_WIDTH_3 = tl.constexpr(WIDTHS[3])
_WIDTH_4 = tl.constexpr(WIDTHS[4])


# Reading the tables --------------------------------------------------------------------------


@jit
def _tensor(pointers: Any, member: Any, which: tl.constexpr, dtype: tl.constexpr) -> Any:
    """The address of v (0), g (1) or the gradient of w (2), which is 0 where there is none."""
    return tl.load(pointers + member * 3 + which).to(tl.pointer_type(dtype))


@jit
def _is_aligned(address: Any) -> Any:
    return (address.to(tl.int64) & 15) == 0


@jit
def _eps(fields: Any) -> Any:
    return tl.load(fields + 5).to(tl.float64, bitcast=True).to(tl.float32)


# The formulas ----------------------------------------------------------------------------------


@jit
def _norm(squares: Any, eps: Any) -> Any:
    # Not tl.maximum, which would drop a NaN.
    raw = tl.sqrt_rn(squares)
    return tl.where(raw <= eps, eps, raw)


@jit
def _along(dot: Any, scale: Any, norm: Any, eps: Any) -> Any:
    """What of v is taken from scale · dw; nothing where the norm is the constant eps."""
    along = scale * (tl.div_rn(tl.div_rn(dot, norm), norm))
    return tl.where((eps > 0.0) & (norm <= eps), 0.0, along)


# Rows that fit in registers --------------------------------------------------------------------


@jit
def _tile_of_rows(first: Any, kept: Any, after: Any, width: tl.constexpr, vector: tl.constexpr):  # type: ignore[no-untyped-def]
    height: tl.constexpr = _TILE // width
    if vector > 1:
        after = tl.multiple_of(after, vector)
    row = tl.arange(0, height)
    column = tl.arange(0, width)
    here = first + row < kept
    offsets = first.to(tl.int64) * after + row[:, None] * after + column[None, :]
    return first + row, here, offsets, here[:, None] & (column < after)[None, :]
