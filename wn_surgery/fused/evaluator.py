"""What computes a group of weights: values and gradients, and the autograd node around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wn_surgery.norm.math import (
    Axes,
    builds_graph,
    check_unwritten,
    differentiable_gradients,
    gradients,
    values,
    versions,
)  # fmt: skip
from wn_surgery.norm.options import NormOptions

__all__ = ["Evaluator", "Gradients", "Spec", "evaluate"]


class Spec(NamedTuple):
    """What one weight of a group is: its shape, which is that of v, and how it is normed."""

    shape: tuple[int, ...]
    norm: NormOptions = NormOptions()

    @property
    def axes(self) -> Axes | None:
        """The three axes that norms are taken over; ``None`` where three are not enough."""
        return Axes.of(self.shape, self.norm.dim)


class Gradients(NamedTuple):
    """Gradients with respect to each v and each g; ``None`` where the weight has none."""

    v: list[Tensor | None]
    g: list[Tensor | None]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> Gradients:
        """From those of v and g, weight by weight."""
        return cls([v for v, _ in pairs], [g for _, g in pairs])


class Evaluator:
    """Computes all weights of one group, and their gradients, outside of autograd.

    This one calls torch's operators, on any device. The weights are those of
    :func:`wn_surgery.norm.math.weight_norm` bit for bit.
    """

    def __init__(self, specs: Sequence[Spec]) -> None:
        self.specs = specs
        self._options = [tuple(spec.norm) for spec in specs]

    def forward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], Any]:
        """The weights in ``out_dtype`` (``None``: that of v), and norms for :meth:`backward`."""
        found = [values(x, m, *o) for o, x, m in zip(self._options, v, g, strict=True)]
        weights = [w if out_dtype is None else w.to(out_dtype) for w, _ in found]
        return weights, [norms for _, norms in found]

    def backward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], norms: Any, grads: Sequence[Tensor | None]
    ) -> Gradients:
        """The gradients of v and g, given those of the weights in any layout, or ``None``."""
        return Gradients.of([
            (None, None) if grad is None else gradients(grad, x, m, n, *options)
            for options, x, m, n, grad in zip(self._options, v, g, norms, grads, strict=True)
        ])  # fmt: skip


# The autograd node ----------------------------------------------------------------------------


def evaluate(
    evaluator: Evaluator, v: Sequence[Tensor], g: Sequence[Tensor], out: torch.dtype | None = None
) -> Sequence[Tensor]:
    """The weights of a group, from one node if any of them needs a gradient; in dtype ``out``."""
    if builds_graph():
        needed = [x.requires_grad or m.requires_grad for x, m in zip(v, g, strict=True)]
        if any(needed):
            return _group(evaluator, tuple(needed), out, *v, *g)
    # Not inference tensors: those have no version, by which a write into them is seen.
    with torch.inference_mode(False), torch.no_grad():
        return evaluator.forward(v, g, out)[0]


class _Group(torch.autograd.Function):
    """One node for a group.

    It saves no tensor in autograd's sense: activation checkpointing counts saved tensors, and must
    find as many whether a weight was computed or reused. So the first backward frees nothing, and
    two losses that share the weights may each have theirs. It refers to g and v, which the model
    holds anyway, and to the norms; not to the weights, so there is no cycle.
    """

    @staticmethod
    def forward(
        ctx: Any,
        evaluator: Evaluator,
        needed: tuple[bool, ...],
        out_dtype: torch.dtype | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        v, g = _halves(tensors)
        weights, norms = evaluator.forward(v, g, out_dtype)
        ctx.set_materialize_grads(False)
        if not all(needed):
            frozen = (w for w, wanted in zip(weights, needed, strict=True) if not wanted)
            ctx.mark_non_differentiable(*frozen)
        ctx.evaluator, ctx.tensors, ctx.norms = evaluator, tensors, norms
        ctx.versions = list(map(versions, v, g))
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        v, g = _halves(ctx.tensors)
        # A backward may reach a part of the group only. It does not concern the rest.
        for x, m, before, grad in zip(v, g, ctx.versions, grads, strict=True):
            if grad is not None:
                check_unwritten(x, m, before)
        if torch.is_grad_enabled():  # with create_graph
            every = zip(ctx.evaluator.specs, v, g, grads, strict=True)
            found = Gradients.of([
                (None, None) if grad is None else differentiable_gradients(grad, x, m, *spec.norm)
                for spec, x, m, grad in every
            ])  # fmt: skip
        else:
            found = ctx.evaluator.backward(v, g, ctx.norms, grads)
        wanted = ctx.needs_input_grad[3:]
        both = zip((*found.v, *found.g), wanted, strict=True)
        return (None, None, None, *(grad if want else None for grad, want in both))


# Past Function.apply, as in norm/math.py; torch leaves it untyped.
_past: Any = super(torch.autograd.Function, _Group)
_group: Callable[..., tuple[Tensor, ...]] = _past.apply


def _halves(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    count = len(tensors) // 2
    return tensors[:count], tensors[count:]
