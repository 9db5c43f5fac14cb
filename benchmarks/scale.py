"""What planning and patching of models that no machine here could hold costs, on meta.

    python -m benchmarks.scale

Llama 3.1 405B and DeepSeek-V3 (671 billion parameters, of which most are 256 experts a layer in two
3-D parameters), built by transformers on the meta device. Seconds of process CPU time for plan,
apply and remove together, and how far the process's resident memory rises meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import wn_surgery as wn
from benchmarks.report import ROOT, environment, verdicts_as_data, write
from benchmarks.targets import SCALE_TARGETS, judge_parts

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
LLAMAS: dict[str, dict[str, int]] = {
    "7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "70B": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "405B": {
        "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
    },
}  # fmt: skip
"""The sizes of Llama 2 7B and of Llama 3.1 70B and 405B, by their configs."""


def llama(**sizes: Any) -> Any:
    """A Llama on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def mixture() -> Any:
    """DeepSeek-V3 on the meta device; its config's own sizes."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    with torch.device("meta"):
        return DeepseekV3ForCausalLM(DeepseekV3Config())


EXPERTS = {"names": "**.experts", "params": ["gate_up_proj", "down_proj"], "dim": [0, 1]}
CASES: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "llama 405B": (lambda: llama(**LLAMAS["405B"]), [{"types": "Linear"}]),
    "256 experts": (mixture, [{"types": "Linear"}, EXPERTS]),
    "llama tiny": (
        lambda: llama(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                      num_attention_heads=1),
        [{"types": "Linear"}],
    ),
}  # fmt: skip


def resident(what: str) -> int:
    """Bytes that Linux counts for this process: ``VmRSS`` now, ``VmHWM`` at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    assert found, f"/proc/self/status has {what}"
    return int(found[1]) << 10


def measured(case: str) -> dict[str, Any]:
    """The numbers of one case, in this process."""
    made, rules = CASES[case]
    start = time.process_time()
    model = made()
    built = time.process_time() - start
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    before = resident("VmRSS")
    times = {}
    calls: dict[str, Callable[[], object]] = {
        "plan": lambda: wn.plan(model, rules),
        "apply": lambda: wn.apply(model, rules),
        "remove": lambda: wn.remove(model),
    }
    changed = 0
    for name, call in calls.items():
        start = time.process_time()
        result = call()
        times[name] = time.process_time() - start
        changed = len(getattr(result, "changed", ()))
        del result
    return {
        "case": case,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": changed,
        "build_s": built,
        **{f"{name}_s": spent for name, spent in times.items()},
        "seconds": sum(times.values()),
        "MB above the model": (resident("VmHWM") - before) / 1e6,
    }


def main(argv: list[str] | None = None) -> int:
    """Run each case, in processes of their own; 0 if every target is met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["llama 405B", "256 experts"])
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(measured(args.one)))
        return 0
    rounds: dict[str, list[dict[str, Any]]] = {case: [] for case in args.cases}
    for _ in range(args.rounds):
        for case in args.cases:
            command = [sys.executable, "-m", "benchmarks.scale", "--one", case]
            ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            rounds[case].append(json.loads(ran.stdout.splitlines()[-1]))
    rows, verdicts = [], []
    for case, found in rounds.items():
        # The round that others disturbed least; of memory the most.
        row = min(found, key=lambda each: float(each["seconds"]))
        row["MB above the model"] = max(each["MB above the model"] for each in found)
        judged = judge_parts(case, row, SCALE_TARGETS)
        verdicts += judged
        rows.append({**row, "all_s": [each["seconds"] for each in found],
                     "targets": verdicts_as_data(judged)})  # fmt: skip
        print(
            f"{case}: {row['parameters'] / 1e9:.1f} billion parameters, {row['weights']} weights; "
            f"plan {row['plan_s']:.3f} s, apply {row['apply_s']:.3f} s, remove "
            f"{row['remove_s']:.3f} s; {row['MB above the model']:.1f} MB above the model"
        )
    for verdict in verdicts:
        print(verdict)
    result = {"benchmark": "scale", "environment": environment(), "rounds": args.rounds}
    write(args.out, {**result, "clock": "process CPU time, one thread", "cases": rows})
    return int(not all(verdict.met for verdict in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
