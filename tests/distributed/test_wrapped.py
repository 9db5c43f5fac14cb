"""Real data-parallel wrappers, in one process over gloo: before them, or not at all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import wn_surgery as wn

from .conftest import fsdp2_on_the_cpu, trained

pytestmark = pytest.mark.usefixtures("gloo")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def applied() -> nn.Sequential:
    network = model()
    wn.apply(network, "linears")
    return network


def test_ddp() -> None:
    expected = trained(applied())
    wrapped = nn.parallel.DistributedDataParallel(applied())
    torch.testing.assert_close(trained(wrapped), expected)
    with pytest.raises(wn.WrappedModuleError, match="DistributedDataParallel"):
        wn.remove(wrapped)
    with pytest.raises(wn.WrappedModuleError, match=r"0\.weight is held by"):
        wn.apply(nn.parallel.DistributedDataParallel(model()), "linears")


@fsdp2_on_the_cpu
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


def test_directions_are_put_back_inside_ddp_and_not_where_they_are_split() -> None:
    from torch.distributed.fsdp import fully_shard

    wrapped = nn.parallel.DistributedDataParallel(applied())
    before = wrapped(torch.ones(1, 4))
    assert wn.renormalize(wrapped, 1.0) == ("0.weight", "2.weight")
    torch.testing.assert_close(wrapped(torch.ones(1, 4)), before)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(wn.WrappedModuleError, match=r"0\.weight is sharded"):
        wn.renormalize(fully_shard(applied(), mesh=mesh), 1.0)


def test_a_part_of_what_fsdp2_holds_is_refused_too() -> None:
    from torch.distributed.fsdp import fully_shard

    network, normed = model(), applied()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for each in (network, normed):
        fully_shard(each, mesh=mesh)
    with pytest.raises(wn.WrappedModuleError, match="held by fully_shard"):
        wn.apply(network[0], "linears")
    with pytest.raises(wn.WrappedModuleError, match="get_model_state_dict") as caught:
        wn.remove(normed[0])
    assert caught.value.site == "weight"


def test_tensors_that_are_distributed_by_hand() -> None:
    from torch.distributed.tensor import DTensor, distribute_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    network = distribute_module(model(), mesh)
    assert wn.apply(network, "linears").changed == ("0.weight", "2.weight")
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    wn.remove(network)
    assert torch.equal(network[0].weight.full_tensor(), model()[0].weight)
