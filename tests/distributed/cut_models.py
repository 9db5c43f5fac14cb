"""A small model, how to cut it over processes, and how to compare what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import wn_surgery as wn


class Sent(TorchDispatchMode):
    """Counts collectives. torch's CommDebugMode also follows modules, and trips over FSDP2's."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # which makes it compute with its parts
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in name:
            self.ops.append(name)
            if "wrap" not in name:
                tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                self.bytes += max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


DOWN = "blocks.0.down.weight"  # cut by columns, and normed by rows


class Block(nn.Module):
    """An MLP whose first layer is cut by rows and whose second by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.tanh(self.up(x)))
        return result


class Net(nn.Module):
    """Tokens to logits; blocks are checkpointed where ``around`` says so."""

    around = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            # Not of the norm alone: to it the scale of an embedding, its g, means nothing.
            y = self.norm(x)
            x = x + (checkpoint(block, y, use_reentrant=False) if self.around else block(y))
        result: Tensor = self.head(x)
        return result


def tokens(step: int = 0) -> Tensor:
    return torch.randint(0, 10, (4, 4), generator=torch.Generator().manual_seed(step))


USUAL: dict[str, Any] = {
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "blocks.0.up": ColwiseParallel(),
    "blocks.0.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
SEQUENCE: dict[str, Any] = {
    "embed": ColwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "blocks.0": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "blocks.0.up": ColwiseParallel(),
    "blocks.0.down": RowwiseParallel(output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
ALL = [{"params": "weight", "types": ["Linear", "Embedding"]}]
PLANS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "usual": (USUAL, ALL),
    "sequence": (SEQUENCE, ALL),
    "columns": (USUAL, [{**ALL[0], "dim": 1}]),
    "one norm": (USUAL, [{**ALL[0], "dim": None}]),
    "options": (USUAL, [{**ALL[0], "eps": 1e-4, "norm_dtype": "float64", "g_init": 0.5}]),
}


def cut(plan: dict[str, Any], mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(Net(), mesh, dict(plan))


def train(model: nn.Module, part: slice = slice(None), steps: int = 20) -> None:
    groups = wn.parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens(step)[part]).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: whole(value) for key, value in model.state_dict().items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def weight_of(model: nn.Module, name: str) -> Tensor:
    path, _, param = name.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(path), param)
    return weight


def error(call: Callable[[], Any]) -> str:
    """The error of every rank, joined."""
    try:
        call()
        mine = "no error"
    except Exception as raised:  # noqa: BLE001 - the test compares it
        site = getattr(raised, "site", None)
        notes = "".join(f"\n{note}" for note in getattr(raised, "__notes__", ()))
        mine = f"{type(raised).__name__}[{site}]: {raised}{notes}"
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, mine)
    return "\n--\n".join(heard)


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for module in (*model.get_submodule("blocks").children(), model):
        fully_shard(module, mesh=mesh, **options)
    return model


def local(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def whole_storage(tensor: Any) -> tuple[int, int]:
    storage = local(tensor).untyped_storage()
    return storage.data_ptr(), storage.size()
