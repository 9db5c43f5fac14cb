"""When values may be shared: within one call of one root, or within one backward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from types import FrameType
from typing import Protocol

import torch

__all__ = ["Scope", "Values"]

_graph_task = torch._C._current_graph_task_id
_get_ident = threading.get_ident


class Values(Protocol):
    """What holds values that are shared."""

    def forget(self) -> None:
        """Drop them."""
        ...

    def drop(self) -> None:
        """Drop those without a graph, unless they are needed again."""
        ...


class Scope:
    """The call of a fused root that is under way, if any; one at a time.

    Attributes:
        calls: how many there have been.
        filled: what holds values that were computed since :meth:`forget`.
        last: the last of them to be computed without a graph.
        stale: whether the groups no longer fit the model.
    """

    __slots__ = ("_clear", "_lock", "_owner", "_thread", "calls", "filled", "last", "stale")

    def __init__(self) -> None:
        self.calls = 0
        self.filled: list[Values] = []
        self.last: Values | None = None
        self.stale = False
        self._thread: int | None = None
        self._owner: object = None
        self._clear: Callable[[], None] = _is_running
        self._lock = threading.Lock()

    def enter(self, owner: object) -> bool:
        """Begin a call.

        Args:
            owner: the frame that it runs in; or any object, if it certainly calls :meth:`leave`.

        Returns:
            Whether it is an outermost one. Not where it runs inside another, nor where
            another thread's is under way; that one keeps the scope.
        """
        with self._lock:
            if self._thread is not None and self._runs():
                return False
            self._thread, self._owner = _get_ident(), owner
            self._clear = owner.clear if isinstance(owner, FrameType) else _is_running
            self.calls += 1
            self.forget()
            return True

    def leave(self, owner: object) -> None:
        """End the call of ``owner``, if it is the outermost one."""
        with self._lock:
            if self._thread is None or (self._owner is not owner and self._runs()):
                return
            self._thread, self._owner, self._clear = None, None, _is_running
            self.forget()

    def forget(self) -> None:
        """Drop every value."""
        filled, self.filled, self.last = self.filled, [], None
        for values in filled:
            values.forget()

    def here(self) -> Hashable:
        """What a value that is computed here and now may be shared within.

        Returns:
            Something that differs for each call of the root, and for each backward outside of
            one (which runs checkpointed parts of a call again); ``None``: neither is under
            way in this thread.
        """
        if self._thread == _get_ident():
            # As in _runs(), without the call: this is asked thousands of times a second.
            try:
                self._clear()
            except RuntimeError:
                return self.calls
        task = _graph_task()
        return None if task == -1 else ("backward", task)

    def _runs(self) -> bool:
        # torch calls no hook after a KeyboardInterrupt, so a call may end without `leave`. But
        # Python knows: it does not clear a frame that is being executed, and says so.
        try:
            self._clear()
        except RuntimeError:
            return True
        return False


def _is_running() -> None:
    """Stands in for the ``clear`` of a frame, for an owner that certainly calls ``leave``."""
    raise RuntimeError
