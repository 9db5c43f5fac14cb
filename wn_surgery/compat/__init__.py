"""torch's functions for weight norm, repaired: write ``wn_surgery.compat`` for ``torch.nn.utils``.

Each name of ``torch.nn.utils``, ``.parametrizations`` and ``.parametrize`` can be imported from
here. The functions for weight norm are this library's; all others are torch's own. For code that
cannot be edited, :func:`installed` puts them in place of torch's.

In: a module and the name of a parameter.
Out: the module, with weight norm in the layout of torch's function, or without.
Imports: errors, norm, rules, model, surgery.
"""

from typing import Any

import torch.nn.utils

from wn_surgery.compat import parametrizations, parametrize
from wn_surgery.compat.functions import remove_weight_norm, weight_norm
from wn_surgery.compat.installing import install, installed, is_installed, uninstall

__all__ = [
    "install", "installed", "is_installed", "parametrizations", "parametrize",
    "remove_weight_norm", "uninstall", "weight_norm",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return getattr(torch.nn.utils, name)
