"""Weight norm in autograd: the nodes of one weight, right to every order.

torch's own derivative of ``_weight_norm_interface_backward`` is wrong with respect to v
(tests/norm/test_math.py shows it), so no graph of its backward is built here. The nodes save no
tensor in autograd's sense, like the node of a fused group: activation checkpointing counts saved
tensors, and the model may be fused between a forward and its backward. The model holds g and v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from wn_surgery.norm.cuts import Cut, is_dtensor
from wn_surgery.norm.math import (
    composite,
    gradients,
    has_kernel_along,
    in_dtype,
    kernel_backward,
    values,
)
from wn_surgery.norm.modes import builds_graph
from wn_surgery.norm.options import Dim, NormOptions

__all__ = [
    "check_unwritten",
    "differentiable_gradients",
    "recorded_weight",
    "versions",
    "weight_of_known",
    "weight_of_parts",
]


class _Node(torch.autograd.Function):
    """One weight: torch's kernel or five passes backward, then a differentiable formula."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        g: Tensor,
        dim: Dim,
        eps: float,
        norm_dtype: torch.dtype | None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if known is None:
            exact_g, (w, norms) = g, values(v, g, dim, eps, norm_dtype)
        else:
            (exact_g, norms), w = known, _scaled(v, *known, norm_dtype)
        ctx.held, ctx.versions = (v, g, exact_g, norms), versions(v, g)
        ctx.options = (dim, eps, norm_dtype)
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, g, exact_g, norms = ctx.held
        (grad,) = grads
        check_unwritten(v, g, ctx.versions)
        if torch.is_grad_enabled():
            grad_v, grad_g = differentiable_gradients(grad, v, g, *ctx.options)
        else:
            # Of an exact g, autograd rounds the gradient to the dtype of g.
            grad_v, grad_g = gradients(grad, v, exact_g, norms, *ctx.options)
        need_v, need_g, *_ = ctx.needs_input_grad
        return grad_v if need_v else None, grad_g if need_g else None, *(None,) * 4


