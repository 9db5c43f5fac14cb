"""Measuring on a GPU: whole steps, and weight norm alone over the bandwidth of the device.

A step is timed by CUDA events, alternated with the others like anywhere else. Launches and the
time inside kernels come from ``torch.profiler``. *Parts* are models of which nothing is left but
the reading of their weights (:class:`benchmarks.models.ReadWeights`): all of their kernels are
weight norm's, whatever they are called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Call
from benchmarks.models import TCN, Block, ReadWeights, WaveNet
from benchmarks.peers import (
    NO_GRAD,
    PEERS,
    STEP,
    Alternative,
    Mode,
    Peer,
    Workload,
    agree,
    alternatives,
)
from benchmarks.report import verdicts_as_data
from benchmarks.targets import Verdict, judge_parts

__all__ = [
    "Kernels", "Part", "copy_bandwidth", "kernels_of", "numbers", "parts", "profiled",
    "run_parts", "timed",
]  # fmt: skip

STEPS = 10  # under the profiler
ROWS = ("torch", "ours fused")


@dataclass(frozen=True)
class Kernels:
    """What ran on the device in one step.

    Attributes:
        launches: kernels, without copies and fills.
        seconds: inside of them.
    """

    launches: float
    seconds: float

    def minus(self, other: Kernels) -> Kernels:
        """What this one ran more than another."""
        return Kernels(self.launches - other.launches, self.seconds - other.seconds)


def timed(call: Call, repeats: int) -> float:
    """Seconds between two CUDA events around the calls; see :data:`benchmarks.measure.Timer`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def host_seconds(call: Call, repeats: int = STEPS) -> float:
    """Median seconds until a call returns, with an idle device before it."""
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(spent)


def kernels_of(events: Iterable[Any], steps: int) -> Kernels:
    """Count what a profiler recorded.

    Args:
        events: with ``device_type``, ``name`` and ``device_time`` in µs, as
            ``torch.profiler.profile.events()`` gives them.
        steps: how many steps they are of.
    """
    launched = [
        event.device_time
        for event in events
        if event.device_type.name == "CUDA"
        and not event.name.startswith(("Memcpy", "Memset", "ProfilerStep"))
    ]
    return Kernels(len(launched) / steps, sum(launched) / 1e6 / steps)


