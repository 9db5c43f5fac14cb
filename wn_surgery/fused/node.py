"""One autograd node for all weights of a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wn_surgery.fused.evaluator import Evaluator, Spec
from wn_surgery.norm.math import (
    builds_graph,
    check_unwritten,
    differentiable_gradients,
    versions,
)

__all__ = ["evaluate"]


def evaluate(
    evaluator: Evaluator,
    specs: Sequence[Spec],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    out_dtype: torch.dtype | None = None,
) -> Sequence[Tensor]:
    """The weights of a group, with one node behind them if any of them needs a gradient.

    The node saves no tensor in autograd's sense, so that activation checkpointing, which
    counts saved tensors, sees the same number whether a weight was computed or reused. Nor
    does the first backward free anything: two losses that share the weights may each have
    theirs. What it would have saved are g and v, which the model holds anyway, and the norms.

    Args:
        evaluator: computes values and gradients.
        specs: what each weight is.
        v: the directions.
        g: the magnitudes.
        out_dtype: the dtype of the weights; ``None``: that of v.

    Returns:
        The weights, in order. One whose g and v are both frozen needs no gradient.
    """
    if builds_graph():
        needed = [x.requires_grad or m.requires_grad for x, m in zip(v, g, strict=True)]
        if any(needed):
            return _group(evaluator, tuple(specs), tuple(needed), out_dtype, *v, *g)
    # Not inference tensors: those have no version, by which a write into them is seen.
    with torch.inference_mode(False), torch.no_grad():
        return evaluator.forward(v, g, out_dtype)[0]


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        evaluator: Evaluator,
        specs: tuple[Spec, ...],
        needed: tuple[bool, ...],
        out_dtype: torch.dtype | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(specs)
        v, g = tensors[:count], tensors[count:]
        weights, norms = evaluator.forward(v, g, out_dtype)
        ctx.set_materialize_grads(False)
        if not all(needed):
            frozen = (w for w, wanted in zip(weights, needed, strict=True) if not wanted)
            ctx.mark_non_differentiable(*frozen)
        # Not save_for_backward: see `evaluate`. Inputs and norms only, so there is no cycle.
        ctx.evaluator, ctx.specs, ctx.tensors, ctx.norms = evaluator, specs, tensors, norms
        ctx.versions = list(map(versions, v, g))
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors: tuple[Tensor, ...] = ctx.tensors
        count = len(ctx.specs)
        v, g = tensors[:count], tensors[count:]
        # A backward may reach a part of the group only; the rest is not its concern.
        for x, m, before, grad in zip(v, g, ctx.versions, grads, strict=True):
            if grad is not None:
                check_unwritten(x, m, before)
        if torch.is_grad_enabled():
            found = _differentiable(ctx.specs, v, g, grads)
        else:
            gradients = ctx.evaluator.backward(v, g, ctx.norms, grads)
            found = [*gradients.v, *gradients.g]
        wanted = ctx.needs_input_grad[4:]
        kept = (grad if want else None for grad, want in zip(found, wanted, strict=True))
        return (None, None, None, None, *kept)


# Past Function.apply, as in norm.py; torch leaves it untyped.
_past: Any = super(torch.autograd.Function, _Group)
_group: Callable[..., tuple[Tensor, ...]] = _past.apply


def _differentiable(
    specs: Sequence[Spec], v: Sequence[Tensor], g: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients as functions of g, v and ``grads``, for backward with create_graph."""
    pairs = [
        (None, None)
        if grad is None
        else differentiable_gradients(grad, x, m, spec.dim, spec.eps, spec.norm_dtype)
        for spec, x, m, grad in zip(specs, v, g, grads, strict=True)
    ]
    return [grad_v for grad_v, _ in pairs] + [grad_g for _, grad_g in pairs]
