"""What weight norm costs a Lightning Trainer's validation: ``python -m benchmarks.evaluation``.

Each alternative is a Trainer with a copy of one model. In alternated rounds each trains one batch
and validates on many; the clock runs from on_validation_start to on_validation_end, so that folding
and unfolding are in it. What was predicted is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import lightning.pytorch.callbacks as lc
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import keep_memory
from benchmarks.models import TCN, WaveNet
from benchmarks.report import environment, write
from wn_surgery.callbacks.lightning import WeightNorm

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
TARGET = 1.05  # of the plain model's time, beyond what the A/A row is off by
RULES = [{"types": "Conv1d"}]


class Module(lp.LightningModule):
    """A model and the mean square of its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Clock(lc.Callback):
    """Process CPU time of the last validation."""

    spent = 0.0

    def on_validation_start(self, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        self._start = time.process_time()

    def on_validation_end(self, *args: Any, **kwargs: Any) -> None:
        self.spent = time.process_time() - self._start


class Alternative:
    """A Trainer that can be asked again and again how long validation takes."""

    def __init__(self, model: nn.Module, callbacks: list[Any], batches: int, x: Tensor) -> None:
        self.clock = Clock()
        self.module = Module(copy.deepcopy(model))
        self.trainer = lp.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            max_epochs=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            # The clock is first: what the others do at the start and the end is timed.
            callbacks=[self.clock, *callbacks],
        )
        data = TensorDataset(x.repeat(batches, 1, 1))
        self.train = DataLoader(TensorDataset(x), batch_size=len(x))
        self.val = DataLoader(data, batch_size=len(x))

    def measure(self) -> float:
        """Seconds of one validation."""
        self.trainer.fit_loop.max_epochs = (self.trainer.fit_loop.max_epochs or 0) + 1
        self.trainer.fit(self.module, self.train, self.val)
        return self.clock.spent


def alternatives() -> dict[str, Callable[[], list[Any]]]:
    """The callbacks of each row; a clock that ends after the others is measured with them."""

    def average() -> Any:
        return lc.EMAWeightAveraging(decay=0.9)

    return {
        "plain": list,
        "plain (A/A)": list,
        "folded": lambda: [WeightNorm(RULES)],
        "not folded": lambda: [WeightNorm(RULES, fold_on_eval=False)],
        "not folded, not fused": lambda: [WeightNorm(RULES, fold_on_eval=False, fused="off")],
        "plain, averaged": lambda: [average()],
        "folded, averaged": lambda: [WeightNorm(RULES), average()],
    }


def measure(model: nn.Module, x: Tensor, batches: int, rounds: int) -> dict[str, Any]:
    """Times and ratios of every alternative, round by round in turn.

    Each round has models of its own: where in memory a model lies decides about some percent.
    """
    makers = alternatives()
    times: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(rounds):
        rows = {name: Alternative(model, make(), batches, x) for name, make in makers.items()}
        names = list(rows)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            rows[name].measure()  # warms up
            times[name].append(rows[name].measure())
    found = {}
    for name, mine in times.items():
        base = times["plain, averaged" if name.endswith("averaged") else "plain"]
        ratios = [each / plain for each, plain in zip(mine, base, strict=True)]
        found[name] = {
            "seconds": statistics.median(mine),
            "ratio": statistics.median(ratios),
            "ratio_of_minima": min(mine) / min(base),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    """Print a table for each model; 0 if folding costs nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    torch.manual_seed(0)
    models: dict[str, tuple[nn.Module, Tensor]] = {
        "tcn": (TCN(), torch.randn(1, 1, 64)),
        "wavenet": (WaveNet(), torch.randn(1, WaveNet().first.in_channels, 64)),
    }
    tables: dict[str, Any] = {}
    good = True
    for model_name, (model, x) in models.items():
        tables[model_name] = rows = measure(model, x, args.batches, args.rounds)
        print(f"\n{model_name}, {args.batches} batches of shape {tuple(x.shape)}\n")
        print(f"{'':24} {'ms':>8} {'ratio':>7} {'of minima':>10}")
        for name, row in rows.items():
            print(
                f"{name:24} {1e3 * row['seconds']:8.1f} {row['ratio']:7.3f} "
                f"{row['ratio_of_minima']:10.3f}"
            )
        for name in ("folded", "folded, averaged"):
            met = rows[name]["ratio"] <= TARGET
            good &= met
            print(f"{'ok  ' if met else 'FAIL'}  {name}: {rows[name]['ratio']:.3f} <= {TARGET}")
    write(
        args.out,
        {
            "benchmark": "evaluation",
            "environment": environment(),
            "clock": "process CPU time, one thread",
            "batches": args.batches,
            "rounds": args.rounds,
            "tables": tables,
        },
    )
    return 0 if good else 1


if __name__ == "__main__":
    keep_memory()
    raise SystemExit(main())
