"""The kernels for weights whose slices are longer than a program's registers.

A program does one tile. ``split_sums`` writes the sum of its squares, or of its products;
``finish_*`` adds those of a slice up, always in the same order; ``split_forward`` and
``split_backward`` read the tile again and write the result.
"""

from __future__ import annotations

import triton.language as tl

from wn_surgery.fused.triton.kernels import (
    address_of,
    along_v,
    eps_of,
    is_aligned,
    jit,
    multiple,
    norm_of,
    pointer_to,
)
from wn_surgery.fused.triton.tables import (
    COLUMNS,
    FIELDS,
    FINISH_KEPT,
    FINISH_PARTS,
    HEIGHT,
    TILE,
)

__all__ = ["finish_backward", "finish_forward", "split_backward", "split_forward", "split_sums"]

_FIELDS = tl.constexpr(FIELDS)
_TILE = tl.constexpr(TILE)
_HEIGHT = tl.constexpr(HEIGHT)
_COLUMNS = tl.constexpr(COLUMNS)
_FINISH_KEPT = tl.constexpr(FINISH_KEPT)
_FINISH_PARTS = tl.constexpr(FINISH_PARTS)


@jit
def _tile(fields: tl.tensor, i: tl.tensor, j: tl.tensor, vector: tl.constexpr) -> tl.tensor:
    """Offsets, mask, and the norm of each column, of one tile.

    The tile is ``HEIGHT`` rows of ``COLUMNS`` neighbours each: of (before, kept · after), or,
    if ``before`` is 1, of a run of one long row, whose rows follow each other.
    """
    before = tl.load(fields + 2).to(tl.int32)
    kept = tl.load(fields + 3).to(tl.int32)
    after = tl.load(fields + 4).to(tl.int32)
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
    stride, start, valid = (
        multiple(stride, vector),
        multiple(start, vector),
        multiple(valid, vector),
    )
    offsets = row[:, None] * stride + column[None, :]
    return start, offsets, column[None, :] < valid[:, None], norm, norm < kept


@jit
def _is_even(fields: tl.tensor, vector: tl.constexpr) -> tl.tensor:
    """Whether the rows of every tile start at a multiple of ``vector`` elements."""
    before = tl.load(fields + 2)
    after = tl.load(fields + 4)
    return tl.where(before > 1, tl.load(fields + 3) * after, after) % vector == 0


