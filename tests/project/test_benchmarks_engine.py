"""The benchmarks' engine, report and targets, on a fake clock: no test measures a time."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import gpu, report
    from benchmarks.measure import Comparison, Timing, clocked, compare, orders
    from benchmarks.peers import BASE, FORWARD, STEP
    from benchmarks.targets import PART_TARGETS, PartTarget, Target, judge, judge_parts
finally:
    sys.path.remove(str(ROOT))


class Clock:
    """Stands still but for what is computed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Any:
        """Takes these times in turn, the last one ever after."""
        left = list(seconds)

        def call() -> None:
            self.ran.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_alternative_runs_once_a_round_and_in_each_place(count: int) -> None:
    names = [f"n{i}" for i in range(count)]
    rounds = list(orders(names, 3 * count))
    assert all(sorted(order) == names for order in rounds)
    for cycle in (rounds[:count], rounds[count : 2 * count], rounds[2 * count :]):
        for places in zip(*cycle, strict=True):
            assert sorted(places) == names
    assert rounds == list(orders(names, 3 * count))
    assert count < 5 or rounds[:count] != rounds[count : 2 * count]


def test_the_engine_alternates_and_does_not_time_what_settles() -> None:
    clock = Clock()

    def settle() -> None:
        clock.now += 1000

    found = compare(
        {"a": clock.work("a", 2.0), "b": clock.work("b", 3.0)},
        base="a",
        rounds=6,
        timer=clocked(clock),
        least=0.0,
        warmup=1,
        settle=settle,
    )
    assert found.repeats == 1
    assert found.timings == {"a": Timing((2.0,) * 6), "b": Timing((3.0,) * 6)}
    warmup, calibration, timed = clock.ran[:2], clock.ran[2:3], clock.ran[3:]
    assert warmup == ["a", "b"] and calibration == ["a"]
    for i in range(0, 12, 2):
        assert sorted(timed[i : i + 2]) == ["a", "b"]


def test_short_calls_are_repeated_equally_often() -> None:
    clock = Clock()
    found = compare(
        {"a": clock.work("a", 0.25), "b": clock.work("b", 1.0)},
        base="a",
        rounds=3,
        timer=clocked(clock),
        least=1.1,
        warmup=0,
    )
    assert found.repeats == 5
    assert found.timings["b"].rounds == (1.0,) * 3
    assert Counter(clock.ran) == {"a": 1 + 3 * 5, "b": 3 * 5}


def test_ratios_are_medians_within_rounds() -> None:
    # Round 2 was slow for everyone: the ratio of the medians would be 4.
    found = Comparison(
        "plain",
        {
            "plain": Timing((1.0, 10.0, 1.0)),
            "plain (A/A)": Timing((1.0, 11.0, 0.9)),
            "slow": Timing((2.0, 20.0, 4.0)),
        },
    )
    assert found.ratios("slow") == [2.0, 2.0, 4.0]
    assert found.ratio("slow") == 2.0 and found.ratio("plain") == 1.0
    assert found.ratio("plain (A/A)") == 1.0
    assert found.spread("slow") == (2.0, 3.0)
    assert found.speed("plain", "slow") == 2.0 and found.speed("slow", "plain") == 0.5
    assert found.timings["slow"].minimum == 2.0 and found.timings["slow"].median == 4.0
    assert Comparison("a", {"a": Timing((2.0,))}).spread("a") == (1.0, 1.0)


def test_the_collector_is_off_while_timing_and_back_on() -> None:
    seen = []
    assert gc.isenabled()
    compare({"a": lambda: seen.append(gc.isenabled())}, base="a", rounds=2, warmup=0, least=0.0)
    assert seen == [False] * 3 and gc.isenabled()

    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        compare({"a": broken}, base="a", rounds=1, warmup=0)
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_bad_arguments_of_the_engine() -> None:
    with pytest.raises(ValueError, match="rounds is 0"):
        compare({"a": int}, base="a", rounds=0)
    with pytest.raises(ValueError, match="'b' is not among a"):
        compare({"a": int}, base="b", rounds=1)


