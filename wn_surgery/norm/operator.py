"""The operator: a weight from g and v, in eager mode, under a tracer or a transform.

With the default options the values are those of ``torch._weight_norm`` bit for bit; what differs
is that second-order gradients are right and that forward-mode AD, ``torch.func`` and vmap work.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from wn_surgery.norm.cuts import is_dtensor
from wn_surgery.norm.math import (
    KERNEL_DTYPES,
    PLAIN_TYPES,
    composite,
    g_shape,
    has_kernel,
    like,
    values,
)
from wn_surgery.norm.modes import jit_traced, traced, transformed
from wn_surgery.norm.nodes import recorded_weight, weight_of_parts
from wn_surgery.norm.options import Dim

__all__ = ["weight_norm"]

# Each access asks for it, with few different shapes.
_expected = functools.lru_cache(maxsize=4096)(g_shape)


def weight_norm(
    v: Tensor, g: Tensor, dim: Dim = 0, eps: float = 0.0, norm_dtype: torch.dtype | None = None
) -> Tensor:
    """The weight w = g · v / max(‖v‖, eps): shape, dtype, device and channels_last layout of ``v``.

    With ``norm_dtype`` the norm and the product are computed in it, for example in float32 under
    bfloat16 weights. A g of another shape than ``g_shape(v.shape, dim)`` is a ``ValueError``.

    For DTensors the weight is placed as v. If v is cut along a normed axis, a tensor of g's size is
    summed over the ranks, once forward and once backward; otherwise nothing is sent.
    """
    if traced():
        if not jit_traced():  # to torch.jit a size is a tensor
            _check_shape(v, g, dim)
        # A tracer wants one known operator; it never differentiates twice. For vectors,
        # though, torch's decomposition of it sums along the kept axis.
        if has_kernel(v, dim, eps, norm_dtype) and g.dtype is v.dtype and v.ndim > 1:
            return like(torch._weight_norm(v, g, cast(int, dim)), v)
    elif (
        g.dtype is v.dtype in KERNEL_DTYPES
        and type(v) in PLAIN_TYPES
        and type(g) in PLAIN_TYPES
        and g.device == v.device
        and v.numel() > 0
        and not transformed()
    ):
        # torch's kernel would read past the end of a g that is too short.
        if g.shape != _expected(v.shape, dim):
            _check_shape(v, g, dim)
        if not torch.is_grad_enabled() or not (v.requires_grad or g.requires_grad):
            return values(v, g, dim, eps, norm_dtype)[0]
        if torch.is_inference_mode_enabled():
            with torch.no_grad():  # inference mode does not imply it
                return values(v, g, dim, eps, norm_dtype)[0]
        return recorded_weight(v, g, dim, eps, norm_dtype)
    else:
        _check_shape(v, g, dim)
        if is_dtensor(v) and g.dtype is v.dtype in KERNEL_DTYPES and not transformed():
            return weight_of_parts(v, g, dim, eps, norm_dtype)
    return composite(v, g, dim, eps, norm_dtype)


def _check_shape(v: Tensor, g: Tensor, dim: Dim) -> None:
    if g.shape != (expected := g_shape(v.shape, dim)):
        raise ValueError(
            f"g has shape {tuple(g.shape)}; expected {expected} for a v of shape "
            f"{tuple(v.shape)} and dim={dim}"
        )
