"""When values may be reused: within the outermost forward of one root, in one thread."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Protocol

__all__ = ["Droppable", "Scope"]


class Droppable(Protocol):
    """What holds values that may be dropped before the forward ends."""

    def drop(self) -> None:
        """Drop them."""
        ...


class Scope:
    """One forward at a time.

    Attributes:
        thread: whose forward is under way; ``None`` between forwards.
        era: counts the forwards, and the accesses between them, after which nothing that was
            kept for a backward may be used.
        stale: whether the groups no longer fit the model.
        last: the last group that was computed without grad.
    """

    __slots__ = ("_depth", "_frame", "_lock", "era", "last", "stale", "thread")

    def __init__(self) -> None:
        self.thread: int | None = None
        self.era = 0
        self.stale = False
        self.last: Droppable | None = None
        self._depth = 0
        self._frame: FrameType | None = None
        self._lock = threading.Lock()

    def enter(self, frame: FrameType | None) -> bool:
        """Begin a forward.

        Args:
            frame: where it runs, by which one that ended without :meth:`leave` is known;
                ``None``: it never does.

        Returns:
            Whether it is an outermost one. Not where it runs inside another, nor where
            another thread's is under way; that one keeps the scope.
        """
        me = threading.get_ident()
        with self._lock:
            if self.thread is not None and self._running():
                self._depth += self.thread == me
                return False
            self.thread, self._frame, self._depth, self.last = me, frame, 1, None
            self.era += 1
            return True

    def leave(self) -> bool:
        """End a forward; whether it was the outermost one."""
        with self._lock:
            if self.thread != threading.get_ident():
                return False
            self._depth -= 1
            if self._depth:
                return False
            self.thread = self._frame = self.last = None
            return True

    def _running(self) -> bool:
        # torch calls no hook after a KeyboardInterrupt, so a forward may end without `leave`.
        if self._frame is None:
            return True
        frame = sys._current_frames().get(self.thread or 0)
        while frame is not None:
            if frame is self._frame:
                return True
            frame = frame.f_back
        return False