class _KernelNode(torch.autograd.Function):
    """The same for contiguous tensors of which torch has a kernel, as most weights are.

    It runs for each weight in each step, and asks as little as it can.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dim: int) -> Tensor:
        w, norms = torch._weight_norm_interface(v, g, dim)
        ctx.held = v, g, norms, dim, v._version, g._version
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, g, norms, dim, *before = ctx.held
        if v._version != before[0] or g._version != before[1]:
            check_unwritten(v, g, tuple(before))
        if torch.is_grad_enabled():
            return *differentiable_gradients(grads[0], v, g, dim, 0.0, None), None
        return *kernel_backward(grads[0].contiguous(), v, g, norms, dim), None


# Past Function.apply, which looks for functorch's transforms: that has been done, and costs as
# much as the rest. torch leaves it untyped.
_node: Callable[..., Tensor] = cast(Any, super(torch.autograd.Function, _Node)).apply
_kernel_node: Callable[..., Tensor] = cast(Any, super(torch.autograd.Function, _KernelNode)).apply
# What the engine calls: else a method of torch that asks each time whether `vjp` is defined too.
cast(Any, _KernelNode)._backward_cls.apply = _KernelNode.backward


def recorded_weight(
    v: Tensor, g: Tensor, dim: Dim, eps: float, norm_dtype: torch.dtype | None
) -> Tensor:
    """The weight of plain tensors of one dtype, with its node."""
    if (
        eps == 0.0
        and norm_dtype is None
        and has_kernel_along(v, dim)
        and v.is_contiguous()
        and g.is_contiguous()
    ):
        return _kernel_node(v, g, dim)
    return _node(v, g, dim, eps, norm_dtype)


def weight_of_known(
    v: Tensor, g: Tensor, known: tuple[Tensor, Tensor], options: NormOptions
) -> Tensor:
    """The weight of a rounded v and g, where the g and the norms of before the rounding are known.

    The gradients are those of the weight, for v and g as they are here.
    """
    if builds_graph() and (v.requires_grad or g.requires_grad):
        return _node(v, g, *options, known)
    with torch.no_grad():
        return _scaled(v, *known, options.norm_dtype)


def _scaled(v: Tensor, g: Tensor, norms: Tensor, norm_dtype: torch.dtype | None) -> Tensor:
    return (in_dtype(v, norm_dtype) * (g / norms)).to(v.dtype)


class _PartsNode(torch.autograd.Function):
    """The same for DTensors: each rank computes with its parts, and the sums are what is sent."""

    @staticmethod
    def forward(
        ctx: Any, v: Any, g: Any, dim: Dim, eps: float, norm_dtype: torch.dtype | None
    ) -> Tensor:
        w, norms, cut = _values_of_parts(v, g, dim, eps, norm_dtype)
        ctx.held, ctx.versions, ctx.options = (v, g, norms), versions(v, g), (dim, eps, norm_dtype)
        ctx.cut = cut
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        v, g, norms = ctx.held
        cut: Cut = ctx.cut
        (grad,) = grads
        check_unwritten(v, g, ctx.versions)
        found: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            found = differentiable_gradients(grad, v, g, *ctx.options)
        else:
            dim, eps, norm_dtype = ctx.options
            parts = cut.part_of(grad), *cut.parts(v, g)
            grad_v, grad_g = gradients(*parts, norms, dim, eps, norm_dtype, cut.total)
            whole_g = cut.magnitude(grad_g, g.shape).redistribute(placements=g.placements)
            found = cut.weight(grad_v, v), whole_g
        need_v, need_g, *_ = ctx.needs_input_grad
        return found[0] if need_v else None, found[1] if need_g else None, None, None, None


def _values_of_parts(
    v: Any, g: Any, dim: Dim, eps: float, norm_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Cut]:
    cut = Cut(v, dim)
    w, norms = values(*cut.parts(v, g), dim, eps, norm_dtype, cut.total)
    return cut.weight(w, v), norms, cut


def weight_of_parts(
    v: Tensor, g: Tensor, dim: Dim, eps: float, norm_dtype: torch.dtype | None
) -> Tensor:
    """The weight of a v that is a DTensor, placed as v."""
    if not is_dtensor(g):
        raise ValueError(f"v is a DTensor and g a {type(g).__name__}; expected both to be DTensors")
    if builds_graph() and (v.requires_grad or g.requires_grad):
        return cast(Tensor, cast(Any, _PartsNode).apply(v, g, dim, eps, norm_dtype))
    with torch.no_grad():
        return _values_of_parts(v, g, dim, eps, norm_dtype)[0]


def versions(v: Tensor, g: Tensor) -> tuple[int, int]:
    """The counts of in-place writes that :func:`check_unwritten` compares."""
    return v._version, g._version


def check_unwritten(v: Tensor, g: Tensor, before: tuple[int, int]) -> None:
    """Raise torch's own error where v or g was written between forward and backward."""
    if before == (v._version, g._version):
        return
    part, tensor, version = ("v", v, before[0]) if v._version != before[0] else ("g", g, before[1])
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: the {part} of a weight of shape {tuple(v.shape)} is at version "
        f"{tensor._version}; expected version {version}. Call backward before the optimizer's "
        "step, or clone what you write to"
    )


def differentiable_gradients(
    grad: Tensor, v: Tensor, g: Tensor, dim: Dim, eps: float, norm_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients as functions of g, v and ``grad``; ``None`` for what needs none."""
    wide = torch.promote_types(v.dtype, torch.float32)
    w = composite(v.to(wide), g.to(wide), dim, eps, norm_dtype)
    inputs = [t for t in (v, g) if t.requires_grad]
    found = iter(torch.autograd.grad(w, inputs, grad.to(wide), create_graph=True))
    grad_v, grad_g = (next(found) if t.requires_grad else None for t in (v, g))
    return grad_v, grad_g
