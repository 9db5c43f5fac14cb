"""The CPU path: torch's kernels called in a row, and short formulas where it has none.

torch's fused kernel covers the first and the last axis, and runs at the speed of memory. For
any other axis torch differentiates the formula step by step, which reads and writes the
weight some thirty times; :func:`_gradients` needs five passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..norm import clamped_norm, g_shape, like
from .evaluator import Gradients, Spec

__all__ = ["CpuEvaluator"]

_forward: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]] = torch._weight_norm_interface
_CPU = torch.device("cpu")
_backward = torch.ops.aten._weight_norm_interface_backward.default


class CpuEvaluator:
    """Weights and gradients of a group with torch's own operators, on any device.

    The weights are those of :func:`wn_surgery.norm.weight_norm` bit for bit.

    Args:
        specs: what each weight is.
        device: where they are.

    Example:
        >>> import torch
        >>> from wn_surgery.fused.cpu import CpuEvaluator
        >>> from wn_surgery.fused.evaluator import Spec
        >>> evaluator = CpuEvaluator([Spec((1, 2)), Spec((2, 1), dim=1)])
        >>> v = [torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0], [4.0]])]
        >>> g = [torch.tensor([[10.0]]), torch.tensor([[5.0]])]
        >>> weights, norms = evaluator.forward(v, g)
        >>> weights
        [tensor([[6., 8.]]), tensor([[3.],
                [4.]])]
        >>> evaluator.backward(v, g, norms, [torch.ones(1, 2), None]).g
        [tensor([[1.4000]]), None]
    """

    def __init__(self, specs: Sequence[Spec], device: torch.device = _CPU) -> None:
        self._specs = [(spec, _has_kernel(spec, device)) for spec in specs]

    def forward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :class:`wn_surgery.fused.evaluator.Evaluator`."""
        weights: list[Tensor] = []
        norms: list[Tensor] = []
        for (spec, kernel), x, m in zip(self._specs, v, g, strict=True):
            if kernel:
                straight = x.contiguous()
                w, n = _forward(straight, m.contiguous(), spec.dim)
                if straight is not x:
                    w = like(w, x)
            else:
                w, n = _formula(x, m, spec)
            weights.append(w if out_dtype is None else w.to(out_dtype))
            norms.append(n)
        return weights, norms

    def backward(
        self,
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        norms: Any,
        grads: Sequence[Tensor | None],
    ) -> Gradients:
        """See :class:`wn_surgery.fused.evaluator.Evaluator`."""
        found = Gradients([], [])
        for (spec, kernel), x, m, n, grad in zip(self._specs, v, g, norms, grads, strict=True):
            if grad is None:
                grad_v: Tensor | None = None
                grad_g: Tensor | None = None
            elif kernel:
                grad_v, grad_g = _backward(
                    grad.to(x.dtype).contiguous(), x.contiguous(), m.contiguous(), n, spec.dim
                )
            else:
                grad_v, grad_g = _gradients(grad, x, m, n, spec)
            found.v.append(grad_v)
            found.g.append(grad_g)
        return found


def _has_kernel(spec: Spec, device: torch.device) -> bool:
    return (
        spec.eps == 0.0
        and spec.norm_dtype is None
        and device.type in ("cpu", "cuda")
        and isinstance(spec.dim, int)
        and spec.dim in (0, len(spec.shape) - 1)
        and 0 not in spec.shape
    )


def _formula(v: Tensor, g: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    x = v if spec.norm_dtype is None else v.to(spec.norm_dtype)
    norms = clamped_norm(x, spec.dim, spec.eps)
    scale = g / norms if spec.norm_dtype is None else g.to(norms.dtype) / norms
    return (x * scale).to(v.dtype), norms


def _gradients(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, spec: Spec
) -> tuple[Tensor, Tensor]:
    """The paper's eq. 3: grad_g = ⟨grad, v⟩/‖v‖, grad_v = g/‖v‖ · (grad - v ⟨grad, v⟩/‖v‖²)."""
    wide = torch.promote_types(spec.norm_dtype or v.dtype, torch.float32)
    x, dw = v.contiguous().to(wide), grad.contiguous().to(wide)
    n, m = norms.to(wide), g.to(wide)
    # The products have the memory of the result: fresh memory costs as much as the arithmetic.
    buffer = dw * x
    grad_g = _sums(buffer, spec) / n
    scale = m / n
    along = scale * grad_g / n
    if spec.eps > 0.0:
        # A clamped norm is a constant; no part of the gradient flows through it.
        along = torch.where(norms > spec.eps, along, 0.0)
    if spec.axes is not None and spec.axes.before > 1:
        # One long row to broadcast: torch is slow where the broadcast axis is short and last.
        rows = (spec.axes.before, spec.axes.kept * spec.axes.after)
        x, dw, buffer = x.view(rows), dw.view(rows), buffer.view(rows)
        scale, along = (_repeat(t, spec.axes.after) for t in (scale, along))
    grad_v = torch.mul(dw, scale, out=buffer).addcmul_(x, along, value=-1.0)
    return like(grad_v.view(v.shape).to(v.dtype), v), grad_g.to(g.dtype)


def _sums(products: Tensor, spec: Spec) -> Tensor:
    """The sums of the slices of a contiguous tensor, in the shape of g."""
    if spec.axes is None:
        kept = cast("tuple[int, ...]", spec.dim)
        return products.sum([a for a in range(products.ndim) if a not in kept], keepdim=True)
    before, kept_size, after = spec.axes
    if before > 1:
        # The leading axis by itself: torch is slow at reducing both sides of a kept axis.
        products = products.view(before, -1).sum(0)
    return products.view(kept_size, after).sum(1).view(g_shape(spec.shape, spec.dim))


def _repeat(t: Tensor, times: int) -> Tensor:
    return t.reshape(-1, 1).expand(-1, times).reshape(-1)
