"""Weights as plain tensors where the tensor parallelism of transformers computes with parts.

Its styles exchange the DTensors among a module's own parameters for this rank's parts, run the
module on plain tensors, and put them back. A computed weight is no parameter, so hooks do the same.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from wn_surgery.norm.cuts import is_dtensor
from wn_surgery.norm.parametrization import WeightNormList
from wn_surgery.norm.slots import NotCopied

__all__ = ["follow_styles"]

_STYLES = "transformers.distributed."
_QUESTION = "should_use_local_tensors"


class _Part(NotCopied):
    """This rank's part of one weight, for the length of one forward."""

    traced: Tensor | None = None

    def __init__(self, part: Tensor, before: Any) -> None:
        self._part, self.before = part, before

    def weight(self) -> Tensor:
        return self._part


class _Enter:
    """Before a forward on plain tensors: compute each weight, once, and show the part."""

    def __init__(self, style: Any) -> None:
        self._style = style

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        if not getattr(self._style, _QUESTION)(module):
            return
        for plist in _lists(module):
            held = plist.__dict__.get("hold")
            weight = None if held is None else held.weight()
            weight = plist() if weight is None else weight
            if is_dtensor(weight):
                plist.__dict__["hold"] = _Part(weight.to_local(), held)


class _Leave:
    """After it, also when it has raised."""

    def __call__(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        for plist in _lists(module):
            part = plist.__dict__.get("hold")
            if isinstance(part, _Part):
                del plist.__dict__["hold"]
                if part.before is not None:
                    plist.__dict__["hold"] = part.before


def _lists(module: nn.Module) -> list[WeightNormList]:
    lists = module.__dict__["_modules"].get("parametrizations")
    children = () if lists is None else lists._modules.values()
    return [plist for plist in children if isinstance(plist, WeightNormList)]


def follow_styles(model: nn.Module) -> None:
    """Let the weights of modules that such a style runs be parts where its parameters are."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if not getattr(forward, "__module__", "").startswith(_STYLES):
            continue
        assert forward is not None  # it has a module's name
        style = inspect.getclosurevars(forward).nonlocals.get("self")
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Enter | _Leave):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        if hasattr(style, _QUESTION) and _lists(module):
            module.register_forward_pre_hook(_Enter(style))
            module.register_forward_hook(_Leave(), always_call=True)
