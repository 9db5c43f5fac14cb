"""The formulas: values and gradients of w = g · v / max(‖v‖, eps), outside of autograd.

The norm is taken over every axis except those in ``dim`` (Salimans & Kingma 2016,
arXiv:1602.07868, eq. 2). Where torch has a kernel, its bits are the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from wn_surgery.norm.cuts import Cut, is_dtensor, spread
from wn_surgery.norm.modes import traced, transformed
from wn_surgery.norm.options import Dim, kept_axes

__all__ = ["Dim", "g_shape", "magnitude", "norm_except", "wanted_norm"]

KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


def _has_half_on_cpu() -> bool:
    one = torch.ones(1, 1, dtype=torch.float16, device="cpu")  # whatever the default is
    try:
        torch._weight_norm_interface(one, one)
    except RuntimeError:  # torch 2.6
        return False
    return True


_HALF_ON_CPU = _has_half_on_cpu()


def g_shape(shape: torch.Size | tuple[int, ...], dim: Dim) -> tuple[int, ...]:
    """The shape of g: the weight's size along ``dim`` and 1 elsewhere; a scalar for ``None``."""
    if dim is None:
        return ()
    kept = kept_axes(dim)
    return tuple(size if axis in kept else 1 for axis, size in enumerate(shape))


def wanted_norm(renormalize: float | str, shape: tuple[int, ...], dim: Dim) -> float:
    """The norm of one slice that a rule's ``renormalize`` asks for; ``"rms"`` is 1 per element."""
    if isinstance(renormalize, str):
        return math.sqrt(math.prod(shape) / math.prod(g_shape(shape, dim)))
    return renormalize


def norm_except(v: Tensor, dim: Dim, eps: float = 0.0) -> Tensor:
    """The 2-norm of ``v`` over every axis except ``dim``, of shape ``g_shape``, clamped at ``eps``.

    Where ``eps`` is reached the gradient is zero to every order, so a zero slice gives no NaN.
    """
    raw = _norm(v, dim)
    if eps == 0.0:
        return raw
    # The usual clamp_min is right to first order only: at v = 0 the norm's own second
    # derivative is 0 · inf. So the norm is taken of a tensor that has no small slice.
    small = raw.detach() <= eps
    safe = torch.where(small, torch.ones_like(v), v)
    return torch.where(small, eps, _norm(safe, dim))


def magnitude(
    v: Tensor, dim: Dim, eps: float = 0.0, norm_dtype: torch.dtype | None = None
) -> Tensor:
    """The g for which ``weight_norm(v, g)`` gives back ``v``: real, detached, in v's precision.

    It is the norm as the forward itself computes it, so the weight is ``v`` bit for bit;
    ``torch.norm_except_dim`` sums in another order and is off by an ulp or two. In bfloat16 and
    float16 g is rounded while the kernel's norm is not, and the last place may change, as in torch.
    """
    with torch.no_grad():
        norms = computed_norms(v.detach(), dim, eps, norm_dtype)
        g = (norms if eps == 0.0 else norms.clamp_min(eps)).to(real_dtype(v.dtype))
        return Cut(v, dim).magnitude(g, g_shape(v.shape, dim)) if is_dtensor(v) else g


def filled(v: Tensor, dim: Dim, value: float) -> Tensor:
    """A g for ``v`` in which every magnitude is ``value``."""
    g = torch.full(g_shape(v.shape, dim), value, dtype=real_dtype(v.dtype), device=v.device)
    return spread(g, Cut(v, dim)) if is_dtensor(v) else g


def computed_norms(v: Tensor, dim: Dim, eps: float, norm_dtype: torch.dtype | None) -> Tensor:
    """The norms of the forward, before they are clamped: of torch's kernel, or of the formula.

    Of a DTensor, the norms of this rank's slices.
    """
    if is_dtensor(v):
        cut, part = Cut(v, dim), v.to_local()
        if cut.total is not None:
            return _norm_of_parts(in_dtype(part, norm_dtype), dim, cut.total)
        v = part
    if has_kernel(v, dim, eps, norm_dtype):
        ones = v.new_ones(g_shape(v.shape, dim))
        # Through Any: has_kernel has checked that dim is an int.
        return torch._weight_norm_interface(v.contiguous(), ones, cast(Any, dim))[1]
    if v.is_meta:
        return _norms_on_meta(v, dim, norm_dtype)
    return _norm(in_dtype(v, _wide(v, dim, eps, norm_dtype)), dim)


