"""``torch.nn.utils.parametrizations``, with this library's ``weight_norm``."""

from typing import Any

from torch.nn.utils import parametrizations

from wn_surgery.compat.functions import parametrized_weight_norm as weight_norm

__all__ = ["weight_norm"]


def __getattr__(name: str) -> Any:
    return getattr(parametrizations, name)
