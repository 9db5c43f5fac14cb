"""Real data-parallel wrappers, in one process over gloo: before them, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import wn_surgery as wn


@pytest.fixture(scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def trained(network: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        output: torch.Tensor = network(torch.ones(1, 4))
    return output


def applied() -> nn.Sequential:
    network = model()
    wn.apply(network, "linears")
    return network


@pytest.mark.usefixtures("_group")
def test_ddp() -> None:
    expected = trained(applied())
    wrapped = nn.parallel.DistributedDataParallel(applied())
    torch.testing.assert_close(trained(wrapped), expected)
    with pytest.raises(wn.WrappedModuleError, match="DistributedDataParallel"):
        wn.remove(wrapped)
    with pytest.raises(wn.WrappedModuleError, match=r"0\.weight is held by"):
        wn.apply(nn.parallel.DistributedDataParallel(model()), "linears")


@pytest.mark.usefixtures("_group")
def test_fsdp2() -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    expected = trained(applied())
    whole, layers = applied(), applied()
    for module in (whole, layers[0], layers[2], layers):
        fully_shard(module, mesh=mesh)
    for before in (whole, layers):
        keys = list(before.state_dict())
        torch.testing.assert_close(trained(before), expected)
        with pytest.raises(wn.WrappedModuleError, match="FSDP2"):
            wn.remove(before)
        assert list(before.state_dict()) == keys == list(applied().state_dict())
    late = model()
    for layer in (late[0], late[2]):
        fully_shard(layer, mesh=mesh)
    names = [name for name, _ in late.named_parameters()]
    with pytest.raises(wn.WrappedModuleError, match="FSDP2"):
        wn.apply(late, "linears")
    assert [name for name, _ in late.named_parameters()] == names


@pytest.mark.usefixtures("_group")
def test_tensors_that_are_sharded_by_hand() -> None:
    from torch.distributed.tensor import distribute_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    network = distribute_module(model(), mesh)
    with pytest.raises(wn.WrappedModuleError, match="DTensor"):
        wn.apply(network, "linears")
