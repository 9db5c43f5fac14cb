"""What was asked for, as data, and whether the measured tables meet it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from benchmarks.cases import MODELS
from benchmarks.measure import Comparison
from benchmarks.peers import FORWARD, NO_GRAD, STEP, Mode

__all__ = [
    "COMPILED_TARGETS",
    "GPU_TARGETS",
    "PART_TARGETS",
    "SCALE_TARGETS",
    "TARGETS",
    "PartTarget",
    "Target",
    "Verdict",
    "judge",
    "judge_parts",
]

TORCH_PEERS = ("legacy", "torch", "torch cached()")
FUSED = ("ours fused",)
FOLDED = ("ours folded",)
NATIVE = ("ours native",)


@dataclass(frozen=True)
class Target:
    """Bounds on the rows of some tables.

    Attributes:
        cases: the tables' cases.
        modes: the tables' modes.
        rows: the rows that have to meet it.
        ratio: the most that their time may be, relative to the base; ``None``: no bound.
        speed: the least factor by which they have to be faster than the fastest of ``against``.
        against: the rows that ``speed`` is about.
    """

    cases: tuple[str, ...]
    modes: tuple[Mode, ...]
    rows: tuple[str, ...]
    ratio: float | None = None
    speed: float | None = None
    against: tuple[str, ...] = ("torch",)


TARGETS: tuple[Target, ...] = (
    Target(MODELS, (NO_GRAD,), FOLDED, ratio=1.03, speed=1.2),
    Target(("small",), (FORWARD,), NATIVE, ratio=1.08, speed=1.35),
    Target(("small",), (NO_GRAD,), NATIVE, ratio=1.07, speed=1.35),
    Target(("small",), (STEP,), NATIVE, ratio=1.20, speed=1.20),
    Target(("wavenet",), (FORWARD,), NATIVE, ratio=1.06, speed=1.0),
    Target(("wavenet",), (STEP,), NATIVE, ratio=1.10, speed=1.0),
    Target(("tcn",), (FORWARD, NO_GRAD), NATIVE, ratio=1.10, speed=1.25),
    Target(("tcn",), (STEP,), NATIVE, ratio=1.08, speed=1.12),
    Target(("rnn",), (FORWARD,), NATIVE, ratio=1.03, speed=2.2),
    Target(("rnn",), (STEP,), NATIVE, ratio=1.03, speed=1.7),
    Target(("llama-step",), (STEP,), FUSED, speed=1.0, against=TORCH_PEERS),
    Target(("middle-dim",), (STEP,), NATIVE, ratio=7.0, speed=3.0),
)
"""On the CPU, eager."""

COMPILED_TARGETS: tuple[Target, ...] = (
    Target(("wavenet-8",), (FORWARD,), ("ours",), ratio=1.10, speed=1.05),
    Target(("wavenet-8",), (STEP,), ("ours",), ratio=1.15, speed=1.05),
)
"""On the CPU, under torch.compile."""

GPU_TARGETS: tuple[Target, ...] = (
    Target(("tcn", "wavenet"), (FORWARD, NO_GRAD, STEP), FUSED, ratio=1.08, speed=1.6),
    Target(("hifigan-1frame",), (FORWARD, NO_GRAD), FUSED, ratio=1.08, speed=1.6),
    Target(("hifigan-step",), (STEP,), FUSED, ratio=1.08, speed=1.6),
)
"""On a GPU, whole steps by CUDA events."""


@dataclass(frozen=True)
class Verdict:
    """One bound and what was measured.

    Attributes:
        text: the bound in words, with its row.
        value: what was measured.
        bound: what was asked for.
        met: whether it is met.
    """

    text: str
    value: float
    bound: float
    met: bool

    def __str__(self) -> str:
        if self.met:
            return f"met     {self.text}: {self.value:.3f}"
        off = abs(self.value - self.bound)
        return f"MISSED  {self.text}: {self.value:.3f}, by {off:.3f} ({off / self.bound:.0%})"


Kind: TypeAlias = Literal["at most", "at least"]


def _verdict(text: str, value: float, kind: Kind, bound: float) -> Verdict:
    met = value <= bound if kind == "at most" else value >= bound
    return Verdict(f"{text} {kind} {bound:g}", value, bound, met)


def judge(
    case: str, mode: Mode, found: Comparison, targets: Iterable[Target] = TARGETS
) -> list[Verdict]:
    """Compare a table with its targets; rows that were not measured have no verdict.

    Args:
        case: the table's case.
        mode: the table's mode.
        found: its times.
        targets: the bounds.
    """
    verdicts = []
    for target in targets:
        if case not in target.cases or mode not in target.modes:
            continue
        for row in target.rows:
            if row not in found.timings:
                continue
            if target.ratio is not None:
                verdicts.append(
                    _verdict(f"{row} / {found.base}", found.ratio(row), "at most", target.ratio)
                )
            against = [name for name in target.against if name in found.timings]
            if target.speed is not None and against:
                best = min(against, key=found.ratio)
                verdicts.append(
                    _verdict(f"{best} / {row}", found.speed(row, best), "at least", target.speed)
                )
    return verdicts


@dataclass(frozen=True)
class PartTarget:
    """A bound on a number of :mod:`benchmarks.gpu`'s parts, or of :mod:`benchmarks.scale`'s cases.

    Attributes:
        parts: the parts that have to meet it.
        quantity: the name of the number.
        kind: which way the bound is.
        bound: the number.
    """

    parts: tuple[str, ...]
    quantity: str
    kind: Kind
    bound: float


SMALL = ("tcn", "wavenet", "hifigan")
PART_TARGETS: tuple[PartTarget, ...] = (
    PartTarget(SMALL, "forward kernels, torch / ours", "at least", 4.0),
    PartTarget(SMALL, "forward+backward kernels, torch / ours", "at least", 4.0),
    PartTarget(SMALL, "forward launches a group", "at most", 4.0),
    PartTarget(SMALL, "backward launches a group", "at most", 4.0),
    PartTarget(("large matrices",), "forward share of copy bandwidth", "at least", 0.85),
    PartTarget(("large matrices",), "backward share of copy bandwidth", "at least", 0.85),
    PartTarget(("hifigan, bf16 autocast",), "forward+backward kernels, torch / ours",
               "at least", 2.0),
    PartTarget(("middle dim", "whole tensor"), "forward kernels, torch / ours", "at least", 3.0),
    PartTarget(("middle dim", "whole tensor"), "backward kernels, torch / ours", "at least", 4.0),
)  # fmt: skip
"""On a GPU, the weight-norm part alone, by the profiler."""


SCALE_TARGETS: tuple[PartTarget, ...] = (
    PartTarget(("llama 405B",), "seconds", "at most", 1.0),
    PartTarget(("llama 405B",), "MB above the model", "at most", 64.0),
)
"""Plan, apply and remove on meta, as :mod:`benchmarks.scale` measures them."""


def judge_parts(
    part: str, numbers: Mapping[str, float], targets: Iterable[PartTarget] = PART_TARGETS
) -> list[Verdict]:
    """Compare the numbers of one part with its targets."""
    return [
        _verdict(target.quantity, numbers[target.quantity], target.kind, target.bound)
        for target in targets
        if part in target.parts and target.quantity in numbers
    ]
