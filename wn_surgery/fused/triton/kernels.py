"""The kernels for weights whose rows fit in registers, and what all kernels share.

All weights of a group are computed at once: w = g · v / max(‖v‖, eps). Each is seen as
(before, kept, after), one norm for each index of ``kept``. A program does one item of the
tables of :mod:`wn_surgery.fused.triton.tables`: here some rows of a weight whose ``before`` is
1, which it reads once. Longer rows, and columns, are those of
:mod:`wn_surgery.fused.triton.split_kernels`.

Arithmetic is in float32. ``vector`` is how many elements of the narrowest dtype are 16 bytes:
where addresses and sizes are multiples of it, the compiler is told so and moves 16 bytes at a
time. That is decided by each program, since one odd weight must not slow down its group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from wn_surgery.fused.triton.tables import FIELDS, TILE

__all__ = [
    "WARPS",
    "address_of",
    "along_v",
    "eps_of",
    "is_aligned",
    "jit",
    "multiple",
    "norm_of",
    "pointer_to",
    "rows_backward",
    "rows_forward",
]

WARPS = 8

# Named anew, since the decorator is untyped where triton is missing.
jit: Callable[[Callable[..., Any]], Any] = triton.jit

_FIELDS = tl.constexpr(FIELDS)
_TILE = tl.constexpr(TILE)


# Reading the tables --------------------------------------------------------------------------


@jit
def address_of(pointers: tl.tensor, member: tl.tensor, which: tl.constexpr) -> tl.tensor:
    """The address of v (0), g (1) or the gradient of w (2), which is 0 where there is none."""
    return tl.load(pointers + member * 3 + which)


@jit
def is_aligned(address: tl.tensor) -> tl.tensor:
    """Whether an address is a multiple of 16 bytes."""
    return (address & 15) == 0


@jit
def pointer_to(address: tl.tensor, dtype: tl.dtype, vector: tl.constexpr) -> tl.tensor:
    """An address as a pointer, and the knowledge that it is aligned if ``vector`` is not 1."""
    # tl.multiple_of() says it of the operation that made its argument. Without the shifts that
    # would be the same one as in the branch for what is not aligned.
    if vector > 1:
        return tl.multiple_of(((address >> 4) << 4).to(tl.pointer_type(dtype)), 16)
    return address.to(tl.pointer_type(dtype))


@jit
def multiple(value: tl.tensor, vector: tl.constexpr) -> tl.tensor:
    """A value, and the knowledge that it is a multiple of ``vector``."""
    return value // vector * vector if vector > 1 else value


@jit
def eps_of(fields: tl.tensor) -> tl.tensor:
    """The lower clamp of a member's norms."""
    return tl.load(fields + 5).to(tl.int32).to(tl.float32, bitcast=True)


# The formulas ----------------------------------------------------------------------------------


