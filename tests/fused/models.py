"""A small model to fuse, and what tests compare of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wn_surgery as wn
from wn_surgery.fused.evaluator import Spec
from wn_surgery.norm.options import NormOptions


class Net(nn.Module):
    """Convolutions, a transposed one with a norm of its middle axis, and a head."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Conv1d(2, 6, 3, padding=1)
        self.middle = nn.Sequential(
            nn.Conv1d(6, 6, 3, padding=1), nn.Tanh(), nn.Conv1d(6, 6, 3, padding=1)
        )
        self.up = nn.ConvTranspose1d(6, 4, 2, 2)
        self.head = nn.Linear(16, 3)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.front(x))
        if self.recompute:
            h = checkpoint(self.middle, h, use_reentrant=self.recompute == "reentrant")
        else:
            h = self.middle(h)
        return self.head(torch.tanh(self.up(h)))


COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
RULES = [
    {"types": ["Conv1d", "Linear"]},
    {"types": "ConvTranspose1d", "dim": "out", "eps": 1e-6},
]
X = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1))


def spec_of(shape: tuple[int, ...], *args: Any, **options: Any) -> Spec:
    return Spec(shape, NormOptions(*args, **options))


def normed(recompute: str = "") -> Net:
    model = Net(recompute)
    wn.apply(model, RULES)
    return model


def fused(recompute: str = "", **options: Any) -> Net:
    model = normed(recompute)
    wn.fuse(model, **options)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def train(model: nn.Module, step: Callable[[nn.Module], Tensor] | None = None) -> list[Tensor]:
    """Three steps; the losses and, at the end, gradients and parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)  # bumps no version
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(X).square().mean() if step is None else step(model)
        if step is None:
            loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return [*losses, *gradients(model), *(p.detach().clone() for p in model.parameters())]


def assert_same(
    step: Callable[[nn.Module], Tensor] | None = None, recompute: str = "", exact: bool = False
) -> None:
    found, wanted = train(fused(recompute), step), train(normed(recompute), step)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        if exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def nodes(model: nn.Module) -> set[Any]:
    """The nodes behind the weights that are at hand inside a forward."""
    found: set[Any] = set()

    def look(module: nn.Module, *_: Any) -> None:
        found.add(module.weight.grad_fn)

    hooks = [
        m.register_forward_pre_hook(look)
        for m in model.modules()
        if isinstance(m, nn.Conv1d | nn.Linear | nn.ConvTranspose1d)
    ]
    model(X)
    for hook in hooks:
        hook.remove()
    return found
