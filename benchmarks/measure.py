"""The timing engine: alternatives in alternated rounds, and what follows from their times.

It knows nothing of torch. What is slow for a while, a neighbour on the machine say, is slow for
all alternatives of a round, so they are compared within rounds: a ratio is the median of the
ratios of the rounds, not the ratio of two medians.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "Call",
    "Comparison",
    "Timer",
    "Timing",
    "clocked",
    "compare",
    "keep_memory",
    "memory_is_kept",
    "orders",
]

Call: TypeAlias = Callable[[], object]
# Calls so many times, and says how many seconds that took altogether.
Timer: TypeAlias = Callable[[Call, int], float]


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@functools.cache
def keep_memory() -> bool:
    """Let malloc give no memory back to the system while this process lasts; whether it can.

    Otherwise chance decides, by what lies at the end of the heap, whether a step gets its memory
    anew from the system, which takes as long as weight norm.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc's
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def memory_is_kept() -> bool:
    """Whether :func:`keep_memory` was called in this process, with success."""
    return keep_memory.cache_info().currsize > 0 and keep_memory()


@dataclass(frozen=True)
class Timing:
    """Seconds for one call of one alternative, a number for each round."""

    rounds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The round least disturbed by whatever else ran."""
        return min(self.rounds)

    @property
    def median(self) -> float:
        """The usual round."""
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Comparison:
    """The times of all alternatives.

    Attributes:
        base: what the others are compared with.
        timings: by name, in the order in which they were given.
        repeats: how many calls one time is made of.
    """

    base: str
    timings: dict[str, Timing]
    repeats: int = 1

    def ratios(self, name: str, to: str | None = None) -> list[float]:
        """Time of ``name`` over the time of ``to`` (the base), round by round."""
        other = self.timings[self.base if to is None else to].rounds
        return [a / b for a, b in zip(self.timings[name].rounds, other, strict=True)]

    def ratio(self, name: str, to: str | None = None) -> float:
        """The median of :meth:`ratios`."""
        return statistics.median(self.ratios(name, to))

    def spread(self, name: str) -> tuple[float, float]:
        """The quartiles of :meth:`ratios`: half of the rounds lie between them."""
        ratios = self.ratios(name)
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def speed(self, name: str, against: str) -> float:
        """How many times as fast as ``against``: the median over the rounds."""
        return self.ratio(against, name)


def clocked(clock: Callable[[], float] = time.process_time) -> Timer:
    """A timer that reads a clock before and after.

    Args:
        clock: seconds; by default those that this process computed, which leaves out
            the time in which others had the core.
    """

    def timer(call: Call, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return clock() - start

    return timer


def orders(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """In which order the alternatives run, round by round.

    Shuffled, then rotated by one each round until each has run in each place, then shuffled
    anew: so none is always behind the same other one, nor always first.
    """
    chance = random.Random(seed)
    shuffled = list(names)
    for turn in range(rounds):
        place = turn % len(shuffled)
        if place == 0:
            chance.shuffle(shuffled)
        yield shuffled[place:] + shuffled[:place]


def compare(
    calls: Mapping[str, Call],
    *,
    base: str,
    rounds: int,
    timer: Timer | None = None,
    least: float = 0.01,
    warmup: int = 2,
    settle: Call | None = None,
    seed: int = 0,
) -> Comparison:
    """Time the alternatives in turn.

    Args:
        calls: what to time, by name.
        base: the one that the others are compared with.
        rounds: how many times each is measured.
        timer: by default process CPU time.
        least: calls are repeated until the base takes so many seconds for one measurement;
            all alternatives are repeated equally often.
        warmup: unmeasured calls of each before the first round.
        settle: called after each measurement, unmeasured.
        seed: of the order.

    Returns:
        The times.

    Raises:
        ValueError: no rounds, or ``base`` is not among the calls.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    if base not in calls:
        raise ValueError(f"the base {base!r} is not among {', '.join(calls)}")
    timer = clocked() if timer is None else timer
    settle = _nothing if settle is None else settle
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
            settle()
    with _no_collection():
        once = timer(calls[base], 1)
        settle()
        repeats = max(1, math.ceil(least / once)) if once > 0 else 1
        for order in orders(list(calls), rounds, seed):
            for name in order:
                times[name].append(timer(calls[name], repeats) / repeats)
                settle()
            gc.collect()
    timings = {name: Timing(tuple(spent)) for name, spent in times.items()}
    return Comparison(base, timings, repeats)


def _nothing() -> None:
    """Settle nothing."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """No collection but the explicit ones, which skip whatever existed before."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
