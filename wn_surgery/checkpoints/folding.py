"""The weight of a g and a v that come from a file."""

from __future__ import annotations

import torch
from torch import Tensor

from wn_surgery.checkpoints.pairs import Options, Pair
from wn_surgery.errors import CheckpointError, ZeroNormError
from wn_surgery.norm.limits import zero_slices
from wn_surgery.norm.math import (
    KERNEL_DTYPES,
    g_shape,
    magnitude,
    weight_norm,
)

__all__ = ["all_finite", "computable", "fold", "magnitude_of", "refuse_non_finite"]

PART = 1 << 22
"""Elements that are widened at a time: 16 MB in float32."""


def fold(g: Tensor, v: Tensor, options: Options | None = None) -> Tensor:
    """The weight of g and v, computed in float32 or better and rounded once.

    Args:
        g: the magnitude, in any shape that ``find_pairs`` accepts.
        v: the direction, floating or complex.
        options: dim, eps and norm_dtype; dim 0 by default.

    Returns:
        The weight, in v's shape and dtype. For g and v of one dtype it is what the live model
        computes, bit for bit, with one exception: bfloat16 and float16 along axes that torch's
        kernel does not know, where the live model rounds after each step.

    Raises:
        CheckpointError: one of them is not floating-point.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints import fold
        >>> fold(torch.tensor([10.0]), torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
    """
    options = options or Options()
    dim = options.dim
    if not computable(g.dtype, complex_too=False) or not computable(v.dtype, complex_too=True):
        raise CheckpointError(
            f"g and v are {g.dtype} and {v.dtype}: expected floating-point ones of 16 bits or "
            "more; was the checkpoint quantized before its weight norm was stripped?"
        )
    if g.layout is not torch.strided or v.layout is not torch.strided:
        raise CheckpointError(f"g and v are {g.layout} and {v.layout}: expected dense tensors")
    g = g.reshape(g_shape(v.shape, dim))
    real = v.dtype.to_real() if v.dtype.is_complex else v.dtype
    with torch.no_grad():
        if options.norm_dtype is not None:
            return weight_norm(v, g, dim, options.eps, getattr(torch, options.norm_dtype))
        if g.dtype == real and (
            real in (torch.float32, torch.float64)
            # The kernel itself widens these, and rounds once.
            or (v.dtype in KERNEL_DTYPES and dim in (0, v.ndim - 1) and options.eps == 0.0)
        ):
            return weight_norm(v, g, dim, options.eps)
        wide = torch.float64 if torch.float64 in (real, g.dtype) else torch.float32
        return _rounded_once(g.to(wide), v, options, wide)


def computable(dtype: torch.dtype, *, complex_too: bool) -> bool:
    """Whether g, or v (``complex_too``), may have a dtype.

    8 bits of floating point are storage, with scales elsewhere that this library does not know.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints.folding import computable
        >>> computable(torch.bfloat16, complex_too=False), computable(torch.int8, complex_too=True)
        (True, False)
    """
    return (dtype.is_floating_point and dtype.itemsize > 1) or (complex_too and dtype.is_complex)


def _rounded_once(g: Tensor, v: Tensor, options: Options, wide: torch.dtype) -> Tensor:
    dim, eps = options.dim, options.eps
    as_wide = wide.to_complex() if v.dtype.is_complex else wide
    if dim is None or v.numel() <= PART:
        return weight_norm(v.to(as_wide), g, dim, eps).to(v.dtype)
    # A part of the slices at a time: three wide copies of a large tensor would be six of its own.
    axis = dim if isinstance(dim, int) else max(dim, key=lambda each: v.shape[each])
    step = max(1, PART * v.shape[axis] // v.numel())
    w = torch.empty_like(v)
    for start in range(0, v.shape[axis], step):
        count = min(step, v.shape[axis] - start)
        part = v.narrow(axis, start, count).to(as_wide)
        w.narrow(axis, start, count).copy_(
            weight_norm(part, g.narrow(axis, start, count), dim, eps)
        )
    return w


def all_finite(tensor: Tensor) -> bool:
    """Whether no number of a floating or complex tensor is NaN or infinite.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints.folding import all_finite
        >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([float("nan")]))
        (True, False)
    """
    if tensor.is_meta:
        return True  # it has no numbers
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    # In one pass, without a mask: a sum has whatever is not finite in it.
    wide = torch.promote_types(real.dtype, torch.float32)
    # Or it is too large itself.
    return bool(real.sum(dtype=wide).isfinite()) or bool(real.isfinite().all())


def refuse_non_finite(w: Tensor, g: Tensor, v: Tensor, pair: Pair) -> None:
    """Raise where a weight is NaN or infinite.

    Args:
        w: the weight.
        g: what it was computed from.
        v: the same.
        pair: its names.

    Raises:
        ZeroNormError: it is; the message says whether a slice of v has no direction.
    """
    if all_finite(w):
        return
    count = int((~w.isfinite()).sum())
    zero = zero_slices(v.float() if v.itemsize < 4 else v, pair.dim)
    cause = (
        f"v has {zero} slices of zero or non-finite norm along dim={pair.dim}"
        if zero
        else f"g has {int((~g.isfinite()).sum())} numbers that are not finite"
    )
    raise ZeroNormError(
        f"{pair.weight!r} would hold {count} numbers that are NaN or infinite: {cause}; repair the "
        "checkpoint, or write them by non_finite='keep' (--keep-non-finite)"
    )


def magnitude_of(weight: Tensor, key: str, options: Options) -> Tensor:
    """The g that a plain weight gets.

    Args:
        weight: floating or complex.
        key: its name, for the error.
        options: dim, eps and norm_dtype.

    Returns:
        g, in the shape of ``wn_surgery.norm.math.g_shape`` and the weight's precision.

    Raises:
        ZeroNormError: a slice has zero or non-finite norm, so there is no direction.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints.folding import magnitude_of
        >>> from wn_surgery.checkpoints.pairs import Options
        >>> magnitude_of(torch.tensor([[3.0, 4.0]]), "weight", Options())
        tensor([[5.]])
    """
    norm_dtype = None if options.norm_dtype is None else getattr(torch, options.norm_dtype)
    if count := zero_slices(weight, options.dim, options.eps, norm_dtype):
        raise ZeroNormError(
            f"{key!r} has {count} slices along dim={options.dim} whose norm is zero, not finite, "
            "or too small or large for its dtype; give the rule an eps or a wider norm_dtype, or "
            "skip the tensor"
        )
    return magnitude(weight, options.dim, options.eps, norm_dtype)
