"""How long ``wn.plan`` takes on large module trees, and whether it grows linearly.

    python -m benchmarks plan

Half of each tree is wide (one list of blocks), half is deep (towers of 32 nested blocks). A block
holds four Linear, four Conv1d and a LayerNorm: 8 of its 10 modules are matched by three rules.
Beside the plan run two things that are not it, in alternated rounds: the bare walk, and the loop
that one writes by hand with ``isinstance`` and ``fnmatch``, which checks nothing. Times are
process CPU time in one thread. What was predicted is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

import wn_surgery as wn
from benchmarks.report import environment, write

RESULTS = Path(__file__).parent / "results" / "plan.json"
SIZES = (1_000, 10_000, 100_000)
DEPTH = 32  # nested blocks in a tower
WIDTH = 4  # features of every layer: planning reads norms, and the rest is Python
MODULES = 10  # in a block, itself included
LIMIT = 5.0  # seconds for the largest tree
GROWTH = 1.5  # time per module at the largest size, relative to the one before

RULES: list[dict[str, Any]] = [
    {"action": "apply", "types": ["Conv1d", "ConvTranspose1d"]},
    {"action": "apply", "names": "{wide,deep}.**.fc{0..3}", "types": "Linear", "eps": 1e-12},
    {"action": "skip", "names": "**.conv3"},
]


class Block(nn.Module):
    """Nine layers; ``inner`` is the next block of a tower."""

    def __init__(self, inner: Block | None = None) -> None:
        super().__init__()
        for i in range(4):
            self.add_module(f"fc{i}", nn.Linear(WIDTH, WIDTH))
            self.add_module(f"conv{i}", nn.Conv1d(WIDTH, WIDTH, 3))
        self.norm = nn.LayerNorm(WIDTH)
        if inner is not None:
            self.inner = inner


def tower() -> Block:
    """A block in a block in a block."""
    block = Block()
    for _ in range(DEPTH - 1):
        block = Block(block)
    return block


def tree(modules: int) -> nn.Module:
    """A model of about so many modules, half of them in towers."""
    blocks = modules // MODULES
    towers = max(1, blocks // 2 // DEPTH)
    wide = blocks - towers * DEPTH
    return nn.ModuleDict(
        {
            "wide": nn.ModuleList(Block() for _ in range(wide)),
            "deep": nn.ModuleList(tower() for _ in range(towers)),
        }
    )


def by_hand(model: nn.Module) -> list[str]:
    """What the rules choose, as one would write it: no checks, ties, aliases or diagnosis."""
    chosen = []
    for name, module in model.named_modules():
        convolution = isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
        linear = isinstance(module, nn.Linear) and any(
            fnmatchcase(name, pattern) for pattern in ("wide.*.fc[0-3]", "deep.*.fc[0-3]")
        )
        if (convolution or linear) and not fnmatchcase(name, "*.conv3"):
            chosen.append(name)
    return chosen


def seconds(call: Callable[[], object]) -> float:
    """Process CPU time of one call, without the garbage of the call before."""
    gc.collect()
    start = time.process_time()
    result = call()
    spent = time.process_time() - start
    del result
    return spent


def measure(modules: int, rounds: int) -> dict[str, Any]:
    """Time the plan and its peers on one tree, round by round in turn."""
    model = tree(modules)
    plan = wn.plan(model, RULES)
    matched, changed = len(plan.steps), len(plan.changes)
    if [step.site.node.paths[0] for step in plan.changes] != by_hand(model):
        raise SystemExit("the loop by hand and the plan do not choose the same layers")
    del plan
    cases: dict[str, Callable[[], object]] = {
        "plan": lambda: wn.plan(model, RULES),
        "walk": lambda: list(model.named_modules()),
        "by hand": lambda: by_hand(model),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name in list(cases) if turn % 2 == 0 else reversed(cases):
            times[name].append(seconds(cases[name]))
    count = sum(1 for _ in model.modules())
    return {
        "modules": count,
        "matched": matched,
        "changed": changed,
        "rounds": rounds,
        "seconds": {
            name: {"min": min(spent), "median": statistics.median(spent)}
            for name, spent in times.items()
        },
        "plan_us_per_module": 1e6 * min(times["plan"]) / count,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':>9}  {'plan':^15}  {'walk':^15}  {'by hand':^15}  plan, µs")
    print(f"{'modules':>9}" + f"  {'min':>7} {'median':>7}" * 3 + "  a module")
    for row in rows:
        spent = "".join(
            f"  {row['seconds'][name]['min']:7.3f} {row['seconds'][name]['median']:7.3f}"
            for name in ("plan", "walk", "by hand")
        )
        print(f"{row['modules']:>9,}{spent}  {row['plan_us_per_module']:8.1f}")


def main(argv: list[str] | None = None) -> int:
    """Run every size; 0 if the largest is under the limit and growth is linear."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plan", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    rows = []
    for size in args.sizes:
        rows.append(measure(size, args.rounds))
        gc.collect()
    show(rows)
    largest = rows[-1]["seconds"]["plan"]["min"]
    growth = rows[-1]["plan_us_per_module"] / rows[max(0, len(rows) - 2)]["plan_us_per_module"]
    checks = {
        f"{rows[-1]['modules']:,} modules in {largest:.2f} s, less than {LIMIT:g} s": largest
        < LIMIT,
        f"time per module grows by {growth:.2f}, less than {GROWTH:g}": growth < GROWTH,
    }
    for text, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'}  {text}")
    result = {
        "benchmark": "plan",
        "environment": environment(),
        "clock": "process CPU time, one thread",
        "rules": RULES,
        "growth_per_module": growth,
        "sizes": rows,
    }
    write(args.out, result)
    return 0 if all(checks.values()) else 1
