"""Computing weights from g and v, and the other tensors that a plan asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wn_surgery.checkpoints.plan import Kind, Line, unfoldable
from wn_surgery.checkpoints.request import Request
from wn_surgery.checkpoints.spectral import spectral_weight
from wn_surgery.errors import CheckpointError, ZeroNormError
from wn_surgery.norm.limits import zero_slices
from wn_surgery.norm.math import KERNEL_DTYPES, g_shape, magnitude, real_dtype
from wn_surgery.norm.operator import weight_norm
from wn_surgery.norm.options import NormOptions

__all__ = ["all_finite", "compute", "fold", "held_by", "kind_of"]

PART = 1 << 22
"""Elements that are widened at a time: 16 MB in float32."""


def fold(g: Tensor, v: Tensor, options: NormOptions | None = None) -> Tensor:
    """The weight of g and v, computed in float32 or better and rounded once.

    Args:
        g: the magnitude, in any shape that checkpoints have: v's with 1 along the axes that are
            normed, or of one axis, or of none.
        v: the direction, floating or complex.
        options: dim, eps and norm_dtype; dim 0 by default.

    Returns:
        The weight, in v's shape and dtype. For g and v of one dtype it is what the live model
        computes, bit for bit, with one exception: bfloat16 and float16 along axes that torch's
        kernel does not know, where the live model rounds after each step.

    Raises:
        CheckpointError: one of them is not floating-point, or not dense.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints import fold
        >>> fold(torch.tensor([10.0]), torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
    """
    options = options or NormOptions()
    dim, eps, norm_dtype = options
    if said := unfoldable(kind_of(g), kind_of(v)):
        raise CheckpointError(f"g and v {said}")
    g = g.reshape(g_shape(v.shape, dim))
    real = real_dtype(v.dtype)
    with torch.no_grad():
        if norm_dtype is not None:
            return weight_norm(v, g, dim, eps, norm_dtype)
        if g.dtype == real and (
            real in (torch.float32, torch.float64)
            # The kernel itself widens these, and rounds once.
            or (v.dtype in KERNEL_DTYPES and dim in (0, v.ndim - 1) and eps == 0.0)
        ):
            return weight_norm(v, g, dim, eps)
        wide = torch.float64 if torch.float64 in (real, g.dtype) else torch.float32
        return _rounded_once(g.to(wide), v, options, wide)


def _rounded_once(g: Tensor, v: Tensor, options: NormOptions, wide: torch.dtype) -> Tensor:
    dim, eps = options.dim, options.eps
    as_wide = wide.to_complex() if v.dtype.is_complex else wide
    if dim is None or dim == () or v.numel() <= PART:
        return weight_norm(v.to(as_wide), g, dim, eps).to(v.dtype)
    # A part of the slices at a time: three wide copies of a large tensor would be six of its own.
    axis = dim if isinstance(dim, int) else max(dim, key=lambda each: v.shape[each])
    step = max(1, PART * v.shape[axis] // v.numel())
    w = torch.empty_like(v)
    for start in range(0, v.shape[axis], step):
        count = min(step, v.shape[axis] - start)
        part = v.narrow(axis, start, count).to(as_wide)
        made = weight_norm(part, g.narrow(axis, start, count), dim, eps)
        w.narrow(axis, start, count).copy_(made)
    return w


def kind_of(tensor: Tensor) -> Kind:
    """What a plan has to know of a tensor besides its shape."""
    return tensor.dtype if tensor.layout is torch.strided else tensor.layout


def compute(line: Line, read: Callable[[str], Tensor], asked: Request) -> Tensor:
    """The tensor that a line of a plan asks for; ``read`` gives the sources."""
    parts = [read(source) for source in line.sources]
    first = parts[0]
    if line.do == "copy":
        return first if tuple(first.shape) == line.shape else first.reshape(line.shape)
    if line.do == "spectral":
        return spectral_weight(parts, line.sources[0], asked.dim)
    if line.do == "magnitude":
        return _magnitude(first, line)
    v = parts[1]
    if first.is_meta != v.is_meta:
        part = line.sources[v.is_meta]
        raise CheckpointError(f"{part!r} is on the meta device and has no values; load it first")
    w = fold(first, v, line.options)
    if asked.non_finite == "error" and not all_finite(w):
        dim = line.options.dim
        zero = zero_slices(v.float() if v.itemsize < 4 else v, dim)
        cause = (
            f"v has {zero} slices of zero or non-finite norm along dim={dim}"
            if zero
            else f"g has {int((~first.isfinite()).sum())} numbers that are not finite"
        )
        raise ZeroNormError(
            f"{line.key!r} would hold {int((~w.isfinite()).sum())} numbers that are NaN or "
            f"infinite: {cause}; repair the checkpoint, or pass non_finite='keep' to write them"
        )
    return w


def held_by(line: Line, sizes: Sequence[int], size: int) -> int:
    """Bytes of tensors that :func:`compute` holds at once, for sources and a result of these."""
    if line.do == "copy":
        return size
    kind, count = line.kind, math.prod(line.shape)
    result = sizes[0] if line.do == "magnitude" else size  # which is a norm's by-product
    assert isinstance(kind, torch.dtype)  # what is computed has one
    wide = line.options.norm_dtype
    if wide is not None and wide.itemsize > kind.itemsize:
        result += 2 * max(sizes) // kind.itemsize * wide.itemsize
    elif kind.itemsize < 4:
        result += 12 * min(count, PART)  # three tensors of 4 bytes
    return sum(sizes) + (2 if line.do == "spectral" else 1) * result


def all_finite(tensor: Tensor) -> bool:
    """Whether no number of a floating or complex tensor is NaN or infinite."""
    if tensor.is_meta:
        return True  # it has no numbers
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    # In one pass, without a mask: a sum has whatever is not finite in it.
    wide = torch.promote_types(real.dtype, torch.float32)
    # Or it is too large itself.
    return bool(real.sum(dtype=wide).isfinite()) or bool(real.isfinite().all())


def _magnitude(weight: Tensor, line: Line) -> Tensor:
    if count := zero_slices(weight, *line.options):
        raise ZeroNormError(
            f"{line.sources[0]!r} has {count} slices along dim={line.options.dim} whose norm is "
            "zero, not finite, or too small or large for its dtype; give the rule an eps or a "
            "wider norm_dtype, or skip the tensor"
        )
    return magnitude(weight, *line.options)
