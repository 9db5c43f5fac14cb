"""What weight norm costs a whole training step: ``python -m benchmarks.steps``.

A step is ``zero_grad``, forward and backward of each micro-batch, ``clip_grad_norm_`` and AdamW, as
a training loop has them. What was predicted is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wn_surgery as wn
from benchmarks.measure import compare
from benchmarks.models import TCN, WaveNet
from benchmarks.report import as_data, environment, markdown, write

__all__ = ["OPTIMIZERS", "alternatives", "main"]

RESULTS = Path(__file__).parent / "results" / "steps.json"
RULES = {"types": "Conv1d"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ONCE = "ours once per step"
NATIVE, NATIVE_ONCE = "ours native", "ours native once per step"


def prepared(name: str, plain: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A copy of the model with one kind of weight norm, and its optimizer."""
    model = copy.deepcopy(plain)
    if name == "torch":
        for layer in list(model.modules()):
            if isinstance(layer, nn.Conv1d):
                parametrizations.weight_norm(layer)
    elif name.startswith("ours"):
        wn.apply(model, RULES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **options)
    if name == "ours fused":
        wn.fuse(model)
    elif name == ONCE:
        wn.fuse(model, optimizers=optimizer)
    elif name == NATIVE:
        wn.fuse(model, "native")
    elif name == NATIVE_ONCE:
        wn.fuse(model, "native", optimizers=optimizer)
    return model, optimizer


def step_of(model: nn.Module, optimizer: Any, batches: list[Tensor]) -> Callable[[], Tensor]:
    """One training step; its result is the loss of the last micro-batch."""

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for x in batches:
            loss = model(x).square().mean()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def alternatives(
    plain: nn.Module, x: Tensor, micro_batches: int, options: dict[str, Any]
) -> dict[str, Callable[[], Tensor]]:
    """A step of each row.

    Raises:
        RuntimeError: the steps of two rows lead to other losses.
    """
    batches = [x + 0.1 * i for i in range(micro_batches)]
    rows = ("plain", "plain (A/A)", "torch", "ours", "ours fused", ONCE, NATIVE, NATIVE_ONCE)
    calls = {name: step_of(*prepared(name, plain, options), batches) for name in rows}
    losses = {name: [float(call()) for _ in range(5)] for name, call in calls.items()}
    for pair in (
        ("plain", "plain (A/A)"),
        ("torch", "ours"),
        ("ours", "ours fused"),
        ("ours", ONCE),
        ("ours", NATIVE),
        ("ours", NATIVE_ONCE),
    ):
        one, other = (torch.tensor(losses[name]) for name in pair)
        if not torch.allclose(one, other, rtol=1e-4):
            raise RuntimeError(f"{pair[0]} and {pair[1]} do not train alike: {one} and {other}")
    return calls


def main(argv: list[str] | None = None) -> int:
    """Print a table for each model, optimizer and number of micro-batches."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=[*OPTIMIZERS])
    parser.add_argument("--models", nargs="+", choices=("tcn", "wavenet"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models: dict[str, tuple[nn.Module, Tensor]] = {
        "tcn": (TCN(32, levels=6), torch.randn(8, 1, 64)),
        "wavenet": (WaveNet(), torch.randn(1, 1, 256)),
    }
    tables: list[dict[str, Any]] = []
    for name, (model, x) in models.items():
        if args.models and name not in args.models:
            continue
        for optimizer in args.optimizers:
            for count in args.micro_batches:
                print(f"\n## {name}, AdamW {optimizer}, {count} micro-batch(es)\n", flush=True)
                calls = alternatives(model, x, count, OPTIMIZERS[optimizer])
                found = compare(calls, base="plain", rounds=args.rounds)
                print(markdown(found, {}), flush=True)
                tables.append(
                    {
                        "model": name,
                        "optimizer": optimizer,
                        "micro_batches": count,
                        "rows": as_data(found, {}),
                    }
                )
                write(
                    args.out,
                    {
                        "benchmark": "steps",
                        "environment": environment(),
                        "clock": "process CPU time, one thread",
                        "rounds": args.rounds,
                        "tables": tables,
                    },
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