def _wide(v: Tensor, dim: Dim, eps: float, norm_dtype: torch.dtype | None) -> torch.dtype | None:
    """``norm_dtype``, or float32 where the formula stands in for a kernel, which widens float16."""
    if norm_dtype is None and _lacks_kernel(v) and eps == 0.0 and dim in (0, v.ndim - 1):
        return torch.float32
    return norm_dtype


def _lacks_kernel(v: Tensor) -> bool:
    return not _HALF_ON_CPU and v.dtype is torch.float16 and v.is_cpu


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of g for weights of ``dtype``."""
    return dtype.to_real() if dtype.is_complex else dtype


def _norm(x: Tensor, dim: Dim) -> Tensor:
    if not isinstance(dim, tuple) and not transformed() and not _empty(x):
        return torch.norm_except_dim(x, 2, -1 if dim is None else dim)
    # norm_except_dim knows neither several axes nor empty tensors nor, for the whole tensor,
    # forward AD.
    if dim is None:
        return cast(Tensor, torch.linalg.vector_norm(x))
    reduced = tuple(axis for axis in range(x.ndim) if axis not in kept_axes(dim))
    if not reduced:  # which vector_norm reads as "every axis"
        return x.abs()
    return cast(Tensor, torch.linalg.vector_norm(x, 2, reduced, keepdim=True))


def _norms_on_meta(v: Tensor, dim: Dim, norm_dtype: torch.dtype | None) -> Tensor:
    """Norms without values. What torch computes on meta, new_empty too, it computes in Python."""
    dtype = norm_dtype or real_dtype(v.dtype)
    return torch.empty(g_shape(v.shape, dim), dtype=dtype, device="meta")


def _norm_of_parts(x: Tensor, dim: Dim, total: Total) -> Tensor:
    """The norms of slices of which other ranks have the rest; in float32 at least, as a kernel."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return total(_norm(wide, dim).square()).sqrt()