@jit
def _sums(
    v: tl.tensor,
    dw: tl.tensor,
    parts: tl.tensor,
    fields: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    start, offsets, mask, _, _ = _tile(fields, i, j, vector)
    x = tl.load(pointer_to(v, dtype, vector) + start + offsets, mask=mask, other=0.0).to(tl.float32)
    if grad_dtype is None:
        y = x
    else:
        y = tl.load(pointer_to(dw, grad_dtype, vector) + start + offsets, mask=mask, other=0.0)
    sums = tl.sum(x * y.to(tl.float32), axis=0)
    if tl.load(fields + 2) > 1:
        width = tl.load(fields + 3) * tl.load(fields + 4)
        column = j * _COLUMNS + tl.arange(0, _COLUMNS)
        tl.store(parts + i * width + column, sums, mask=column < width)
    else:
        tl.store(parts + i.to(tl.int64) * tl.load(fields + 8) + j, tl.sum(sums, axis=0))


@jit
def split_sums(
    pointers: tl.tensor,
    fields: tl.tensor,
    items: tl.tensor,
    parts: tl.tensor,
    dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    """The parts of sum(v · v), or of sum(v · dw) where ``grad_dtype`` is given."""
    item = items + tl.program_id(0) * 3
    member, i, j = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    fields += member * _FIELDS
    parts += tl.load(fields + 6)
    v = address_of(pointers, member, 0)
    dw = v if grad_dtype is None else address_of(pointers, member, 2)
    if dw != 0:
        if is_aligned(v) & is_aligned(dw) & _is_even(fields, vector):
            _sums(v, dw, parts, fields, i, j, dtype, grad_dtype, vector)
        else:
            _sums(v, dw, parts, fields, i, j, dtype, grad_dtype, 1)


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
    squares = _finish(parts, fields, norm)
    norms += tl.load(fields + 1)
    tl.store(norms + norm, norm_of(squares, eps_of(fields)), mask=norm < tl.load(fields + 3))


@jit
def finish_backward(
    pointers: tl.tensor,
    fields: tl.tensor,
    items: tl.tensor,
    parts: tl.tensor,
    norms: tl.tensor,
    dots: tl.tensor,
    grad_g: tl.tensor,
) -> None:
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
    v: tl.tensor,
    g: tl.tensor,
    w: tl.tensor,
    norms: tl.tensor,
    fields: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    start, offsets, mask, norm, here = _tile(fields, i, j, vector)
    magnitude = tl.load(g + norm, mask=here, other=0.0).to(tl.float32)
    scale = tl.div_rn(magnitude, tl.load(norms + norm, mask=here, other=1.0))
    x = tl.load(pointer_to(v, dtype, vector) + start + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(w + start + offsets, x * scale[None, :], mask=mask)


@jit
def split_forward(
    pointers: tl.tensor,
    fields: tl.tensor,
    items: tl.tensor,
    weights: tl.tensor,
    norms: tl.tensor,
    dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    """Weights, from norms that are known."""
    item = items + tl.program_id(0) * 3
    member, i, j = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    v = address_of(pointers, member, 0)
    g = pointer_to(address_of(pointers, member, 1), dtype, 1)
    fields += member * _FIELDS
    w = weights + tl.multiple_of(tl.load(fields), 64)
    norms += tl.load(fields + 1)
    if is_aligned(v) & _is_even(fields, vector):
        _split_forward(v, g, w, norms, fields, i, j, dtype, vector)
    else:
        _split_forward(v, g, w, norms, fields, i, j, dtype, 1)


@jit
def _split_backward(
    v: tl.tensor,
    g: tl.tensor,
    dw: tl.tensor,
    norms: tl.tensor,
    dots: tl.tensor,
    grad_v: tl.tensor,
    fields: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    start, offsets, mask, index, here = _tile(fields, i, j, vector)
    magnitude = tl.load(g + index, mask=here, other=0.0).to(tl.float32)
    norm = tl.load(norms + index, mask=here, other=1.0)
    scale = tl.div_rn(magnitude, norm)
    dot = tl.load(dots + index, mask=here, other=0.0)
    along = along_v(dot, scale, norm, eps_of(fields))
    x = tl.load(pointer_to(v, dtype, vector) + start + offsets, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(pointer_to(dw, grad_dtype, vector) + start + offsets, mask=mask, other=0.0).to(
        tl.float32
    )
    grad = d * scale[None, :] - x * along[None, :]
    tl.store(grad_v + start + offsets, grad, mask=mask)


@jit
def split_backward(
    pointers: tl.tensor,
    fields: tl.tensor,
    items: tl.tensor,
    norms: tl.tensor,
    dots: tl.tensor,
    grad_v: tl.tensor,
    dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    """The gradient of v, from norms and sums that are known."""
    item = items + tl.program_id(0) * 3
    member, i, j = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    v = address_of(pointers, member, 0)
    g = pointer_to(address_of(pointers, member, 1), dtype, 1)
    dw = address_of(pointers, member, 2)
    fields += member * _FIELDS
    grad_v += tl.multiple_of(tl.load(fields), 64)
    at = tl.load(fields + 1)
    norms += at
    dots += at
    if dw != 0:
        if is_aligned(v) & is_aligned(dw) & _is_even(fields, vector):
            _split_backward(v, g, dw, norms, dots, grad_v, fields, i, j, dtype, grad_dtype, vector)
        else:
            _split_backward(v, g, dw, norms, dots, grad_v, fields, i, j, dtype, grad_dtype, 1)
