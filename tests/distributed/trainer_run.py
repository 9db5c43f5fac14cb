"""Trains a patched Llama with the Trainer of transformers, in as many processes as there are."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.utils.data import Dataset

from tests.distributed.launching import leave
from tests.makers import llama
from wn_surgery.callbacks.transformers import WeightNormCallback, WeightNormTrainer
from wn_surgery.huggingface import WeightNormConfig

warnings.filterwarnings("ignore")


class Tokens(Dataset[dict[str, Tensor]]):
    """Alike for every process: a mean over two halves is then the mean over the whole."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 32, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def run(folder: Path, processes: int, export: bool = True, **options: Any) -> dict[str, Any]:
    model = llama(num_hidden_layers=1)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 8 // processes,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_backend": "gloo" if processes > 1 else None,
        "seed": 1,
    }
    callback = WeightNormCallback(
        WeightNormConfig([{"names": "**.{q,k,v,o,up,down}_proj"}]),
        export_to=folder / "plain" if export else None,
    )
    trainer = WeightNormTrainer(
        model=model,
        args=hf.TrainingArguments(**{**settings, **options}),
        train_dataset=Tokens(),
        callbacks=[callback],
    )
    trainer.train()
    return {key: value.clone() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    count = int(sys.argv[2])
    found = {
        "usual": run(out, count),
        "accumulated": run(out, count, gradient_accumulation_steps=2),
        "bf16": run(out, count, bf16=True),
    }
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, out / f"{count}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    leave()
