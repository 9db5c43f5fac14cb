"""The mathematics: w = g · v / max(‖v‖, eps), with gradients of every order.

The norm is taken over every axis except those in ``dim`` (Salimans & Kingma 2016,
arXiv:1602.07868, eq. 2). With the default options the values are those of
``torch._weight_norm`` bit for bit; what differs is that second-order gradients are right
and that forward-mode AD, ``torch.func`` and vmap work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Dim", "g_shape", "magnitude", "norm_except", "weight_norm", "zero_slices"]

Dim: TypeAlias = "int | tuple[int, ...] | None"

KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


def g_shape(shape: torch.Size | tuple[int, ...], dim: Dim) -> tuple[int, ...]:
    """The shape of the magnitude g of a weight: its size along ``dim``, 1 elsewhere.

    Args:
        shape: the weight's shape.
        dim: the axes that keep a norm of their own; ``None`` for one norm of the whole
            tensor, whose g is a scalar as in torch.

    Returns:
        The shape of g. It has the rank of the weight, or 0 for ``dim=None``.

    Example:
        >>> from wn_surgery.norm import g_shape
        >>> g_shape((64, 32, 7), 0), g_shape((64, 32, 7), (0, 2)), g_shape((64, 32), None)
        ((64, 1, 1), (64, 1, 7), ())
    """
    if dim is None:
        return ()
    kept = (dim,) if isinstance(dim, int) else dim
    return tuple(size if axis in kept else 1 for axis, size in enumerate(shape))


def norm_except(v: Tensor, dim: Dim, eps: float = 0.0) -> Tensor:
    """The 2-norm of ``v`` over every axis except ``dim``, clamped below at ``eps``.

    Args:
        v: floating or complex, any shape.
        dim: the axes that keep a norm of their own; ``None`` for the whole tensor.
        eps: the smallest norm returned. The gradient is zero where it is reached, to
            every order, so a zero slice gives no NaN.

    Returns:
        Real tensor of shape ``g_shape(v.shape, dim)``.

    Example:
        >>> import torch
        >>> from wn_surgery.norm import norm_except
        >>> norm_except(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 0, eps=1e-6).flatten()
        tensor([5.0000e+00, 1.0000e-06])
    """
    raw = _norm(v, dim)
    if eps == 0.0:
        return raw
    # The usual clamp_min is right to first order only: at v = 0 the norm's own second
    # derivative is 0 · inf. So the norm is taken of a tensor that has no small slice.
    small = raw.detach() <= eps
    safe = torch.where(small, torch.ones_like(v), v)
    return torch.where(small, eps, _norm(safe, dim))


def weight_norm(
    v: Tensor,
    g: Tensor,
    dim: Dim = 0,
    eps: float = 0.0,
    norm_dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight w = g · v / max(‖v‖, eps).

    Args:
        v: the direction, floating or complex, any shape.
        g: the magnitude, real, of shape ``g_shape(v.shape, dim)``.
        dim: the axes that keep a norm of their own; ``None`` for the whole tensor.
        eps: lower clamp of the norm, in the units of the weight.
        norm_dtype: the dtype in which the norm and the product are computed, for
            example ``torch.float32`` under bfloat16 weights; ``None`` for v's own.

    Returns:
        The weight: shape, dtype, device and channels_last layout of ``v``.

    Example:
        >>> import torch
        >>> from wn_surgery.norm import weight_norm
        >>> weight_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]))
        tensor([[6., 8.]])
    """
    if eps == 0.0 and norm_dtype is None and _kernel_exists(v, g, dim):
        assert isinstance(dim, int)  # narrows the type; _kernel_exists has checked it
        if traced():
            # A tracer wants one known operator; it never differentiates twice. For vectors,
            # though, torch's decomposition of it sums along the kept axis.
            if v.ndim > 1:
                return like(torch._weight_norm(v, g, dim), v)
        elif not transformed() and type(v) in _PLAIN_TYPES and type(g) in _PLAIN_TYPES:
            contiguous = v.contiguous()
            if torch.is_grad_enabled() and (v.requires_grad or g.requires_grad):
                w: Tensor = _fused(contiguous, g.contiguous(), dim)
            else:
                w = torch._weight_norm_interface(contiguous, g.contiguous(), dim)[0]
            return w if contiguous is v else like(w, v)
    return _composite(v, g, dim, eps, norm_dtype)


def magnitude(
    v: Tensor, dim: Dim, eps: float = 0.0, norm_dtype: torch.dtype | None = None
) -> Tensor:
    """The g for which ``weight_norm(v, g)`` gives back ``v``.

    It is the norm as the forward itself computes it, so g / ‖v‖ is exactly 1 and the
    weight is ``v`` bit for bit; ``torch.norm_except_dim`` sums in another order and is
    off by an ulp or two. In bfloat16 and float16 g is rounded to 8 or 11 bits while the
    kernel's norm is not, and the weight may change in its last place, as in torch.

    Args:
        v: the weight, floating or complex, any shape.
        dim: as in :func:`weight_norm`.
        eps: as in :func:`weight_norm`.
        norm_dtype: as in :func:`weight_norm`.

    Returns:
        Real, detached tensor of shape ``g_shape(v.shape, dim)`` in v's precision.

    Example:
        >>> import torch
        >>> from wn_surgery.norm import magnitude, weight_norm
        >>> v = torch.randn(64, 32, 3)
        >>> torch.equal(weight_norm(v, magnitude(v, dim=0), dim=0), v)
        True
    """
    real = v.dtype.to_real() if v.dtype.is_complex else v.dtype
    with torch.no_grad():
        x = v.detach()
        if eps == 0.0 and norm_dtype is None and _kernel_exists(x, x, dim):
            assert isinstance(dim, int)  # narrows the type; _kernel_exists has checked it
            ones = x.new_ones(g_shape(x.shape, dim))
            return torch._weight_norm_interface(x.contiguous(), ones, dim)[1].to(real)
        return norm_except(_cast(x, norm_dtype), dim, eps).to(real)


