"""What stripping a file costs: in time against the obvious program, and in memory.

python -m benchmarks.checkpoints --gigabytes 2 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.report import ROOT, environment, write
from wn_surgery.checkpoints import convert_file

RESULTS = ROOT / "benchmarks" / "results" / "checkpoints.json"
TIMES = {"strip": ("naive", 1.1), "strip, sharded": ("strip", 1.2)}
MEGABYTE = 1 << 20
ROWS = 4096


def make(folder: Path, gigabytes: float) -> None:
    """A checkpoint of 64 MB weights, half of them weight-normed; and the same in four shards."""
    count = max(4, round(gigabytes * 1024 / 64))
    state: dict[str, torch.Tensor] = {}
    for number in range(count):
        weight = torch.randn(ROWS, ROWS)
        if number % 2:
            state[f"layer.{number}.weight"] = weight
        else:
            state[f"layer.{number}.weight_g"] = torch.rand(ROWS, 1) + 0.5
            state[f"layer.{number}.weight_v"] = weight
    save_file(state, folder / "one.safetensors")
    torch.save(state, folder / "one.pt")
    names = list(state)
    sharded = folder / "sharded"
    sharded.mkdir()
    places: dict[str, str] = {}
    for part in range(4):
        mine = names[part * len(names) // 4 : (part + 1) * len(names) // 4]
        file = f"model-{part + 1:05}-of-00004.safetensors"
        save_file({name: state[name] for name in mine}, sharded / file)
        places |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))


def naive(source: Path, target: Path) -> None:
    """What people write: everything into memory, then out again."""
    state = load_file(source)
    for name in [name for name in state if name.endswith("weight_g")]:
        weight = name.removesuffix("_g")
        state[weight] = torch._weight_norm(state.pop(f"{weight}_v"), state.pop(name), 0)
    save_file(state, target)


def naive_torch(source: Path, target: Path) -> None:
    """The same for a PyTorch file."""
    state = torch.load(source)
    for name in [name for name in state if name.endswith("weight_g")]:
        weight = name.removesuffix("_g")
        state[weight] = torch._weight_norm(state.pop(f"{weight}_v"), state.pop(name), 0)
    torch.save(state, target)


def alternatives(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What is timed; each is given a name that is free."""
    one, torch_file, sharded = folder / "one.safetensors", folder / "one.pt", folder / "sharded"

    def synced(target: Path) -> None:
        naive(one, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())

    return {
        "copyfile": lambda target: shutil.copyfile(one, target),
        "naive": lambda target: naive(one, target),
        "naive, then fsync": synced,
        "strip": lambda target: convert_file(one, target.with_suffix(".safetensors")),
        "strip, sharded": lambda target: convert_file(sharded, target),
        "naive, .pt": lambda target: naive_torch(torch_file, target),
        "strip, .pt": lambda target: convert_file(torch_file, target.with_suffix(".pt")),
    }


def time_of(function: Callable[[Path], object], folder: Path) -> float:
    """Seconds of one call; what it has written is deleted, and the disk is left at rest."""
    before = set(folder.iterdir())
    os.sync()
    start = time.perf_counter()
    function(folder / "out")
    spent = time.perf_counter() - start
    for path in set(folder.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return spent


_MEMORY = """
import sys, threading
from wn_surgery.checkpoints import convert_file
def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
peak, done, before = 0, False, anonymous()
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
convert_file(sys.argv[1], sys.argv[2])
done = True
thread.join()
print(peak - before)
"""


def memory_of(source: Path, target: Path) -> int:
    """The peak of anonymous memory in bytes while a file is stripped, above the imports'."""
    command = [sys.executable, "-c", _MEMORY, str(source), str(target)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return int(ran.stdout)


def main(argv: list[str] | None = None) -> int:
    """Print both tables; 0 if every target is met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    good = True
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make(folder, args.gigabytes)
        rows = alternatives(folder)
        times: dict[str, list[float]] = {each: [] for each in rows}
        for turn in range(args.rounds + 1):
            for each, function in rows.items():
                spent = time_of(function, folder)
                if turn:  # the first round fills the page cache
                    times[each].append(spent)
        least = {each: min(mine) for each, mine in times.items()}
        table: dict[str, Any] = {}
        print(f"{'':20} {'min s':>8} {'median s':>9} {'of naive':>9}")
        for each, mine in times.items():
            table[each] = {"min": least[each], "median": statistics.median(mine), "all": mine}
            print(
                f"{each:20} {least[each]:8.2f} {statistics.median(mine):9.2f} "
                f"{least[each] / least['naive']:9.2f}"
            )
        for each, (peer, target) in TIMES.items():
            ratio = least[each] / least[peer]
            good &= ratio <= target
            verdict = "ok  " if ratio <= target else "FAIL"
            print(f"{verdict}  {each} / {peer}: {ratio:.2f} <= {target}")
        limit = 100 * MEGABYTE + 2 * 4 * ROWS * ROWS
        memory = {}
        for each, source in {"strip": "one.safetensors", "strip, .pt": "one.pt"}.items():
            memory[each] = memory_of(folder / source, folder / f"out{Path(source).suffix}")
            met = memory[each] <= limit
            good &= met
            print(
                f"{'ok  ' if met else 'FAIL'}  {each}: {memory[each] / MEGABYTE:.0f} MB of "
                f"anonymous memory <= {limit / MEGABYTE:.0f}"
            )
    write(
        args.out,
        {
            "benchmark": "checkpoints",
            "environment": environment(),
            "clock": "wall clock, one thread",
            "gigabytes": args.gigabytes,
            "rounds": args.rounds,
            "seconds": table,
            "anonymous_bytes": memory,
            "limit_bytes": limit,
        },
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
