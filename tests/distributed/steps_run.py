"""DDP with weights that last until the next step, on two processes, beside DDP as usual."""

from __future__ import annotations

import datetime as dt
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import wn_surgery as wn
from tests.distributed.launching import leave


class Branches(nn.Module):
    """A branch that only every other step takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())  # DDP makes both equal
        self.first, self.second, self.rare = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor, rarely: bool) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.rare(h) if rarely else self.second(h)
        return out


def trained(lasts: bool, rarely: bool, wrap_first: bool, **options: Any) -> list[Tensor]:
    model = Branches()
    if not rarely:
        del model.rare
    wn.apply(model, "linears")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    if lasts and not wrap_first:
        wn.fuse(model, optimizers=optimizer)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-4, **options)
    if lasts and wrap_first:
        wn.fuse(wrapped, optimizers=optimizer)
    chance = torch.Generator().manual_seed(dist.get_rank())
    for step in range(20):
        optimizer.zero_grad()
        for micro in range(2):
            # torch's own DDP fails where a static graph begins with no_sync().
            alone = micro == 0 and "static_graph" not in options
            with wrapped.no_sync() if alone else nullcontext():
                x = torch.randn(3, 4, generator=chance)
                wrapped(x, rarely and step % 2 == 1).square().sum().backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def main() -> None:
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=120))
    try:
        for rarely, options in (
            (False, {}),
            (False, {"static_graph": True}),
            (False, {"gradient_as_bucket_view": True}),
            (True, {"find_unused_parameters": True}),
        ):
            usual = trained(False, rarely, wrap_first=False, **options)
            for wrap_first in (False, True):
                lasting = trained(True, rarely, wrap_first, **options)
                for one, other in zip(lasting, usual, strict=True):
                    assert torch.equal(one, other), (rarely, options, wrap_first)
            gathered = [torch.empty_like(usual[0]) for _ in range(2)]
            dist.all_gather(gathered, usual[0])
            assert torch.equal(*gathered)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