def zero_slices(v: Tensor, dim: Dim) -> int:
    """How many slices of ``v`` have a norm that is zero, infinite or not a number.

    Args:
        v: floating or complex, any shape, not on the meta device.
        dim: as in :func:`weight_norm`.

    Returns:
        The count; 0 means that v/‖v‖ is defined everywhere.

    Example:
        >>> import torch
        >>> from wn_surgery.norm import zero_slices
        >>> zero_slices(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), 0)
        1
    """
    norms = _norm(v.detach(), dim)
    if norms.numel() == 0:
        return 0
    low, high = torch.aminmax(norms)
    if low > 0 and high < math.inf:
        return 0
    return int((~((norms > 0) & norms.isfinite())).sum())


def clamped_norm(x: Tensor, dim: Dim, eps: float) -> Tensor:
    """The values of :func:`norm_except` in one pass less; not to be differentiated."""
    norms = _norm(x, dim)
    return norms if eps == 0.0 else norms.clamp_min(eps)


def _norm(x: Tensor, dim: Dim) -> Tensor:
    if not isinstance(dim, tuple) and not transformed() and not _empty(x):
        return torch.norm_except_dim(x, 2, -1 if dim is None else dim)
    # norm_except_dim knows neither several axes nor empty tensors nor, for the whole tensor,
    # forward AD.
    if dim is None:
        return cast(Tensor, torch.linalg.vector_norm(x))
    kept = dim if isinstance(dim, tuple) else (dim,)
    reduced = tuple(axis for axis in range(x.ndim) if axis not in kept)
    # vector_norm reads an empty tuple as "every axis".
    if not reduced:
        return x.abs()
    return cast(Tensor, torch.linalg.vector_norm(x, 2, reduced, keepdim=True))


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return x
    return x.to(dtype.to_complex() if x.dtype.is_complex else dtype)


def _composite(
    v: Tensor, g: Tensor, dim: Dim, eps: float, norm_dtype: torch.dtype | None
) -> Tensor:
    x = _cast(v, norm_dtype)
    norms = norm_except(x, dim, eps)
    w = x * (g.to(norms.dtype) / norms if norm_dtype is not None else g / norms)
    return w.to(v.dtype)


def _kernel_exists(v: Tensor, g: Tensor, dim: Dim) -> bool:
    dtype = v.dtype
    return (
        isinstance(dim, int)
        and (dim == 0 or dim == v.ndim - 1)
        and g.dtype is dtype
        and dtype in KERNEL_DTYPES
        and (v.is_cpu or v.is_cuda)
        and not _empty(v)  # torch's kernel divides by the size and takes the process down
    )


def _empty(v: Tensor) -> bool:
    # While torch.jit traces, a size is a tensor, and asking for its truth is recorded.
    return not traced() and v.numel() == 0


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit is recording what is called."""
    # In this order: torch.compile stops at the second question.
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def transformed() -> bool:
    """Whether forward-mode AD or a ``torch.func`` transform is under way."""
    # torch has no public question for either; its own autograd.Function asks the same.
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def like(w: Tensor, v: Tensor) -> Tensor:
    """``w`` in the channels_last layout of ``v``, which torch's operator drops."""
    if v.is_contiguous():
        return w
    if v.ndim == 4 and v.is_contiguous(memory_format=torch.channels_last):
        return w.contiguous(memory_format=torch.channels_last)
    if v.ndim == 5 and v.is_contiguous(memory_format=torch.channels_last_3d):
        return w.contiguous(memory_format=torch.channels_last_3d)
    return w


class _Fused(torch.autograd.Function):
    """torch's kernel forward and backward; a differentiable formula for higher orders.

    torch's own derivative of ``_weight_norm_interface_backward`` is wrong with respect
    to v (tests/test_norm.py shows it), so it is never reached from here.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dim: int) -> Tensor:
        w, norms = torch._weight_norm_interface(v, g, dim)
        ctx.save_for_backward(v, g, norms)
        ctx.dim = dim
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        v, g, norms = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():
            grad_v, grad_g = _differentiable_backward(grad, v, g, ctx.dim)
        else:
            grad_v, grad_g = torch.ops.aten._weight_norm_interface_backward(
                grad.contiguous(), v, g, norms, ctx.dim
            )
        need_v, need_g, _ = ctx.needs_input_grad
        return grad_v if need_v else None, grad_g if need_g else None, None


# Past Function.apply, which looks for functorch's transforms: that has been done, and costs as
# much as the rest. torch leaves it untyped.
_past: Any = super(torch.autograd.Function, _Fused)
_fused: Callable[[Tensor, Tensor, int], Tensor] = _past.apply


def _differentiable_backward(grad: Tensor, v: Tensor, g: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of the paper's eq. 3, written in operations that autograd knows."""
    wide = torch.promote_types(v.dtype, torch.float32)
    x, grad = v.to(wide), grad.to(wide)
    norms = _norm(x, dim)
    axes = tuple(axis for axis in range(v.ndim) if axis != dim)
    along = grad * x
    along = along.sum(axes, keepdim=True) if axes else along
    grad_g = along / norms
    grad_v = (g.to(wide) / norms) * (grad - x * (along / norms.square()))
    return grad_v.to(v.dtype), grad_g.to(g.dtype)