def test_targets_are_met_or_missed_by_how_much() -> None:
    found = Comparison(
        BASE,
        {
            BASE: Timing((1.0,)),
            "torch": Timing((1.5,)),
            "legacy": Timing((1.2,)),
            "ours fused": Timing((1.1,)),
        },
    )
    rows = ("ours fused", "not measured")
    some = [
        Target(("tcn",), (STEP,), rows, ratio=1.0, speed=1.25),
        Target(("tcn",), (STEP,), rows, speed=1.0, against=("legacy", "torch", "absent")),
        Target(("tcn",), (FORWARD,), rows, ratio=0.0),
        Target(("wavenet",), (STEP,), rows, ratio=0.0),
    ]
    ratio, speed, fastest = judge("tcn", STEP, found, some)
    assert (ratio.met, speed.met, fastest.met) == (False, True, True)
    assert str(ratio) == "MISSED  ours fused / plain at most 1: 1.100, by 0.100 (10%)"
    assert str(speed) == "met     torch / ours fused at least 1.25: 1.364"
    assert str(fastest).startswith("met     legacy / ours fused at least 1: 1.091")
    assert judge("rnn", STEP, found, some) == []


def test_the_report_as_json_and_as_markdown(tmp_path: Path) -> None:
    found = Comparison(BASE, {BASE: Timing((1e-3, 2e-3)), "torch": Timing((2e-3, 3e-3))}, repeats=4)
    base, torch_row = report.as_data(found, {"torch": {"launches": 7.0}})
    assert base["name"] == BASE and base["ratio"] == 1.0 and "launches" not in base
    assert torch_row["minimum_s"] == 2e-3 and torch_row["median_s"] == 2.5e-3
    assert torch_row["ratio"] == 1.75 and torch_row["ratio_of_minima"] == 2.0
    assert torch_row["speed_against_torch"] == 1.0 and torch_row["launches"] == 7.0
    table = report.markdown(found, {"torch": {"launches": 7.0}}).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    assert [cell.strip() for cell in table[3].split("|")[1:-1]] == [
        "torch", "2000.0", "2500.0", "1.750", "1.625–1.875", "2.000", "1.00", "7",
    ]  # fmt: skip

    path = tmp_path / "deep" / "found.json"
    report.write(path, {"environment": report.environment(), "rows": report.as_data(found)})
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["environment"]["torch"] == torch.__version__
    assert {"date", "commit", "device", "processor", "os", "python", "triton"} <= set(
        read["environment"]
    )
    assert [row["name"] for row in read["rows"]] == [BASE, "torch"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(path, {"nan": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == read


def test_what_a_profiler_recorded() -> None:
    def event(name: str, kind: str, microseconds: float) -> Any:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=kind), device_time=microseconds
        )

    events = [
        event("aten::mul", "CPU", 90.0),
        event("weight_norm_fwd", "CUDA", 10.0),
        event("weight_norm_fwd", "CUDA", 20.0),
        event("Memcpy HtoD", "CUDA", 50.0),
        event("Memset (Device)", "CUDA", 50.0),
    ]
    found = gpu.kernels_of(events, steps=2)
    assert (found.launches, found.seconds) == (1.0, pytest.approx(15e-6))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        torch.ones(3).add(1)
    real = recorded.events()
    assert real and gpu.kernels_of(real, 1) == gpu.Kernels(0, 0)


def test_the_numbers_of_a_part() -> None:
    forward = {"torch": gpu.Kernels(78, 4e-5), "ours fused": gpu.Kernels(2, 1e-5)}
    step = {"torch": gpu.Kernels(156, 10e-5), "ours fused": gpu.Kernels(5, 2.5e-5)}
    found = gpu.numbers(forward, step, elements=1000, groups=2, copy=1e9)
    assert found["forward kernels, torch / ours"] == pytest.approx(4.0)
    assert found["backward kernels, torch / ours"] == pytest.approx(4.0)
    assert found["forward launches a group"] == 1.0 and found["backward launches a group"] == 1.5
    # 8000 bytes in 10 µs are 0.8 GB/s.
    assert found["forward share of copy bandwidth"] == pytest.approx(0.8)
    assert found["backward share of copy bandwidth"] == pytest.approx(0.8)
    assert {target.quantity for target in PART_TARGETS} <= found.keys()
    (met, missed) = judge_parts(
        "p",
        found,
        [
            PartTarget(("p",), "forward launches a group", "at most", 4.0),
            PartTarget(("p",), "forward share of copy bandwidth", "at least", 0.85),
            PartTarget(("q",), "forward launches a group", "at most", 0.0),
        ],
    )
    assert met.met and not missed.met


def test_memory_is_kept() -> None:
    code = (
        "import resource; from benchmarks.measure import keep_memory, memory_is_kept\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "assert not memory_is_kept()\n"
        "if not keep_memory(): raise SystemExit('no')\n"
        "assert memory_is_kept()\n"
        "def fill(): return [b'x' * 2**23 for _ in range(4)] and None\n"
        "fill(); before = faults(); fill(); print(faults() - before)\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if run.stderr.strip() == "no":
        pytest.skip("malloc is not glibc's")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1000  # of 8,192 pages