def kernels(call: Call, steps: int = STEPS) -> Kernels:
    """Run a call under the profiler."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    return kernels_of(recorded.events() or (), steps)


def profiled(call: Call) -> dict[str, float]:
    """The columns of a table that only a GPU has."""
    found = kernels(call)
    return {
        "launches": found.launches,
        "kernels, µs": 1e6 * found.seconds,
        "host, µs": 1e6 * host_seconds(call),
    }


def copy_bandwidth(elements: int = 2**28) -> float:
    """Bytes a second that a copy of float32 reads and writes, inside its kernel: the best of 20."""
    source = torch.randn(elements, device="cuda")
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), 1) for _ in range(20))
    return 2 * source.nbytes / best


@dataclass(frozen=True)
class Part:
    """Layers of which only the weights are read.

    Attributes:
        name: for the targets.
        layers: with plain weights.
        rules: where weight norm goes.
        dtype: of autocast; ``None``: no autocast.
    """

    name: str
    layers: list[nn.Module]
    rules: dict[str, Any]
    dtype: torch.dtype | None = None

    @property
    def weights(self) -> list[Tensor]:
        """The plain weights."""
        return [layer.get_parameter("weight") for layer in self.layers]

    @property
    def elements(self) -> int:
        """How many numbers the weights have."""
        return sum(weight.numel() for weight in self.weights)

    def workload(self) -> Workload:
        """Reading all weights, and a backward from given gradients."""
        upstream = [torch.randn_like(weight, dtype=self.dtype) for weight in self.weights]

        def step(model: nn.Module, block: Block) -> Tensor:
            with block():
                weights = model()
                torch.autograd.backward(weights, upstream)
            first: Tensor = weights[0].detach()
            return first

        return Workload(
            ReadWeights(self.layers, self.dtype),
            self.rules,
            lambda m: m()[0],
            step,
            about=self.name,
        )

    def around(self) -> Block:
        """Autocast, if the part has it."""
        dtype = self.dtype
        return nullcontext if dtype is None else lambda: torch.autocast("cuda", dtype=dtype)


def parts(quick: bool) -> Iterator[Part]:
    """Every part, on the device; each is made when it is asked for."""
    from benchmarks.cases import vocoder

    def convolutions(model: nn.Module) -> list[nn.Module]:
        kinds = nn.Conv1d | nn.ConvTranspose1d
        return [m for m in model.cuda().modules() if isinstance(m, kinds)]

    wide = 1024 if quick else 8192
    linear: dict[str, Any] = {"types": "torch.nn.Linear"}
    matrices: list[nn.Module] = [nn.Linear(wide, wide, bias=False).cuda() for _ in range(4)]
    yield Part("tcn", convolutions(TCN()), {"types": ["Conv1d"]})
    yield Part("wavenet", convolutions(WaveNet()), {"types": ["Conv1d"]})
    yield Part("hifigan", convolutions(vocoder(128 if quick else 512)), CONVOLUTIONS_1D)
    yield Part(
        "hifigan, bf16 autocast",
        convolutions(vocoder(128 if quick else 512)),
        CONVOLUTIONS_1D,
        torch.bfloat16,
    )
    yield Part("large matrices", matrices, linear)
    transposed: list[nn.Module] = [nn.ConvTranspose1d(512, 256, 16, bias=False).cuda()]
    yield Part("middle dim", transposed, {"types": "ConvTranspose1d", "dim": 1})
    yield Part("whole tensor", matrices[:1], linear | {"dim": None})


CONVOLUTIONS_1D: dict[str, Any] = {"types": ["Conv1d", "ConvTranspose1d"]}


def numbers(
    forward: dict[str, Kernels], step: dict[str, Kernels], elements: int, groups: int, copy: float
) -> dict[str, float]:
    """What the targets are about, from what each row ran.

    Args:
        forward: of a forward without grad, by row.
        step: of a forward and a backward, by row.
        elements: how many numbers the weights have; each is 4 bytes.
        groups: how many groups ours has.
        copy: bytes a second of a copy.
    """
    theirs, ours = (forward[row] for row in ROWS)
    both_theirs, both_ours = (step[row] for row in ROWS)
    back_theirs, back_ours = both_theirs.minus(theirs), both_ours.minus(ours)
    return {
        "forward kernels, torch / ours": theirs.seconds / ours.seconds,
        "backward kernels, torch / ours": back_theirs.seconds / back_ours.seconds,
        "forward+backward kernels, torch / ours": both_theirs.seconds / both_ours.seconds,
        "forward launches, torch": theirs.launches,
        "backward launches, torch": back_theirs.launches,
        "forward launches a group": ours.launches / groups,
        "backward launches a group": back_ours.launches / groups,
        # v is read and w written; v and the gradient of w are read and that of v written.
        "forward share of copy bandwidth": 8 * elements / ours.seconds / copy,
        "backward share of copy bandwidth": 12 * elements / back_ours.seconds / copy,
    }


def _peers() -> tuple[Peer, ...]:
    return tuple(peer for peer in PEERS if peer.name in ROWS)


def _measured(workload: Workload, mode: Mode, around: Block) -> dict[str, Kernels]:
    found: dict[str, Kernels] = {}
    with alternatives(workload, mode, _peers(), around=around) as rows:
        for row in rows:
            found[row.name] = kernels(row.call)
            row.settle()
    return found


def _groups(rows: Iterable[Alternative]) -> int:
    """How many groups the fused row has, at least 1."""
    for row in rows:
        if isinstance(row.prepared, list):
            numbered = (member.group for fusion in row.prepared for member in fusion.members)
            return max(1, len({number for number in numbered if number is not None}))
    return 1


def run_parts(quick: bool, done: Container[str]) -> Iterator[tuple[dict[str, Any], list[Verdict]]]:
    """Measure every part, print it, and judge it.

    Args:
        quick: smaller ones, of which nothing is judged.
        done: the names of parts to leave out.

    Yields:
        Plain JSON data, and the verdicts, of one part.
    """
    copy = copy_bandwidth()
    print(f"\n## weight norm alone\n\na copy: {copy / 1e9:.0f} GB/s\n")
    for part in parts(quick):
        if part.name in done:
            continue
        workload, around = part.workload(), part.around()
        forward = _measured(workload, NO_GRAD, around)
        if any(row not in forward for row in ROWS):
            print(f"left out: {part.name}: {' and '.join(ROWS)} are not both there")
            continue
        with alternatives(workload, STEP, _peers(), around=around) as rows:
            agree(rows, 1e-3 if part.dtype is None else 2e-2)
            groups = _groups(rows)
        found = numbers(forward, _measured(workload, STEP, around), part.elements, groups, copy)
        judged = [] if quick else judge_parts(part.name, found)
        print(f"{part.name}: {part.elements:,} elements, {groups} group(s)")
        for key, value in found.items():
            print(f"  {key}: {value:.4g}")
        for verdict in judged:
            print(f"  {verdict}", flush=True)
        data = {"part": part.name, "elements": part.elements, "groups": groups, **found}
        yield data | {"targets": verdicts_as_data(judged)}, judged
