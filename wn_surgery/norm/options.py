"""The options of one weight norm, and how axes and dtypes are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

__all__ = ["Dim", "NormOptions", "dtype_name", "kept_axes"]

Dim: TypeAlias = "int | tuple[int, ...] | None"
"""The axes of a weight that keep a norm of their own; ``None`` for one norm of the whole tensor."""


def kept_axes(dim: Dim) -> tuple[int, ...]:
    """The kept axes as a tuple; empty for the whole tensor."""
    return () if dim is None else (dim,) if isinstance(dim, int) else dim


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    """A dtype or a layout as text: ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class NormOptions:
    """How a weight is normed. ``weight_norm(v, g, *options)`` takes them in this order.

    Attributes:
        dim: the axes that keep a norm of their own; ``None`` for the whole tensor.
        eps: lower clamp of the norm, in the units of the weight.
        norm_dtype: the dtype of the norm and the product; ``None`` for the weight's own.

    Example:
        >>> from wn_surgery.norm.options import NormOptions
        >>> options = NormOptions((0, 2), eps=1e-6)
        >>> print(options, options.to_dict())
        dim=(0, 2), eps=1e-06 {'dim': [0, 2], 'eps': 1e-06, 'norm_dtype': None}
    """

    dim: Dim = 0
    eps: float = 0.0
    norm_dtype: torch.dtype | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dim, self.eps, self.norm_dtype))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON data."""
        return {
            "dim": list(self.dim) if isinstance(self.dim, tuple) else self.dim,
            "eps": self.eps,
            "norm_dtype": None if self.norm_dtype is None else dtype_name(self.norm_dtype),
        }

    def __str__(self) -> str:
        eps = f", eps={self.eps}" if self.eps else ""
        dtype = f", norm_dtype={self.norm_dtype}" if self.norm_dtype else ""
        return f"dim={self.dim}{eps}{dtype}"
