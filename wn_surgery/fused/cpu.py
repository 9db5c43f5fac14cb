"""The CPU path: torch's kernels called in a row, and short formulas where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wn_surgery.fused.evaluator import Gradients, Spec
from wn_surgery.norm.math import gradients, values

__all__ = ["CpuEvaluator"]


class CpuEvaluator:
    """Weights and gradients of a group with torch's own operators, on any device.

    The weights are those of :func:`wn_surgery.norm.math.weight_norm` bit for bit.

    Args:
        specs: what each weight is.

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

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._options = [(spec.dim, spec.eps, spec.norm_dtype) for spec in specs]

    def forward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :class:`wn_surgery.fused.evaluator.Evaluator`."""
        weights: list[Tensor] = []
        norms: list[Tensor] = []
        for options, x, m in zip(self._options, v, g, strict=True):
            w, n = values(x, m, *options)
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
        for options, x, m, n, grad in zip(self._options, v, g, norms, grads, strict=True):
            pair = (None, None) if grad is None else gradients(grad, x, m, n, *options)
            found.v.append(pair[0])
            found.g.append(pair[1])
        return found
