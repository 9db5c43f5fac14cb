"""Models cut over two processes, compared with one process: ``parallel_runs.py FILE``.

Each process also trains the whole model by itself, and rank 0 writes what the cases measured to
FILE. ``test_parallel.py`` says what has to hold.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import wn_surgery as wn
from tests.distributed.cut_models import (
    Net,
    Sent,
    local,
    shard,
    tokens,
    whole_storage,
)
from tests.distributed.fsdp_cases import (
    exact_in_checkpoints,
    exact_norms,
    exact_refusals,
    fsdp,
    kept_weights,
    mixed_precision,
    two_dimensions,
)
from tests.distributed.launching import leave
from tests.distributed.tensor_parallel_cases import (
    math,
    refusals,
    second_derivatives,
    training,
    verbs,
)


def spent(mesh: DeviceMesh) -> Any:
    """What a step keeps and sends under each engine, plain and normed: state, weights, bytes."""
    shapes = [[8, 6], [6, 8], [4, 6]]
    found: dict[str, Any] = {}
    for engine in ("ddp", "fsdp", "tp"):
        for normed in (False, True):
            model: Any = Net()
            if engine == "tp":
                plan = {"blocks.0.up": ColwiseParallel(), "blocks.0.down": RowwiseParallel()}
                model = parallelize_module(model, mesh, plan)
                shapes = [[4, 6], [6, 4], [4, 6]]
            if normed:
                wn.apply(model, {"types": "Linear"})
            averaged = 0
            if engine == "fsdp":
                shard(model, mesh)
            elif engine == "ddp":
                model = nn.parallel.DistributedDataParallel(model)

                def average(bucket: Any) -> Any:
                    nonlocal averaged
                    averaged += bucket.buffer().nbytes
                    work = dist.all_reduce(bucket.buffer(), async_op=True)
                    return work.get_future().then(lambda done: done.value()[0])

                # Without annotations, which DDP compares with classes.
                model.register_comm_hook(None, lambda _, bucket: average(bucket))
            own = {whole_storage(p) for p in model.parameters()}
            kept: list[Tensor] = []

            def keep(saved: Tensor) -> Tensor:
                kept.append(saved)  # noqa: B023
                return saved

            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            with Sent() as sent:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
                    loss = model(tokens()).square().mean()
                own |= {whole_storage(p) for p in model.parameters()}  # FSDP2's root is whole
                parts = {whole_storage(t): t for t in map(local, kept) if t.ndim == 2}
                weights = sum(
                    place[1]
                    for place, t in parts.items()
                    if place not in own and sorted(t.shape) in map(sorted, shapes)
                )
                loss.backward()
            optimizer.step()
            state = 0
            for p in model.parameters():
                moments = [optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq")]
                state += sum(local(each).nbytes for each in (p, p.grad, *moments))
            found[f"{engine} {'normed' if normed else 'plain'}"] = (
                state, weights, sent.bytes if engine != "ddp" else averaged
            )  # fmt: skip
    return found


CASES: dict[str, Callable[[DeviceMesh], Any]] = {
    "math": math,
    "second derivatives": second_derivatives,
    "training": training,
    "verbs": verbs,
    "refusals": refusals,
    "fsdp": fsdp,
    "kept weights": kept_weights,
    "mixed precision": mixed_precision,
    "exact norms": exact_norms,
    "exact in checkpoints": exact_in_checkpoints,
    "exact refusals": exact_refusals,
    "spent": spent,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=120))
    try:
        cases = CASES if dist.get_world_size() == 2 else {"two dimensions": two_dimensions}
        every = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
        results = {name: cases[name](every) for name in sys.argv[2:] or cases}
        if dist.get_rank() == 0:
            torch.save(results, sys.argv[1])
    finally:
        dist.destroy_process_group()
    leave()
