"""Writes into a computed weight that take effect, for as long as an initializer runs.

A weight is computed at each read, so what is written into it is lost. While ``apply(fn)`` runs on
a weight-normed layer, or a model of transformers initializes it, every read gives the same tensor
instead, and g and v follow it afterwards.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from wn_surgery.errors import ZeroNormError
from wn_surgery.norm.cuts import write
from wn_surgery.norm.parametrization import WeightNorm, WeightNormList, is_weight_norm
from wn_surgery.norm.slots import NotCopied

__all__ = ["Draft", "follow_initializer", "following"]


class Draft(NotCopied):
    """One weight, computed at its first read and compared with that when the context ends."""

    traced: Tensor | None = None  # torch.compile computes the weight

    def __init__(self, plist: WeightNormList) -> None:
        self._plist = plist
        self._thread = get_ident()
        self._value: Tensor | None = None
        self._before: Tensor | None = None
        self._versions: tuple[int, int] | None = None

    def weight(self) -> Tensor | None:
        """The weight; ``None`` for another thread, which computes its own."""
        if get_ident() != self._thread:
            return None
        if self._value is None or self._is_outdated():
            value = self._plist()
            # transformers marks what it has loaded, and leaves it alone.
            for name, mark in vars(self._plist.original1).items():
                setattr(value, name, mark)
            self._value, self._before = value, value.detach().clone()
            self._versions = self._now()
        return self._value

    def written(self) -> tuple[Tensor, Tensor] | None:
        """The g and v of what was written; ``None`` where nothing was."""
        # A later write to g and v themselves wins.
        if self._value is None or self._before is None or self._is_outdated():
            return None
        value = self._value.detach()
        # Unlike torch.equal, this takes NaN as unchanged.
        if value.is_meta or torch.allclose(value, self._before, rtol=0.0, atol=0.0, equal_nan=True):
            return None
        return cast(WeightNorm, self._plist[0]).right_inverse(value)

    def _now(self) -> tuple[int, int]:
        return self._plist.original0._version, self._plist.original1._version

    def _is_outdated(self) -> bool:
        return self._versions != self._now()


@contextmanager
def following(module: nn.Module) -> Generator[None]:
    """Inside, g and v of ``module`` itself follow what this thread writes into its weights.

    They do so when the context ends without an exception, all of them or none. A ``ZeroNormError``
    says that a written weight has no direction and eps is 0.
    """
    lists = module.__dict__["_modules"].get("parametrizations", {})
    drafts: dict[str, Draft] = {}
    try:
        for name, plist in lists.items():
            # Not where a draft or folded() is already at work.
            if is_weight_norm(plist) and getattr(plist, "hold", None) is None:
                drafts[name] = plist.__dict__["hold"] = Draft(plist)
        yield
    finally:
        for draft in drafts.values():
            draft._plist.__dict__.pop("hold", None)
    lists = module.__dict__["_modules"].get("parametrizations", {})
    written: list[tuple[WeightNormList, tuple[Tensor, Tensor] | None]] = []
    for name, draft in drafts.items():
        if name in lists and lists[name] is draft._plist:  # not removed inside
            try:
                written.append((draft._plist, draft.written()))
            except ZeroNormError as error:
                raise ZeroNormError(f"{type(module).__name__}.{name}: {error}") from error
    with torch.no_grad():
        for plist, parts in written:
            if parts is not None:
                write(plist.original0, parts[0])
                write(plist.original1, parts[1])


# transformers calls `model._init_weights(layer)` for each layer, and asks nothing of the layer.
_INITIALIZER = "_init_weights"
_CALLER = "_initialize_weights"


class _Initializer:
    """The model's own initializer of one layer, which g and v follow."""

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)

    def __call__(self, module: nn.Module) -> None:
        """Initialize ``module``."""
        model = self._model()
        assert model is not None  # it has called this
        with following(module):
            getattr(type(model), _INITIALIZER)(model, module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Initializer:
        model = self._model()
        assert model is not None  # it is being copied
        return _Initializer(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Initializer, (self._model(),)


def follow_initializer(model: nn.Module) -> None:
    """Let g and v follow ``init_weights()`` of the transformers models at and below ``model``."""
    for module in model.modules():
        if not (hasattr(type(module), _INITIALIZER) and hasattr(type(module), _CALLER)):
            continue
        followed = any(isinstance(below, WeightNormList) for below in module.modules())
        own = vars(module).get(_INITIALIZER)
        if followed and own is None:
            vars(module)[_INITIALIZER] = _Initializer(module)
        elif not followed and isinstance(own, _Initializer):
            del vars(module)[_INITIALIZER]
