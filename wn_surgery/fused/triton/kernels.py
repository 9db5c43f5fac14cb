"""The Triton kernels: w = g · v / max(‖v‖, eps) and its gradients, for a whole group at once.

Each weight is seen as (before, kept, after), with one norm for each index of ``kept``. A program
does one item of the tables of :mod:`wn_surgery.fused.triton.tables`. The ``rows`` kernels take
weights with ``before`` = 1 whose rows fit in a program's registers, and read them once. All others
are split into tiles: ``split_sums`` writes the sum of a tile's squares or products, ``finish_*``
adds up the sums of each slice, and ``split_forward`` and ``split_backward`` read the tile again.

Arithmetic is in float32. ``vector`` is how many elements of the narrowest dtype are 16 bytes:
where addresses and sizes are multiples of it, the compiler is told so and moves 16 bytes at a
time. Each program decides that for its item, so that one odd weight does not slow down its group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from wn_surgery.fused.triton import tables

__all__ = [
    "WARPS", "finish_backward", "finish_forward", "rows_backward", "rows_forward",
    "split_backward", "split_forward", "split_sums",
]  # fmt: skip

WARPS = 8

# Named anew, since the decorator is untyped where triton is missing.
jit: Callable[[Callable[..., Any]], Any] = triton.jit

_FIELDS = tl.constexpr(tables.FIELDS)
_TILE = tl.constexpr(tables.TILE)
_HEIGHT = tl.constexpr(tables.HEIGHT)
_COLUMNS = tl.constexpr(tables.COLUMNS)
_FINISH_KEPT = tl.constexpr(tables.FINISH_KEPT)
_FINISH_PARTS = tl.constexpr(tables.FINISH_PARTS)


# What all kernels share -----------------------------------------------------------------------


@jit
def _open(pointers: tl.tensor, fields: tl.tensor, items: tl.tensor, dtype: tl.dtype) -> tl.tuple:
    """This program's item: two numbers, its member's fields, v, g and dw.

    v and dw, the gradient of w, are addresses. That of dw is 0 where there is none.
    """
    item = items + tl.program_id(0) * 3
    member, i, j = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    addresses = pointers + member * 3
    v, g, dw = tl.load(addresses), tl.load(addresses + 1), tl.load(addresses + 2)
    return i, j, fields + member * _FIELDS, v, g.to(tl.pointer_type(dtype)), dw


@jit
def _member(fields: tl.tensor) -> tl.tuple:
    """A member's before, kept, after and eps."""
    before, kept, after = tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4)
    eps = tl.load(fields + 5).to(tl.int32).to(tl.float32, bitcast=True)
    return before.to(tl.int32), kept.to(tl.int32), after.to(tl.int32), eps


@jit
def _is_aligned(address: tl.tensor) -> tl.tensor:
    return (address & 15) == 0


@jit
def _multiple(value: tl.tensor, vector: tl.constexpr) -> tl.tensor:
    """A value, and the knowledge that it is a multiple of ``vector``."""
    return value // vector * vector if vector > 1 else value


@jit
def _read(address: tl.tensor, dtype: tl.dtype, place: tl.tuple, vector: tl.constexpr) -> tl.tensor:
    """A tile in float32; the compiler knows that its address is aligned if ``vector`` is not 1."""
    start, offsets, mask = place
    # tl.multiple_of() marks the operation that made its argument. Without the shifts that would
    # be the same operation as in the branch for addresses that are not aligned.
    if vector > 1:
        pointer = tl.multiple_of(((address >> 4) << 4).to(tl.pointer_type(dtype)), 16)
    else:
        pointer = address.to(tl.pointer_type(dtype))
    return tl.load(pointer + start + offsets, mask=mask, other=0.0).to(tl.float32)


@jit
def _write(pointer: tl.tensor, place: tl.tuple, values: tl.tensor) -> None:
    start, offsets, mask = place
    tl.store(pointer + start + offsets, values, mask=mask)


@jit
def _clamped_norm(squares: tl.tensor, eps: tl.tensor) -> tl.tensor:
    # Not tl.maximum, which would drop a NaN.
    raw = tl.sqrt_rn(squares)
    return tl.where(raw <= eps, eps, raw)


