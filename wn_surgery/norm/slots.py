"""What may hand out a weight in place of the computation: a slot, or a hold.

Both are attributes of the list that holds the weight's g and v: a slot while its model is fused, a
hold, which is asked first, while the weight is folded or an initializer runs. Their ``weight()``
returns the weight, or ``None`` where it must be computed; torch.compile gets a hold's ``traced``.

A fold lays its weight into the module's own dictionary as well, as a :class:`Near`. On the way to a
hold lie eight objects, and where other code has used the caches each of them is a miss: a forward
of a WaveNet took 1.05 of the plain model's time by the hold, and takes 1.01.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["NEAR", "Near", "NotCopied", "RootHook", "changes", "note_change", "settle"]

NEAR = "_weight_norm_near"
"""In the dictionary of a module: each :class:`Near` by the name of its parameter."""


class NotCopied:
    """Base of what belongs to one object and is ``None`` in its copies and pickles."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Near(NotCopied):
    """What the hold of a parameter gives to one thread."""

    __slots__ = ("thread", "weight")

    def __init__(self, thread: int, weight: Tensor) -> None:
        self.thread, self.weight = thread, weight


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

    count = 0


changes = _Changes()


def note_change() -> None:
    """A parameter is stored in another way from now on."""
    changes.count += 1
