"""A training whose weights last until the next optimizer step, or are computed as usual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.fused.models import Net, X, normed
from wn_surgery.model.sites import normed as sites_of

STEPS = 20
Optimizer = torch.optim.Optimizer


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": adamw,
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    # It writes without raising versions.
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


class Run:
    """A training, with weights that last or as usual; everything else is the same."""

    def __init__(
        self,
        lasts: bool,
        make: Callable[[Any], Optimizer] = adamw,
        model: Net | None = None,
    ) -> None:
        self.model = normed() if model is None else model
        self.optimizer = make(self.model.parameters())
        if lasts:
            wn.fuse(self.model, optimizers=self.optimizer)

    def loss(self, step: int, micro: int = 0) -> Tensor:
        chance = torch.Generator().manual_seed(100 * step + micro)
        out: Tensor = self.model(torch.randn(X.shape, generator=chance))
        return out.square().mean()

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        kept = [t for each in state.values() for t in each.values() if isinstance(t, Tensor)]
        return [p.detach() for p in self.model.parameters()] + kept


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def parts(model: nn.Module, place: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    held = sites_of(model)[place].held
    return held.g, held.v
