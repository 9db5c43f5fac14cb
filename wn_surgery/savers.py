"""Who asks for a state dict: a ``save_pretrained``, whose files have to be read back without us.

A training checkpoint goes back into the model that it came from. What ``save_pretrained`` writes is
read by a model that its class builds anew, and finds no g and v where that has a plain weight. So
g and v ask, before they go into a state dict, under which names they will be looked for.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from types import FrameType
from typing import Any, TypeAlias

from torch import nn

__all__ = ["Names", "asking", "decided_by", "names_for", "warn"]

Names: TypeAlias = Mapping[str, tuple[str, ...]]
"""By a weight's key, what to save it as: the keys of g and v, or its own for the plain weight."""

_METHOD = "save_pretrained"


def asking() -> FrameType | None:
    """The innermost call of a module's own ``save_pretrained`` that is running in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _METHOD and isinstance(frame.f_locals.get("self"), nn.Module):
            return frame
        frame = frame.f_back
    return None


def decided_by(decide: Callable[[FrameType], Names]) -> Callable[[FrameType], Names]:
    """Have this function say what a ``save_pretrained`` needs; a decorator."""
    _state.decide = decide
    return decide


def names_for(destination: MutableMapping[str, Any], weight: str) -> tuple[str, ...] | None:
    """The keys under which the one who asks for a state dict will look for a weight.

    Args:
        destination: the state dict that is being filled.
        weight: the key that the weight has without weight norm.

    Returns:
        Two for g and v, one for the plain weight; None for those that g and v have anyway.
    """
    seen, names = _state.last
    if seen is None or seen() is not destination:
        frame = asking()
        names = {} if frame is None or _state.decide is None else _state.decide(frame)
        # One decision for a state dict, of which every weight-normed layer asks.
        _state.last = (_reference(destination), names)
    return names.get(weight)


def warn(frame: FrameType, message: str) -> None:
    """Warn at the line that calls ``save_pretrained``, however deep below it this is."""
    caller = frame.f_back or frame
    warnings.warn_explicit(message, UserWarning, caller.f_code.co_filename, caller.f_lineno)


class _State:
    decide: Callable[[FrameType], Names] | None = None
    last: tuple[Callable[[], Any] | None, Names] = (None, {})


_state = _State()


def _reference(destination: object) -> Callable[[], Any] | None:
    try:
        return weakref.ref(destination)
    except TypeError:  # a plain dict, which somebody gave
        return None
