"""One process over gloo, and a model trained in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.torch_facts.versions import OLD

fsdp2_on_the_cpu = pytest.mark.skipif(
    OLD, reason="FSDP2 on the CPU is known to run since torch 2.13"
)


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default process group, of this process alone."""
    store: Path = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(network: nn.Module) -> torch.Tensor:
    """The output after three steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        output: torch.Tensor = network(torch.ones(1, 4))
    return output
