"""The undo log: what a module looked like before surgery, and how it gets that way again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

__all__ = ["Snapshot", "UndoLog"]


class Snapshot:
    """The class and attributes of one module, with its containers copied one level deep.

    Surgery registers new Parameters and moves old ones; it writes into none. So a shallow
    copy restores everything, and costs no memory for weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.cls = type(module)
        self.attributes = dict(module.__dict__)
        self.contents: dict[str, Any] = {
            key: value.copy()
            for key, value in self.attributes.items()
            if type(value) in (dict, OrderedDict, list, set)
        }

    def restore(self) -> None:
        """Put the module back. Containers keep their identity."""
        object.__setattr__(self._module, "__class__", self.cls)
        now = self._module.__dict__
        now.clear()
        now.update(self.attributes)
        for key, content in self.contents.items():
            container = now[key]
            container.clear()
            (container.extend if type(container) is list else container.update)(content)


class UndoLog:
    """Snapshots in the order they were taken."""

    def __init__(self) -> None:
        self._snapshots: list[Snapshot] = []
        self._seen: set[int] = set()

    def record(self, module: nn.Module) -> None:
        """Remember ``module`` and its parametrizations, once, before they are changed."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._snapshots.append(Snapshot(module))
        lists = module.__dict__["_modules"].get("parametrizations")
        if isinstance(lists, nn.Module):
            self.record(lists)

    def rollback(self) -> None:
        """Restore every module, last one first."""
        for snapshot in reversed(self._snapshots):
            snapshot.restore()
