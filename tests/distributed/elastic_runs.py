"""A run of which one worker is killed: ``elastic_runs.py lightning|accelerate FOLDER``.

On the first attempt rank 1 kills itself in the middle of an epoch. The launcher starts all workers
again, which go on from the last checkpoint. Then each trains once more from the beginning,
undisturbed, and rank 0 writes to ``FOLDER/found.pt`` where both ended.
"""

from __future__ import annotations

import datetime as dt
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.launching import leave

warnings.filterwarnings("ignore")

ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
EPOCHS, STEPS = 3, 4
LAST = 5  # in the middle of the second epoch


def may_die(step: int) -> None:
    if ATTEMPT == 0 and step == LAST and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def with_lightning(folder: Path) -> Any:
    import lightning.pytorch as lp

    from tests.distributed.lightning_runs import RULES, Module, trainer
    from wn_surgery.callbacks.lightning import WeightNorm

    class Mortal(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            may_die(self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    last = folder / "last.ckpt"
    found = last if last.exists() else None
    module, undisturbed = Mortal(), Module()
    saver = lp.callbacks.ModelCheckpoint(folder, save_last=True)
    made = trainer("ddp", 2, WeightNorm(RULES), saver, epochs=EPOCHS)
    made.fit(module, ckpt_path=found)
    trainer("ddp", 2, WeightNorm(RULES), epochs=EPOCHS).fit(undisturbed)
    return found, module, undisturbed


def with_accelerate(folder: Path) -> Any:
    from accelerate import Accelerator

    from tests.distributed import engine_runs as runs

    accelerator = Accelerator(cpu=True)

    def prepared() -> Any:
        model = runs.normed()
        return accelerator.prepare(model, runs.adamw(runs.groups_of(model)))

    go = partial(runs.steps, part=runs.mine(), backward=accelerator.backward)
    model, optimizer = prepared()
    saved = sorted(path.parent for path in folder.glob("*/complete"))
    if saved:
        accelerator.load_state(str(saved[-1]))
    for epoch in range(len(saved), EPOCHS):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            may_die(step)
            go(model, optimizer, numbers=range(step, step + 1))
        where = folder / f"epoch{epoch}"
        accelerator.save_state(str(where))
        accelerator.wait_for_everyone()
        (where / "complete").touch()
    undisturbed, optimizer = prepared()
    go(undisturbed, optimizer, numbers=range(EPOCHS * STEPS))
    return saved[-1] if saved else None, model.module, undisturbed.module


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=120))
    try:
        where = Path(sys.argv[2])
        run = {"lightning": with_lightning, "accelerate": with_accelerate}[sys.argv[1]]
        checkpoint, model, undisturbed = run(where)
        if dist.get_rank() == 0:
            results = {
                "attempt": ATTEMPT,
                "checkpoint": None if checkpoint is None else checkpoint.name,
                "restarted": model.state_dict(),
                "undisturbed": undisturbed.state_dict(),
            }
            torch.save(results, where / "found.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    leave()
