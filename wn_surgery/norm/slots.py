"""What may hand out a weight in place of the computation: a slot, or a hold.

Both stand in the list that holds the weight's g and v: a slot while its model is fused, a hold
while the weight is folded or an initializer runs. They belong to that one list: their copies and
pickles are ``None``.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Hold", "NotCopied", "RootHook", "Slot", "changes", "note_change", "settle"]


class NotCopied:
    """Base of what belongs to one object and is ``None`` in its copies and pickles."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Slot(Protocol):
    """What stands in the list's ``__dict__`` as ``slot``; made by :mod:`wn_surgery.fused`."""

    def weight(self) -> Tensor | None:
        """The weight, or ``None`` where it must be computed as if nothing were fused."""
        ...


class Hold(Protocol):
    """What stands in the list's ``__dict__`` as ``hold``, and goes before the slot.

    Attributes:
        traced: the weight for torch.compile; ``None`` where it is to be computed.
    """

    traced: Tensor | None

    def weight(self) -> Tensor | None:
        """The weight for this thread, or ``None`` where it must be computed."""
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


def note_change() -> None:
    """A parameter is stored in another way from now on."""
    changes.count += 1
