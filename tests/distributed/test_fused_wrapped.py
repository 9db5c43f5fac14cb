"""Fused models in data-parallel wrappers, in one process over gloo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import wn_surgery as wn

from .conftest import fsdp2_on_the_cpu, trained
from .launching import launch

pytestmark = pytest.mark.usefixtures("gloo")

LAYERS = 8
WIDTH = 300  # 360 kB a weight, so that two make a group


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    wn.apply(model, "linears")
    return model


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    wn.apply(model, "linears")
    return model


def test_ddp_computes_the_same() -> None:
    expected = trained(small())
    before = small()
    wn.fuse(before)
    torch.testing.assert_close(trained(nn.parallel.DistributedDataParallel(before)), expected)
    after = nn.parallel.DistributedDataParallel(small())
    assert {member.path for member in wn.fuse(after).members} == {"cpu"}
    torch.testing.assert_close(trained(after), expected)


def events(model: nn.Sequential) -> list[str]:
    """The layers' backwards (b7 … b0) and the buckets that get ready (AR), in order."""
    found: list[str] = []
    # A bucket for each layer: g, v and bias are 361 kB and a bit.
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.3)

    # Without annotations: DDP reads them.
    def ready(_, bucket):  # type: ignore[no-untyped-def]
        found.append("AR")
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, ready)
    for _ in range(2):  # DDP makes its buckets anew after the first backward
        found.clear()
        x = torch.ones(2, WIDTH)
        outputs = []
        for layer in model:
            outputs.append(layer.register_forward_hook(mark(found, f"b{len(outputs)}")))
        wrapped(x).square().sum().backward()
        for handle in outputs:
            handle.remove()
    return found


def mark(found: list[str], name: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda _: found.append(name))

    return hook


def test_buckets_get_ready_as_early_as_without_up_to_one_group() -> None:
    plain = events(network())
    model = network()
    groups = [member.group for member in wn.fuse(model).members]
    assert groups == [0, 0, 1, 1, 2, 2, 3, 3]
    fused = events(model)
    assert sorted(plain) == sorted(fused)
    assert [e for e in fused if e != "AR"] == [f"b{i}" for i in reversed(range(LAYERS))]

    def ready(trace: list[str]) -> list[int]:
        """How many layers' backwards had begun when each bucket got ready."""
        return [sum(e != "AR" for e in trace[:place]) for place, e in enumerate(trace) if e == "AR"]

    assert len(ready(plain)) >= LAYERS // 2
    for with_groups, without in zip(ready(fused), ready(plain), strict=True):
        assert with_groups - without <= 2  # a group
    assert ready(fused)[0] < LAYERS // 2  # and not after all of them


@fsdp2_on_the_cpu
@pytest.mark.parametrize("fused_first", [True, False])
def test_fsdp2_leaves_fused_models_right(fused_first: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    expected = trained(small())
    model = small()
    if fused_first:
        wn.fuse(model)
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    if not fused_first:
        fusion = wn.fuse(model)
        assert {member.path for member in fusion.members} == {"off"}
        assert "FSDP2" in str(fusion)
    torch.testing.assert_close(trained(model), expected)


def test_a_copy_of_a_wrapped_model_is_right() -> None:
    model = nn.parallel.DistributedDataParallel(small())
    wn.fuse(model)
    model(torch.ones(2, 4))
    twin = copy.deepcopy(model.module)
    torch.testing.assert_close(twin(torch.ones(2, 4)), model(torch.ones(2, 4)))


@pytest.mark.processes
def test_weights_that_last_under_ddp_on_two_ranks() -> None:
    launch("steps_run.py", processes=2)
