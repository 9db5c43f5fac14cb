"""Checkpoint files to convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight_g": torch.rand(8, 1, 1) + 0.5,
        "a.weight_v": torch.randn(8, 4, 3),
        "a.bias": torch.zeros(8),
        "b.weight_g": torch.rand(1, 6).half() + 0.5,
        "b.weight_v": torch.randn(5, 6).half(),
        "steps": torch.tensor([3]),
        "none": torch.zeros(0, 4),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )


def shards(folder: Path) -> Path:
    """Every g in one shard, every v and the rest in the other."""
    folder.mkdir()
    state = tensors()
    parts = [{k: t for k, t in state.items() if k.endswith("_g") is one} for one in (True, False)]
    weight_map = {}
    for number, part in enumerate(parts):
        save_file(part, folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
