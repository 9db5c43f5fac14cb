"""``torch.nn.utils.parametrize``, with a ``remove_parametrizations`` that knows every layout."""

from typing import Any

from torch.nn.utils import parametrize

from wn_surgery.compat.functions import remove_parametrizations

__all__ = ["remove_parametrizations"]


def __getattr__(name: str) -> Any:
    return getattr(parametrize, name)
