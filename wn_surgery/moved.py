"""Where modules of version 0.1.0 are now. Pickles of models name them by their old paths.

Each old path is a module that looks its names up in the new place, when they are asked for.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["register"]

_ROOMS = {
    "model": "layouts records reloading sites state_keys",
    "norm": "module_class parametrization slots",
    "rules": "patterns presets rule",
    "surgery": "checks diagnosis optimizers plan planning",
    "training": "initialization optimizer_states parameter_groups statistics",
}

_FILES = {
    "wn_surgery.history": "wn_surgery.training.statistics",
    "wn_surgery.huggingface.ties": "wn_surgery.huggingface.embeddings",
}


class _Moved(ModuleType):
    """A module under an old path."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to {new}.")
        self._new = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of any module
            raise AttributeError(name)
        return getattr(importlib.import_module(self._new), name)


def register() -> None:
    """Let the old paths be imported, and ``callbacks`` without its symlink. Safe to call twice.

    They are in ``sys.modules`` and not attributes of the package: ``wn_surgery.plan`` stays the
    function.
    """
    for room, names in _ROOMS.items():
        for name in names.split():
            old = f"wn_surgery.{name}"
            sys.modules.setdefault(old, _Moved(old, f"wn_surgery.{room}.{name}"))
    for old, new in _FILES.items():
        sys.modules.setdefault(old, _Moved(old, new))
    link = Path(__file__).with_name("callbacks")
    if link.is_file():
        # What git writes for a symlink on a system without them. The folder is beside the package.
        sys.modules["wn_surgery"].__path__.append(str(link.parents[1]))
