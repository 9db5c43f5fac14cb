"""Each alternative in a process of its own, as a user runs it; still in alternated rounds.

In one process the alternatives share Python's inline caches, which know the types of the model that
ran last, and what the processor has cached of their code.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.measure import clocked, keep_memory

__all__ = ["Process", "processes", "timed"]


class Process:
    """One alternative elsewhere. A call runs it once there, unmeasured."""

    def __init__(self, connection: Any, process: Any) -> None:
        self._connection = connection
        self._process = process

    def __call__(self) -> None:
        """Run it once."""
        self.spent(1)

    def spent(self, repeats: int) -> float:
        """The seconds of CPU time that it takes to run so many times in a row.

        Raises:
            RuntimeError: the process has ended.
        """
        self._connection.send(repeats)
        try:
            seconds: float = self._connection.recv()
        except EOFError:
            raise RuntimeError(
                "the process of an alternative has ended; see its traceback"
            ) from None
        return seconds

    def end(self) -> None:
        """Let the process end."""
        if self._process.is_alive():
            self._connection.send(0)
        self._process.join()


def timed(call: Any, repeats: int) -> float:
    """A timer for :func:`benchmarks.measure.compare`, of :class:`Process` only."""
    seconds: float = call.spent(repeats)
    return seconds


@contextmanager
def processes(
    case: str, place: int, quick: bool, names: Sequence[str]
) -> Iterator[dict[str, Process]]:
    """A process for each of the alternatives ``names`` of a case's table number ``place``."""
    context = mp.get_context("spawn")
    made: dict[str, Process] = {}
    try:
        for name in names:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, case, place, quick, name))
            process.start()
            there.close()
            made[name] = Process(here, process)
        yield made
    finally:
        for each in made.values():
            each.end()


def _serve(connection: Connection, case: str, place: int, quick: bool, name: str) -> None:
    torch.set_num_threads(1)
    keep_memory()
    tables = next(each for each in CASES if each.name == case).tables(quick, False, "cpu")
    table = next(islice(tables, place, None))
    timer = clocked()
    with table.alternatives(name) as found:
        (mine,) = (each for each in found if each.name == name)
        gc.collect()
        gc.freeze()
        gc.disable()
        while repeats := connection.recv():
            mine.call()  # what others have pushed out of the caches is there again
            connection.send(timer(mine.call, repeats))
            mine.settle()
            gc.collect()
