"""Who reads a weight in order to write into it: PEFT, which merges an adapter into ``weight.data``.

A weight is computed at each read, so what is written into the tensor is lost. Code of PEFT gets one
that assigns to the layer what is written into it. All other code gets a plain tensor: a subclass
cannot become a Parameter, and each operation on it goes through Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from wn_surgery.errors import ZeroNormError

__all__ = ["Followed", "follow_writes", "is_writer"]

_WRITERS = "peft.tuners."
_DATA = cast(Any, Tensor.data)
_ALIASES = (_DATA.__get__, Tensor.detach)  # what torch does not count as views


def is_writer(frame: FrameType) -> bool:
    """Whether what is written into a weight that this frame reads has to take effect."""
    return str(frame.f_globals.get("__name__")).startswith(_WRITERS)


def follow_writes(weight: Tensor, module: nn.Module, name: str) -> Tensor:
    """A tensor like ``weight``, of which ``module.name`` follows what is written into it."""
    if type(weight) is not Tensor:  # traced; there is nothing to write
        return weight
    if weight.is_inference():  # which does not count writes
        with torch.inference_mode(False):
            weight = weight.clone()
    followed = weight.as_subclass(Followed)
    followed._site = module, name
    return followed


class Followed(Tensor):
    """A computed weight, or a view of it: what is written into it is assigned to its layer."""

    _site: tuple[nn.Module, str]
    _whole: Tensor | None = None  # of a view: the weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, and assign the weight to its layer if the function has written."""
        given = [*args, *(kwargs or {}).values()]
        mine = [each for each in given if isinstance(each, cls)]
        with cast(Any, torch._C).DisableTorchFunctionSubclass():
            versions = [each._version for each in mine]
            result = func(*args, **(kwargs or {}))
            for each, version in zip(mine, versions, strict=True):
                if each._version != version or (func == _DATA.__set__ and each is args[0]):
                    each._assign()
            for part in result if isinstance(result, (tuple, list)) else [result]:
                viewed = type(part) is Tensor and (func in _ALIASES or part._is_view())
                if mine and viewed and not any(part is each for each in given):
                    view = cast(Any, part)
                    view.__class__ = cls
                    view._site = mine[0]._site
                    view._whole = mine[0] if mine[0]._whole is None else mine[0]._whole
            if func is Tensor.requires_grad_ and mine:
                # nn.Parameter() goes this way, and would make one that writes into the layer.
                result = cast(Tensor, result).as_subclass(Tensor)
        return result

    def _assign(self) -> None:
        module, name = self._site
        whole = self if self._whole is None else self._whole
        try:
            setattr(module, name, whole.as_subclass(Tensor))
        except ZeroNormError as error:
            raise ZeroNormError(f"{type(module).__name__}.{name}: {error}") from error
