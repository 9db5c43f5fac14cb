"""What computes a group of weights: the interface that the CPU and Triton paths share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wn_surgery.norm.math import Axes, Dim

__all__ = ["Evaluator", "Gradients", "Spec"]


@dataclass(frozen=True)
class Spec:
    """What one weight of a group is, and how it is normed.

    Attributes:
        shape: of v and of the weight.
        dim: the axes that keep a norm of their own; ``None`` for the whole tensor.
        eps: lower clamp of the norm.
        norm_dtype: the dtype of the norm and the product; ``None``: the weight's.

    Example:
        >>> from wn_surgery.fused.evaluator import Spec
        >>> Spec((512, 256, 16), 1).axes
        Axes(before=512, kept=256, after=16)
        >>> Spec((64, 32), None).axes
        Axes(before=1, kept=1, after=2048)
    """

    shape: tuple[int, ...]
    dim: Dim = 0
    eps: float = 0.0
    norm_dtype: torch.dtype | None = None

    @property
    def axes(self) -> Axes | None:
        """The three axes that norms are taken over; ``None`` where three do not suffice."""
        return Axes.of(self.shape, self.dim)


class Gradients(NamedTuple):
    """Gradients with respect to each v and each g; ``None`` where none was asked or defined."""

    v: list[Tensor | None]
    g: list[Tensor | None]


class Evaluator(Protocol):
    """Computes all weights of one group, and their gradients, outside of autograd."""

    def forward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], out_dtype: torch.dtype | None
    ) -> tuple[list[Tensor], Any]:
        """The weights, and the norms in whatever form :meth:`backward` wants them.

        Args:
            v: the directions, one for each spec.
            g: the magnitudes, likewise.
            out_dtype: the dtype of the weights; ``None``: that of v.
        """
        ...

    def backward(
        self,
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        norms: Any,
        grads: Sequence[Tensor | None],
    ) -> Gradients:
        """The gradients of v and g, given those of the weights.

        Args:
            v: as in :meth:`forward`.
            g: as in :meth:`forward`.
            norms: what :meth:`forward` returned.
            grads: one for each weight, in any memory layout; ``None``: undefined, and the
                gradients of that v and g are then ``None`` too.
        """
        ...