@jit
def norm_of(squares: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """The clamped norm."""
    # Not tl.maximum, which would drop a NaN.
    raw = tl.sqrt_rn(squares)
    return tl.where(raw <= eps, eps, raw)


@jit
def along_v(dot: tl.tensor, scale: tl.tensor, norm: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """What of v is taken from scale · dw; nothing where the norm is the constant eps."""
    return tl.where(norm <= eps, 0.0, scale * tl.div_rn(tl.div_rn(dot, norm), norm))


# Rows that fit in registers --------------------------------------------------------------------


@jit
def _rows_forward(
    v: tl.tensor,
    g: tl.tensor,
    w: tl.tensor,
    norms: tl.tensor,
    first: tl.tensor,
    kept: tl.tensor,
    after: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    after = multiple(after, vector)
    height: tl.constexpr = _TILE // width if width < _TILE else 1
    row = first + tl.arange(0, height)
    column = tl.arange(0, width)[None, :]
    here = row < kept
    mask = here[:, None] & (column < after)
    start = first.to(tl.int64) * after
    offsets = (row - first)[:, None] * after + column
    x = tl.load(pointer_to(v, dtype, vector) + start + offsets, mask=mask, other=0.0).to(tl.float32)
    magnitude = tl.load(g + row, mask=here, other=0.0).to(tl.float32)
    norm = norm_of(tl.sum(x * x, axis=1), eps)
    tl.store(norms + row, norm, mask=here)
    scale = tl.div_rn(magnitude, norm)
    tl.store(w + start + offsets, x * scale[:, None], mask=mask)


@jit
def rows_forward(
    pointers: tl.tensor,
    fields: tl.tensor,
    items: tl.tensor,
    weights: tl.tensor,
    norms: tl.tensor,
    dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    """Weights and norms of the members whose rows fit in registers."""
    item = items + tl.program_id(0) * 3
    member, first, width = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    v = address_of(pointers, member, 0)
    g = pointer_to(address_of(pointers, member, 1), dtype, 1)
    fields += member * _FIELDS
    w = weights + tl.multiple_of(tl.load(fields), 64)
    norms += tl.load(fields + 1)
    kept = tl.load(fields + 3).to(tl.int32)
    after = tl.load(fields + 4).to(tl.int32)
    eps = eps_of(fields)
    aligned = is_aligned(v) & (after % vector == 0)
    for power in tl.static_range(5, 14, 2):
        if width == 1 << power:
            if aligned:
                _rows_forward(v, g, w, norms, first, kept, after, eps, 1 << power, dtype, vector)
            else:
                _rows_forward(v, g, w, norms, first, kept, after, eps, 1 << power, dtype, 1)


@jit
def _rows_backward(
    v: tl.tensor,
    g: tl.tensor,
    dw: tl.tensor,
    norms: tl.tensor,
    grad_v: tl.tensor,
    grad_g: tl.tensor,
    first: tl.tensor,
    kept: tl.tensor,
    after: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    after = multiple(after, vector)
    height: tl.constexpr = _TILE // width if width < _TILE else 1
    row = first + tl.arange(0, height)
    column = tl.arange(0, width)[None, :]
    here = row < kept
    mask = here[:, None] & (column < after)
    start = first.to(tl.int64) * after
    offsets = (row - first)[:, None] * after + column
    x = tl.load(pointer_to(v, dtype, vector) + start + offsets, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(pointer_to(dw, grad_dtype, vector) + start + offsets, mask=mask, other=0.0).to(
        tl.float32
    )
    magnitude = tl.load(g + row, mask=here, other=0.0).to(tl.float32)
    norm = tl.load(norms + row, mask=here, other=1.0)
    dot = tl.sum(x * d, axis=1)
    tl.store(grad_g + row, tl.div_rn(dot, norm), mask=here)
    scale = tl.div_rn(magnitude, norm)
    along = along_v(dot, scale, norm, eps)
    grad = d * scale[:, None] - x * along[:, None]
    tl.store(grad_v + start + offsets, grad, mask=mask)


@jit
def rows_backward(
    pointers: tl.tensor,
    fields: tl.tensor,
    items: tl.tensor,
    norms: tl.tensor,
    grad_v: tl.tensor,
    grad_g: tl.tensor,
    dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    """Gradients of the members whose rows fit in registers."""
    item = items + tl.program_id(0) * 3
    member, first, width = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    v = address_of(pointers, member, 0)
    g = pointer_to(address_of(pointers, member, 1), dtype, 1)
    dw = address_of(pointers, member, 2)
    fields += member * _FIELDS
    grad_v += tl.multiple_of(tl.load(fields), 64)
    at = tl.load(fields + 1)
    norms += at
    grad_g += at
    kept = tl.load(fields + 3).to(tl.int32)
    after = tl.load(fields + 4).to(tl.int32)
    eps = eps_of(fields)
    if dw != 0:
        aligned = is_aligned(v) & is_aligned(dw) & (after % vector == 0)
        for power in tl.static_range(5, 14, 2):
            if width == 1 << power:
                if aligned:
                    _rows_backward(
                        v,
                        g,
                        dw,
                        norms,
                        grad_v,
                        grad_g,
                        first,
                        kept,
                        after,
                        eps,
                        1 << power,
                        dtype,
                        grad_dtype,
                        vector,
                    )
                else:
                    _rows_backward(
                        v,
                        g,
                        dw,
                        norms,
                        grad_v,
                        grad_g,
                        first,
                        kept,
                        after,
                        eps,
                        1 << power,
                        dtype,
                        grad_dtype,
                        1,
                    )
