"""``generate`` of patched models: each weight is computed once, and not again for each token."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import nn

from wn_surgery.errors import ModelError
from wn_surgery.huggingface.config import recorded
from wn_surgery.model.folding import folded
from wn_surgery.model.sites import normed

__all__ = ["fold_while_generating"]

_FOLDING: WeakSet[type] = WeakSet()


def fold_while_generating(model: nn.Module) -> None:
    """Let ``generate`` of the model's class fold the models of it that are patched.

    On the class, since a method on the instance would keep the model alive by a cycle. It is
    replaced once, where it is defined, and does for other models what it did.
    """
    owner = next((cls for cls in type(model).__mro__ if "generate" in vars(cls)), None)
    if owner is None or owner in _FOLDING:
        return
    generate = vars(owner)["generate"]
    if isinstance(generate, FunctionType):
        cast(Any, owner).generate = _folding(generate)
        _FOLDING.add(owner)


def _folding(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def folding(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as folds:
            if recorded(self.config) is not None:
                _fold(self, folds)
            return generate(self, *args, **kwargs)

    # Whoever wants gradients calls what torch.no_grad() wraps.
    folding.__wrapped__ = getattr(generate, "__wrapped__", generate)
    return folding


def _fold(model: nn.Module, folds: ExitStack) -> None:
    """Enter ``folded`` where nothing can be in its way."""
    # A fold of torch's own layout is one for all threads; what an engine holds, it would gather.
    if any(not site.ours or site.holder for site in normed(model)):
        return
    with torch.no_grad():
        try:
            folds.enter_context(folded(model))
        except ModelError as error:
            if error.kind != "folded":  # else it is inside writable()
                raise
        except torch.OutOfMemoryError:
            warnings.warn(
                "no memory to keep the computed weights while generating, so they are computed for "
                "each token; to generate faster, take weight norm off: unpatch_model(model)",
                stacklevel=4,
            )
