"""Where a fused module keeps its weight: the little that the core knows of whole-model evaluation.

A module inside a fused model has, in its ``__dict__`` and for each computed parameter, a slot
that may hand out the weight. Slots belong to one module object: no copy, pickle, replica or
state dict has them, and surgery, ``train``, ``_apply`` and loading drop what they hold.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["RootHook", "Slot", "changes", "detach", "forget", "key_of", "settle", "without"]

_PREFIX = "_fused_"


class Slot(Protocol):
    """What stands in a module's ``__dict__``; made by :mod:`wn_surgery.fused`."""

    def weight(self) -> Tensor | None:
        """The weight, or ``None`` where it must be computed as if nothing were fused."""
        ...

    def forget(self) -> None:
        """Drop every value."""
        ...


class RootHook:
    """Base of the hooks that tell a fused model when a forward begins and ends."""

    def settle(self, root: nn.Module) -> None:
        """The layouts below ``root`` have changed: look again, and go if nothing is left."""
        raise NotImplementedError(type(self).__name__)


def settle(model: nn.Module) -> None:
    """Let every fused root at or below ``model`` look again."""
    for module in model.modules():
        hooks: list[object] = list(module._forward_pre_hooks.values())
        for hook in hooks:
            if isinstance(hook, RootHook):
                hook.settle(module)


class _Changes:
    """Counts the changes of layouts anywhere, so that fused models know when to look again."""

    def __init__(self) -> None:
        self.count = 0


changes = _Changes()


def key_of(name: str) -> str:
    """The key in ``module.__dict__`` of the slot of parameter ``name``."""
    return _PREFIX + name


def detach(module: nn.Module, name: str) -> None:
    """Take the slot of ``name`` away: its parameter is stored in another way from now on."""
    changes.count += 1
    module.__dict__.pop(_PREFIX + name, None)


def forget(module: nn.Module) -> None:
    """Drop the values in the module's slots."""
    for key, slot in module.__dict__.items():
        if key.startswith(_PREFIX):
            slot.forget()


def without(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes without its slots, as copies and pickles hold them."""
    return {key: value for key, value in attributes.items() if not key.startswith(_PREFIX)}
