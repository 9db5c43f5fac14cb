"""Who asks for a state dict: a ``save_pretrained``, whose files are read back without this library.

What it writes is read by a model that its class builds anew, and finds no g and v where that has a
plain weight. So the list of g and v asks in which layout they will be looked for.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from importlib import import_module
from types import FrameType
from typing import Any, Literal, TypeAlias

from torch import nn

__all__ = ["Layouts", "asking", "layout_for", "warn"]

Layouts: TypeAlias = Mapping[int, Literal["plain", "legacy"]]
"""How to save what is parametrized here, by the ``id`` of the list that holds g and v."""


def asking() -> FrameType | None:
    """The innermost call of a module's own ``save_pretrained`` that is running in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        named = frame.f_code.co_name == "save_pretrained"
        if named and isinstance(frame.f_locals.get("self"), nn.Module):
            return frame
        frame = frame.f_back
    return None


def layout_for(
    destination: MutableMapping[str, Any], parts: nn.Module
) -> Literal["plain", "legacy"] | None:
    """The layout that is asked of a list of g and v, in a state dict; None for the one it has."""
    seen, layouts = _state.last
    if seen is None or seen() is not destination:
        frame = asking()
        # It knows models, and so is in a room above, which an unpickled model has not imported.
        reloading = None if frame is None else import_module("wn_surgery.model.reloading")
        layouts = {} if reloading is None else reloading.fitting(frame)
        # One decision for a state dict, of which every weight-normed layer asks.
        _state.last = (_reference(destination), layouts)
    return layouts.get(id(parts))


def warn(frame: FrameType, message: str) -> None:
    """Warn at the line that calls ``save_pretrained``, however deep below it this is."""
    caller = frame.f_back or frame
    warnings.warn_explicit(message, UserWarning, caller.f_code.co_filename, caller.f_lineno)


class _State:
    last: tuple[Callable[[], Any] | None, Layouts] = (None, {})


_state = _State()


def _reference(destination: object) -> Callable[[], Any] | None:
    try:
        return weakref.ref(destination)
    except TypeError:  # a plain dict, which somebody gave
        return None
