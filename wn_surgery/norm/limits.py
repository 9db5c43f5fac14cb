"""Which norms weight norm can divide by, and g can hold.

A norm is taken in one dtype, g is stored in another, and squares overflow or vanish long before the
numbers do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wn_surgery.norm.cuts import Cut, is_dtensor
from wn_surgery.norm.math import computed_norms, g_shape, in_dtype, norm_except, real_dtype
from wn_surgery.norm.options import Dim

__all__ = ["has_easy_norms", "least_norm", "zero_slices"]


def zero_slices(
    v: Tensor,
    dim: Dim,
    eps: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    g_init: float | None = None,
) -> int:
    """How many slices of ``v`` have a norm that weight norm cannot divide by, or g cannot hold.

    The norm is taken as the forward takes it, in ``norm_dtype``, and stored as g, in v's dtype.
    A slice counts if its norm is not finite; if it is so small that the squares under it have
    lost digits (3e-16 in float32), and ``eps`` is not above that; if g is not finite or 0; or if
    g (or ``g_init``) divided by the norm does not fit the norm's dtype. ``v`` is not on meta.
    Of a DTensor every rank gets the same number, and has to ask for it.
    """
    if v.numel() == 0:
        return math.prod(g_shape(v.shape, dim))
    # What is easy differs from rank to rank, and what is sent must not.
    if g_init is None and not is_dtensor(v) and has_easy_norms(v, dim, norm_dtype):
        return 0
    stored = real_dtype(v.dtype)
    norms = computed_norms(v.detach(), dim, eps, norm_dtype)
    # torch's kernel sums in float32 at least, and gives out that.
    divided = torch.finfo(norms.dtype)
    # Half precision is summed in float32, and would take the limits below for 0.
    norms = norms.to(torch.promote_types(norms.dtype, torch.float32))
    blurred = norms < max(least_norm(norms.dtype), divided.smallest_normal)
    if eps != 0.0:
        blurred &= norms > eps
    norms = norms.clamp_min(eps)
    bad = blurred | ~norms.isfinite()
    if g_init is None:
        g = norms.to(stored)
        bad |= (g == 0) | ~g.isfinite()
    elif g_init != 0.0:
        ratio = abs(g_init) / norms
        bad |= (ratio < divided.smallest_normal) | (ratio > divided.max)
    found = int(bad.sum())
    return Cut(v, dim).count(found, v) if is_dtensor(v) else found


def has_easy_norms(v: Tensor, dim: Dim, norm_dtype: torch.dtype | None = None) -> bool:
    """Whether :func:`zero_slices` is surely 0, for any ``eps``, by one pass. ``v`` is not empty."""
    norms = norm_except(in_dtype(v.detach(), norm_dtype), dim)
    low, high = torch.stack(torch.aminmax(norms)).tolist()
    dtypes = (norms.dtype, real_dtype(v.dtype))
    summed = torch.promote_types(norms.dtype, torch.float32)
    least = max(least_norm(summed), *(torch.finfo(dtype).smallest_normal for dtype in dtypes))
    most = min(math.sqrt(torch.finfo(summed).max), *(torch.finfo(dtype).max for dtype in dtypes))
    return bool(2 * least <= low and high <= most / 2)


def least_norm(summed: torch.dtype) -> float:
    """The smallest norm whose squares lose no digits where they are summed."""
    limits = torch.finfo(summed)
    return math.sqrt(limits.smallest_normal / limits.eps)