def in_dtype(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` in ``dtype``, or in the complex one of that precision."""
    if dtype is None:
        return x
    return x.to(dtype.to_complex() if x.dtype.is_complex else dtype)


def composite(v: Tensor, g: Tensor, dim: Dim, eps: float, norm_dtype: torch.dtype | None) -> Tensor:
    if is_dtensor(g):
        # Its gradient would be a partial sum; this makes it whole.
        g = g.redistribute(placements=g.placements)
    norm_dtype = _wide(v, dim, eps, norm_dtype)
    x = in_dtype(v, norm_dtype)
    norms = norm_except(x, dim, eps)
    w = x * (g.to(norms.dtype) / norms if norm_dtype is not None else g / norms)
    return w.to(v.dtype)


def has_kernel(v: Tensor, dim: Dim, eps: float, norm_dtype: torch.dtype | None) -> bool:
    """Whether torch's fused kernel computes this weight norm."""
    return (
        eps == 0.0
        and norm_dtype is None
        and has_kernel_along(v, dim)
        and v.dtype in KERNEL_DTYPES
        and not is_dtensor(v)
        and not _empty(v)  # torch's kernel divides by the size and takes the process down
    )


def has_kernel_along(v: Tensor, dim: Dim) -> bool:
    """Whether there is a kernel for this device and axis, where dtype and options allow it."""
    return (
        isinstance(dim, int)
        and (dim == 0 or dim == v.ndim - 1)
        and (v.is_cpu or v.is_cuda)
        and not _lacks_kernel(v)
    )


def _empty(v: Tensor) -> bool:
    # While torch.jit traces, a size is a tensor, and asking for its truth is recorded.
    return not traced() and v.numel() == 0


def like(w: Tensor, v: Tensor) -> Tensor:
    """``w`` in the channels_last layout of ``v``, which torch's operator drops."""
    if v.is_contiguous() or v.ndim not in (4, 5):
        return w
    last = torch.channels_last if v.ndim == 4 else torch.channels_last_3d
    return w.contiguous(memory_format=last) if v.is_contiguous(memory_format=last) else w


Total: TypeAlias = Callable[[Tensor], Tensor]
"""Sums over the ranks that have parts of the same slices; may write into what it is given."""


def values(
    v: Tensor,
    g: Tensor,
    dim: Dim,
    eps: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    total: Total | None = None,
) -> tuple[Tensor, Tensor]:
    """The bits of :func:`weight_norm`, and the norms in the form that :func:`gradients` wants.

    For tensors of one of :data:`KERNEL_DTYPES`, and callers that build no graph. With ``total`` v
    and g are this rank's parts.
    """
    if total is None and has_kernel(v, dim, eps, norm_dtype):
        contiguous = v.contiguous()
        # Through Any: has_kernel has checked that dim is an int.
        w, norms = torch._weight_norm_interface(contiguous, g.contiguous(), cast(Any, dim))
        return (w if contiguous is v else like(w, v)), norms
    if v.is_meta:
        w = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")
        return w, _norms_on_meta(v, dim, norm_dtype)
    norm_dtype = _wide(v, dim, eps, norm_dtype)
    x = in_dtype(v, norm_dtype)
    norms = _norm(x, dim) if total is None else _norm_of_parts(x, dim, total)
    if eps != 0.0:
        norms = norms.clamp_min(eps)
    scale = g / norms if norm_dtype is None else g.to(norms.dtype) / norms
    return (x * scale).to(v.dtype), norms


def gradients(
    grad: Tensor,
    v: Tensor,
    g: Tensor,
    norms: Tensor,
    dim: Dim,
    eps: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    total: Total | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of v and g in their dtypes, given that of the weight; no graph is built.

    The paper's eq. 3: grad_g = ⟨grad, v⟩/‖v‖, grad_v = g/‖v‖ · (grad - v ⟨grad, v⟩/‖v‖²), in five
    passes where autograd through the formula takes some thirty. ``norms`` is from :func:`values`.
    """
    if total is None and has_kernel(v, dim, eps, norm_dtype):
        dw = grad.to(v.dtype).contiguous()
        return kernel_backward(dw, v.contiguous(), g.contiguous(), norms, dim)
    wide = torch.promote_types(norm_dtype or v.dtype, torch.float32)
    x, dw = v.contiguous().to(wide), grad.contiguous().to(wide)
    n, m = norms.to(wide), g.to(wide)
    buffer = dw * x
    axes = Axes.of(tuple(v.shape), dim)
    along_v = _sums(buffer, axes, dim).view(m.shape)
    grad_g = (along_v if total is None else total(along_v)) / n
    scale = m / n
    along = scale * grad_g / n
    if eps > 0.0:
        # A clamped norm is a constant; no part of the gradient flows through it.
        along = torch.where(norms > eps, along, 0.0)
    if axes is not None and axes.before > 1:
        # One long row to broadcast: torch is slow where the broadcast axis is short and last.
        rows = (axes.before, axes.kept * axes.after)
        x, dw, buffer = x.view(rows), dw.view(rows), buffer.view(rows)
        scale, along = (t.reshape(-1, 1).expand(-1, axes.after).reshape(-1) for t in (scale, along))
    if is_legacy_batchedtensor(grad):  # is_grads_batched: no writing into
        grad_v = dw * scale - x * along
    else:
        # In memory that was used just now: fresh memory costs as much as the arithmetic.
        grad_v = torch.mul(dw, scale, out=buffer).addcmul_(x, along, value=-1.0)
    return like(grad_v.view(v.shape).to(v.dtype), v), grad_g.to(g.dtype)


kernel_backward: Callable[..., tuple[Tensor, Tensor]]
kernel_backward = torch.ops.aten._weight_norm_interface_backward.default


class Axes(NamedTuple):
    """A contiguous weight seen as (before, kept, after): one norm for each index of ``kept``."""

    before: int
    kept: int
    after: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dim: Dim) -> Axes | None:
        """The three axes that norms are taken over; ``None`` where three do not suffice."""
        if dim is None or dim == ():
            return cls(1, 1, math.prod(shape))
        kept = sorted(kept_axes(dim))
        first, end = kept[0], kept[-1] + 1
        if kept != list(range(first, end)):
            return None
        return cls(math.prod(shape[:first]), math.prod(shape[first:end]), math.prod(shape[end:]))


def _sums(products: Tensor, axes: Axes | None, dim: Dim) -> Tensor:
    """The sums of the slices of a contiguous tensor."""
    if axes is None:
        reduced = [axis for axis in range(products.ndim) if axis not in kept_axes(dim)]
        return products.sum(reduced, keepdim=True)
    if axes.before > 1:
        # The leading axis by itself: torch is slow at reducing both sides of a kept axis.
        products = products.view(axes.before, axes.kept * axes.after).sum(0)
    return products.view(axes.kept, axes.after).sum(1)