@jit
def _along(dot: tl.tensor, scale: tl.tensor, norm: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """What of v is taken from scale · dw; nothing where the norm is the constant eps."""
    return tl.where(norm <= eps, 0.0, scale * tl.div_rn(tl.div_rn(dot, norm), norm))


# Rows that fit in registers -------------------------------------------------------------------


@jit
def _rows(rows: tl.tuple, width: tl.constexpr, vector: tl.constexpr) -> tl.tuple:
    """Where a program's rows are (start, offsets, mask), their norms, and which of them exist."""
    first, kept, after, _ = rows
    after = _multiple(after, vector)
    row = first + tl.arange(0, _TILE // width if width < _TILE else 1)
    column = tl.arange(0, width)[None, :]
    mask = (row < kept)[:, None] & (column < after)
    start, offsets = first.to(tl.int64) * after, (row - first)[:, None] * after + column
    return (start, offsets, mask), row, row < kept


@jit
def _rows_forward(
    tensors: tl.tuple, rows: tl.tuple,
    width: tl.constexpr, dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    v, g, weights, norms = tensors
    place, row, here = _rows(rows, width, vector)
    x = _read(v, dtype, place, vector)
    magnitude = tl.load(g + row, mask=here, other=0.0).to(tl.float32)
    norm = _clamped_norm(tl.sum(x * x, axis=1), rows[3])
    tl.store(norms + row, norm, mask=here)
    _write(weights, place, x * tl.div_rn(magnitude, norm)[:, None])


@jit
def rows_forward(
    pointers: tl.tensor, fields: tl.tensor, items: tl.tensor, weights: tl.tensor, norms: tl.tensor,
    dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    """Weights and norms of the members whose rows fit in registers."""
    first, width, fields, v, g, _ = _open(pointers, fields, items, dtype)
    weights += tl.multiple_of(tl.load(fields), 64)
    tensors = v, g, weights, norms + tl.load(fields + 1)
    _, kept, after, eps = _member(fields)
    rows = first, kept, after, eps
    aligned = _is_aligned(v) & (after % vector == 0)
    for power in tl.static_range(5, 14, 2):
        if width == 1 << power:
            if aligned:
                _rows_forward(tensors, rows, 1 << power, dtype, vector)
            else:
                _rows_forward(tensors, rows, 1 << power, dtype, 1)


@jit
def _rows_backward(
    tensors: tl.tuple, rows: tl.tuple,
    width: tl.constexpr, dtype: tl.constexpr, grad_dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    v, g, dw, norms, grad_v, grad_g = tensors
    place, row, here = _rows(rows, width, vector)
    x, d = _read(v, dtype, place, vector), _read(dw, grad_dtype, place, vector)
    magnitude = tl.load(g + row, mask=here, other=0.0).to(tl.float32)
    norm = tl.load(norms + row, mask=here, other=1.0)
    dot = tl.sum(x * d, axis=1)
    tl.store(grad_g + row, tl.div_rn(dot, norm), mask=here)
    scale = tl.div_rn(magnitude, norm)
    along = _along(dot, scale, norm, rows[3])
    _write(grad_v, place, d * scale[:, None] - x * along[:, None])


@jit
def rows_backward(
    pointers: tl.tensor, fields: tl.tensor, items: tl.tensor, norms: tl.tensor,
    grad_v: tl.tensor, grad_g: tl.tensor,
    dtype: tl.constexpr, grad_dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of the members whose rows fit in registers."""
    first, width, fields, v, g, dw = _open(pointers, fields, items, dtype)
    grad_v += tl.multiple_of(tl.load(fields), 64)
    at = tl.load(fields + 1)
    tensors = v, g, dw, norms + at, grad_v, grad_g + at
    _, kept, after, eps = _member(fields)
    rows = first, kept, after, eps
    if dw != 0:
        aligned = _is_aligned(v) & _is_aligned(dw) & (after % vector == 0)
        for power in tl.static_range(5, 14, 2):
            if width == 1 << power:
                if aligned:
                    _rows_backward(tensors, rows, 1 << power, dtype, grad_dtype, vector)
                else:
                    _rows_backward(tensors, rows, 1 << power, dtype, grad_dtype, 1)


# Tiles of what does not -----------------------------------------------------------------------


@jit
def _tile(fields: tl.tensor, i: tl.tensor, j: tl.tensor, vector: tl.constexpr) -> tl.tuple:
    """Where a tile is (start, offsets, mask), the norm of each column, and which of them exist.

    The tile is ``HEIGHT`` rows of ``COLUMNS`` neighbours each: of (before, kept · after), or,
    if ``before`` is 1, of a run of one long row, whose rows follow each other.
    """
    before, kept, after, _ = _member(fields)
    row = tl.arange(0, _HEIGHT)
    column = tl.arange(0, _COLUMNS)
    if before > 1:
        stride = kept * after
        start = (i * _HEIGHT).to(tl.int64) * stride + j * _COLUMNS
        valid = tl.where(i * _HEIGHT + row < before, stride - j * _COLUMNS, 0)
        norm = (j * _COLUMNS + column) // after
    else:
        stride = _COLUMNS + after * 0
        start = i.to(tl.int64) * after + j * _TILE
        valid = after - j * _TILE - row * _COLUMNS
        norm = i + column * 0
    start, valid = _multiple(start, vector), _multiple(valid, vector)
    offsets = row[:, None] * _multiple(stride, vector) + column[None, :]
    return (start, offsets, column[None, :] < valid[:, None]), norm, norm < kept


@jit
def _is_even(fields: tl.tensor, vector: tl.constexpr) -> tl.tensor:
    """Whether the rows of every tile start at a multiple of ``vector`` elements."""
    before, after = tl.load(fields + 2), tl.load(fields + 4)
    return tl.where(before > 1, tl.load(fields + 3) * after, after) % vector == 0


@jit
def _sums(
    tensors: tl.tuple, fields: tl.tensor, i: tl.tensor, j: tl.tensor,
    dtype: tl.constexpr, grad_dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    v, dw, parts = tensors
    place, _, _ = _tile(fields, i, j, vector)
    x = _read(v, dtype, place, vector)
    y = x if grad_dtype is None else _read(dw, grad_dtype, place, vector)
    sums = tl.sum(x * y, axis=0)
    if tl.load(fields + 2) > 1:
        width = tl.load(fields + 3) * tl.load(fields + 4)
        column = j * _COLUMNS + tl.arange(0, _COLUMNS)
        tl.store(parts + i * width + column, sums, mask=column < width)
    else:
        tl.store(parts + i.to(tl.int64) * tl.load(fields + 8) + j, tl.sum(sums, axis=0))


@jit
def split_sums(
    pointers: tl.tensor, fields: tl.tensor, items: tl.tensor, parts: tl.tensor,
    dtype: tl.constexpr, grad_dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    """The parts of sum(v · v), or of sum(v · dw) where ``grad_dtype`` is given."""
    i, j, fields, v, _, dw = _open(pointers, fields, items, dtype)
    y = v if grad_dtype is None else dw
    tensors = v, y, parts + tl.load(fields + 6)
    if y != 0:
        if _is_aligned(v) & _is_aligned(y) & _is_even(fields, vector):
            _sums(tensors, fields, i, j, dtype, grad_dtype, vector)
        else:
            _sums(tensors, fields, i, j, dtype, grad_dtype, 1)


@jit
def _finish(parts: tl.tensor, fields: tl.tensor, norm: tl.tensor) -> tl.tensor:
    """The sums of the parts of each of some norms, always in the same order."""
    kept = tl.load(fields + 3).to(tl.int32)
    after = tl.load(fields + 8).to(tl.int32)
    count = tl.load(fields + 7).to(tl.int32) * after
    parts += tl.load(fields + 6)
    sums = tl.zeros((_FINISH_KEPT, _FINISH_PARTS), tl.float32)
    for start in range(0, count, _FINISH_PARTS):
        part = start + tl.arange(0, _FINISH_PARTS)
        # The parts are laid out as the weight is: (blocks of before, kept, parts of after).
        at = (part // after).to(tl.int64) * kept * after + part % after
        mask = (norm < kept)[:, None] & (part < count)[None, :]
        sums += tl.load(parts + at[None, :] + (norm * after)[:, None], mask=mask, other=0.0)
    return tl.sum(sums, axis=1)


@jit
def finish_forward(fields: tl.tensor, items: tl.tensor, parts: tl.tensor, norms: tl.tensor) -> None:
    """Norms from the parts of their squares."""
    item = items + tl.program_id(0) * 2
    fields += tl.load(item) * _FIELDS
    norm = tl.load(item + 1) + tl.arange(0, _FINISH_KEPT)
    _, _, _, eps = _member(fields)
    found = _clamped_norm(_finish(parts, fields, norm), eps)
    tl.store(norms + tl.load(fields + 1) + norm, found, mask=norm < tl.load(fields + 3))


@jit
def finish_backward(
    pointers: tl.tensor, fields: tl.tensor, items: tl.tensor, parts: tl.tensor,
    norms: tl.tensor, dots: tl.tensor, grad_g: tl.tensor,
) -> None:  # fmt: skip
    """The gradient of g, and sum(v · dw), from the parts of the latter."""
    item = items + tl.program_id(0) * 2
    member = tl.load(item)
    fields += member * _FIELDS
    if tl.load(pointers + member * 3 + 2) != 0:
        norm = tl.load(item + 1) + tl.arange(0, _FINISH_KEPT)
        here = norm < tl.load(fields + 3)
        dot = _finish(parts, fields, norm)
        at = tl.load(fields + 1) + norm
        grad = tl.div_rn(dot, tl.load(norms + at, mask=here, other=1.0))
        tl.store(dots + at, dot, mask=here)
        tl.store(grad_g + at, grad, mask=here)


@jit
def _split_forward(
    tensors: tl.tuple, fields: tl.tensor, i: tl.tensor, j: tl.tensor,
    dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    v, g, weights, norms = tensors
    place, index, here = _tile(fields, i, j, vector)
    magnitude = tl.load(g + index, mask=here, other=0.0).to(tl.float32)
    scale = tl.div_rn(magnitude, tl.load(norms + index, mask=here, other=1.0))
    _write(weights, place, _read(v, dtype, place, vector) * scale[None, :])


@jit
def split_forward(
    pointers: tl.tensor, fields: tl.tensor, items: tl.tensor, weights: tl.tensor, norms: tl.tensor,
    dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    """Weights, from norms that are known."""
    i, j, fields, v, g, _ = _open(pointers, fields, items, dtype)
    weights += tl.multiple_of(tl.load(fields), 64)
    tensors = v, g, weights, norms + tl.load(fields + 1)
    if _is_aligned(v) & _is_even(fields, vector):
        _split_forward(tensors, fields, i, j, dtype, vector)
    else:
        _split_forward(tensors, fields, i, j, dtype, 1)


@jit
def _split_backward(
    tensors: tl.tuple, fields: tl.tensor, i: tl.tensor, j: tl.tensor,
    dtype: tl.constexpr, grad_dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    v, g, dw, norms, dots, grad_v = tensors
    place, index, here = _tile(fields, i, j, vector)
    magnitude = tl.load(g + index, mask=here, other=0.0).to(tl.float32)
    norm = tl.load(norms + index, mask=here, other=1.0)
    scale = tl.div_rn(magnitude, norm)
    dot = tl.load(dots + index, mask=here, other=0.0)
    _, _, _, eps = _member(fields)
    along = _along(dot, scale, norm, eps)
    x, d = _read(v, dtype, place, vector), _read(dw, grad_dtype, place, vector)
    _write(grad_v, place, d * scale[None, :] - x * along[None, :])


@jit
def split_backward(
    pointers: tl.tensor, fields: tl.tensor, items: tl.tensor, norms: tl.tensor, dots: tl.tensor,
    grad_v: tl.tensor, dtype: tl.constexpr, grad_dtype: tl.constexpr, vector: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of v, from norms and sums that are known."""
    i, j, fields, v, g, dw = _open(pointers, fields, items, dtype)
    grad_v += tl.multiple_of(tl.load(fields), 64)
    at = tl.load(fields + 1)
    tensors = v, g, dw, norms + at, dots + at, grad_v
    if dw != 0:
        if _is_aligned(v) & _is_aligned(dw) & _is_even(fields, vector):
            _split_backward(tensors, fields, i, j, dtype, grad_dtype, vector)
        else:
            _split_backward(tensors, fields, i, j, dtype, grad_dtype, 1)
