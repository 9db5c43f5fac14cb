"""What weight norm costs a whole training step: ``python -m benchmarks.steps``.

A step is ``zero_grad``, forward and backward of each micro-batch, ``clip_grad_norm_`` and AdamW, as
a training loop has them. What was predicted is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wn_surgery as wn
from benchmarks.cases import vocoder
from benchmarks.measure import compare, keep_memory
from benchmarks.models import RNN, TCN, WaveNet
from benchmarks.peers import PEERS, Workload
from benchmarks.report import as_data, environment, markdown, write
from wn_surgery.fused.native.building import why_not

__all__ = ["MODELS", "OPTIMIZERS", "alternatives", "main"]

RESULTS = Path(__file__).parent / "results" / "steps.json"
CONVOLUTIONS = {"types": ["Conv1d", "ConvTranspose1d"]}
LINEARS = {"types": "Linear"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ONCE = "ours once per step"
PARTS = ("zero_grad", "forward", "backward", "clipping", "optimizer")
NATIVE, NATIVE_ONCE = "ours native", "ours native once per step"


def prepared(name: str, workload: Workload, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A copy of the model with one kind of weight norm, and its optimizer."""
    model = copy.deepcopy(workload.model)
    if name.startswith("ours"):
        wn.apply(model, workload.rules)
    else:
        (peer,) = (peer for peer in PEERS if peer.name == name)
        peer.prepare(workload, model)
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


class Step:
    """One training step; what it returns is the loss of the last micro-batch.

    ``parts`` has the seconds of CPU time of each of :data:`PARTS`, for each call.
    """

    def __init__(
        self, workload: Workload, model: nn.Module, optimizer: Any, micro_batches: int
    ) -> None:
        self._forward, self._model, self._optimizer = workload.forward, model, optimizer
        self._micro_batches = micro_batches
        self.parts: list[tuple[float, ...]] = []

    def medians(self) -> dict[str, float]:
        """Milliseconds of each part."""
        columns = zip(PARTS, zip(*self.parts, strict=True), strict=True)
        return {f"{part}, ms": 1e3 * statistics.median(seconds) for part, seconds in columns}

    def __call__(self) -> Tensor:
        """Take the step."""
        now = time.process_time
        start = now()
        self._optimizer.zero_grad()
        zeroed = now()
        backward = 0.0
        loss: Any = torch.zeros(())
        for _ in range(self._micro_batches):
            loss = self._forward(self._model).square().mean()
            before = now()
            loss.backward()
            backward += now() - before
        gone_back = now()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        clipped = now()
        self._optimizer.step()
        forward = gone_back - zeroed - backward
        self.parts.append((zeroed - start, forward, backward, clipped - gone_back, now() - clipped))
        result: Tensor = loss.detach()
        return result


def alternatives(
    workload: Workload, micro_batches: int, options: dict[str, Any]
) -> dict[str, Step]:
    """A step of each row.

    Raises:
        RuntimeError: the steps of two rows lead to other losses.
    """
    rows = ["plain", "plain (A/A)", "legacy", "torch", "ours", "ours fused", ONCE]
    if not why_not():
        rows += [NATIVE, NATIVE_ONCE]
    calls = {
        name: Step(workload, *prepared(name, workload, options), micro_batches) for name in rows
    }
    losses = {name: [float(call()) for _ in range(5)] for name, call in calls.items()}
    for call in calls.values():
        call.parts.clear()
    normed = (("torch", name) for name in rows if not name.startswith("plain"))
    for pair in (("plain", "plain (A/A)"), *normed):
        one, other = (torch.tensor(losses[name]) for name in pair)
        if not torch.allclose(one, other, rtol=1e-4):
            raise RuntimeError(f"{pair[0]} and {pair[1]} do not train alike: {one} and {other}")
    return calls


def _model(model: nn.Module, rules: dict[str, Any], x: Tensor) -> Workload:
    return Workload(model, rules, lambda m: m(x))


def _minilm() -> Workload:
    """The sizes of all-MiniLM-L6-v2, and 8 sentences of 32 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(config.vocab_size, (8, 32))
    rules = {"types": "Linear", "names": "encoder.**"}
    return Workload(BertModel(config), rules, lambda m: m(ids).last_hidden_state)


MODELS: dict[str, Callable[[], Workload]] = {
    "tcn": lambda: _model(TCN(32, levels=6), CONVOLUTIONS, torch.randn(8, 1, 64)),
    "wavenet": lambda: _model(WaveNet(), CONVOLUTIONS, torch.randn(1, 1, 256)),
    "hifigan": lambda: _model(vocoder(512), CONVOLUTIONS, torch.randn(1, 4, 80)),
    "rnn": lambda: _model(RNN(), LINEARS, torch.randn(200, 4, 128)),
    "minilm": _minilm,
}
"""What is trained, and where weight norm goes; each is made when it is asked for."""


def main(argv: list[str] | None = None) -> int:
    """Print a table for each model, optimizer and number of micro-batches."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=[*OPTIMIZERS])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables: list[dict[str, Any]] = []
    for name in args.models:
        torch.manual_seed(0)
        workload = MODELS[name]()
        for optimizer in args.optimizers:
            for count in args.micro_batches:
                print(f"\n## {name}, AdamW {optimizer}, {count} micro-batch(es)\n", flush=True)
                calls = alternatives(workload, count, OPTIMIZERS[optimizer])
                found = compare(calls, base="plain", rounds=args.rounds)
                parts = {row: call.medians() for row, call in calls.items()}
                print(markdown(found, parts), flush=True)
                tables.append(
                    {
                        "model": name,
                        "optimizer": optimizer,
                        "micro_batches": count,
                        "rows": as_data(found, parts),
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
    keep_memory()
    raise SystemExit(main())
