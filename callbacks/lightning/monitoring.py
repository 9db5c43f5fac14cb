"""Logging g, ‖v‖ and the effective learning rate with Lightning's loggers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import wn_surgery as wn
from wn_surgery.callbacks.lightning.neighbours import shards
from wn_surgery.reporting.page import page, write
from wn_surgery.training.statistics import History

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Monitor", "batches_that_stepped", "report"]


class Monitor:
    """Logs :func:`wn_surgery.statistics` every so many optimizer steps, and keeps them."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.history = History()
        self._before = 0

    def before_batch(self, trainer: Trainer) -> None:
        """Remember the optimizers' step."""
        self._before = trainer.global_step

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, if this batch ended with an optimizer step that is to be logged."""
        if trainer.global_step == self._before:
            return
        step = batches_that_stepped(trainer, self._before)
        if step % self.every:
            return
        # Sharded parameters are gathered, for which every rank is needed.
        if not trainer.is_global_zero and not shards(trainer):
            return
        statistics = wn.statistics(pl_module, trainer.optimizers)
        self.history.add(step, statistics)
        if not trainer.is_global_zero:
            return
        metrics = statistics.metrics()
        for logger in trainer.loggers:
            # From 0, as self.log() and LearningRateMonitor count, so that curves line up.
            logger.log_metrics(metrics, step=step - 1)
            _log_histograms(logger, statistics, step - 1)


def batches_that_stepped(trainer: Trainer, before: int) -> int:
    """Return after how many batches an optimizer has stepped, with the one of now.

    ``before`` is the Trainer's global step before this batch, which counts each optimizer.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    return int(getattr(loop, "_batches_that_stepped", before)) + 1


def report(
    trainer: Trainer,
    pl_module: LightningModule,
    path: Path,
    rules: tuple[wn.Rule, ...],
    monitor: Monitor | None,
) -> None:
    """Write the page of :func:`wn_surgery.report`, on rank zero."""
    # As in after_batch: all ranks gather.
    if not trainer.is_global_zero and not shards(trainer):
        return
    history = None if monitor is None else monitor.history
    made = page(pl_module, rules=rules, history=history, optimizers=trainer.optimizers)
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(made, path)


def _log_histograms(logger: Any, statistics: wn.Statistics, step: int) -> None:
    add = getattr(getattr(logger, "experiment", None), "add_histogram", None)
    if add is None or not type(logger).__name__.startswith("TensorBoard"):
        return
    for site in statistics.sites:
        add(f"weight_norm/{site.name}/g", site.g_values, global_step=step)
        add(f"weight_norm/{site.name}/v_norm", site.v_norm_values, global_step=step)
