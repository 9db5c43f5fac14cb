"""FSDP2 with torch's distributed checkpoints: ``dcp_run.py FOLDER save|load``, one per rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import wn_surgery as wn
from tests.distributed.launching import leave


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    wn.apply(model, nn.Linear)
    return model


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    model: Any = build()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments}


def restored(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = sharded()
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    return model, optimizer


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def main(folder: Path, what: str) -> None:
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        if what == "save":
            model, optimizer = sharded()
            steps(model, optimizer, range(3))
            dcp.save(state_of(model, optimizer), checkpoint_id=folder / "saved")
            at_save = full(model)
            steps(model, optimizer, range(3, 6))
            resumed, its_optimizer = restored(folder / "saved")
            steps(resumed, its_optimizer, range(3, 6))
            found = {"saved": at_save, "straight": full(model), "resumed": full(resumed)}
        else:
            found = {"loaded": full(restored(folder / "saved")[0])}
        if rank == 0:
            torch.save(found, folder / f"{what}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave()
