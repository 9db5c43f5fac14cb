"""Who holds a parameter, as the parameter itself says: the marks of FSDP1 and of DeepSpeed.

They are read by name, so that neither has to be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn

__all__ = ["FSDP1", "ZERO3", "axes", "holder", "in_parts", "is_ordinary", "whole_shape"]

FSDP1 = "FSDP"
ZERO3 = "DeepSpeed ZeRO-3"


def _marks(tensor: Tensor | None) -> Mapping[str, Any]:
    return getattr(tensor, "__dict__", {})


def is_ordinary(tensor: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Whether it is exactly a Parameter and nobody has set anything on it, as for nearly all."""
    return type(tensor) is nn.Parameter and not tensor.__dict__


def holder(tensor: Tensor | None) -> str | None:
    """Who keeps references to the parameter; ``None`` where nobody has marked it."""
    marks = _marks(tensor)
    if not marks:  # as nearly always
        return None
    if "ds_id" in marks:
        return ZERO3
    if "_hp_mapping" in marks:  # to its part in the optimizer of ZeRO-1, ZeRO-2 or bfloat16
        return "the optimizer of DeepSpeed ZeRO"
    return FSDP1 if "_fsdp_flattened" in marks else None


def in_parts(tensor: Tensor) -> bool:
    """Whether it has lost its shape now: this rank has a part, in one dimension, or nothing."""
    marks = _marks(tensor)
    if "ds_id" in marks:
        return tuple(tensor.shape) != whole_shape(tensor)
    return "_fsdp_flattened" in marks and tensor.ndim < 2


def axes(tensor: Tensor) -> int:
    """How many axes the whole parameter has. A nested one has axes, but no shape."""
    if is_ordinary(tensor):
        return tensor.ndim
    return len(_marks(tensor).get("ds_shape", ())) or tensor.ndim


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, of which ZeRO-3 shows nothing outside a forward."""
    return tuple(_marks(tensor).get("ds_shape", tensor.shape))
