"""A signed distance function of a torus, learned from its surface, with and without weight norm.

The network is that of NeuS (Wang et al. 2021, arXiv:2106.10689) and IGR (Gropp et al. 2020,
arXiv:2002.10099) in small: an MLP with softplus, whose geometric initialization (Atzmon & Lipman
2020, arXiv:1911.10414) makes it the distance to a sphere. It sees points of the surface with their
normals, and no distance: the eikonal loss asks that its gradient has length 1 everywhere, and so
differentiates twice, through weight norm too. What it learned is compared with the exact distance.
Both runs begin with the same function, bit for bit, and see the same points.

    python examples/sdf.py --picture sdf.png          (or: make sdf)
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

import wn_surgery as wn

MAJOR, MINOR = 0.5, 0.22  # the radii of the torus, in the box from -1 to 1


class SDF(nn.Module):
    """An MLP that begins as the signed distance to a sphere."""

    def __init__(self, width: int = 64, layers: int = 5, radius: float = 0.5) -> None:
        super().__init__()
        sizes = [3, *[width] * (layers - 1), 1]
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            layer = nn.Linear(fan_in, fan_out)
            if i < layers - 1:
                nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / fan_out))
                nn.init.zeros_(layer.bias)
            else:
                nn.init.normal_(layer.weight, math.sqrt(math.pi / fan_in), 1e-4)
                nn.init.constant_(layer.bias, -radius)
            self.add_module(f"lin{i}", layer)  # the names of NeuS, IGR and DeepSDF

    @override
    def forward(self, points: Tensor) -> Tensor:
        """The distances, ``(n,)``, of points ``(n, 3)``; negative inside."""
        x = points
        *hidden, last = self.children()
        for layer in hidden:
            x = F.softplus(layer(x), beta=100)
        distances: Tensor = last(x).squeeze(1)
        return distances


def exact(points: Tensor) -> Tensor:
    """The signed distances of points ``(n, 3)`` to the torus."""
    from_ring = points[:, :2].norm(dim=1) - MAJOR
    return torch.hypot(from_ring, points[:, 2]) - MINOR


def surface(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random points of the torus, and their normals, both ``(count, 3)``."""
    around, across = (2 * math.pi * torch.rand(2, count, generator=generator)).unbind()
    outward = torch.stack([around.cos(), around.sin(), torch.zeros(count)], dim=1)
    up = torch.tensor([0.0, 0.0, 1.0])
    normals = across.cos()[:, None] * outward + across.sin()[:, None] * up
    return MAJOR * outward + MINOR * normals, normals


def loss_of(model: nn.Module, generator: torch.Generator, count: int = 256) -> Tensor:
    """IGR's loss: 0 on the surface with the normals as gradients, and gradients of length 1."""
    on, normals = surface(count, generator)
    near = on + 0.1 * torch.randn(on.shape, generator=generator)
    anywhere = 2 * torch.rand(on.shape, generator=generator) - 1
    points = torch.cat([on, near, anywhere]).requires_grad_()
    distances = model(points)
    (slopes,) = torch.autograd.grad(distances.sum(), points, create_graph=True)
    eikonal = (slopes.norm(dim=1) - 1).square().mean()
    along = (slopes[:count] - normals).norm(dim=1).mean()
    loss: Tensor = distances[:count].abs().mean() + 0.1 * eikonal + 0.1 * along
    return loss


def error_of(model: nn.Module) -> float:
    """How far the model is from the exact distance, in the mean over fixed points of the box."""
    points = 2 * torch.rand(4096, 3, generator=torch.Generator().manual_seed(1)) - 1
    with torch.no_grad():
        return float((model(points) - exact(points)).abs().mean())


class Run(NamedTuple):
    """What one training gave."""

    model: nn.Module
    losses: list[float]
    errors: list[tuple[int, float]]  # after so many steps
    first: Tensor  # what the untrained model says about points of the surface
    seconds: float


def train(normed: bool, steps: int, lr: float) -> Run:
    """Train with or without weight norm, from the same start."""
    torch.manual_seed(0)
    began = time.process_time()
    model = SDF()
    if normed:
        wn.apply(model, "neus")
    first = model(surface(64, torch.Generator().manual_seed(2))[0]).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    losses, errors = [], [(0, error_of(model))]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss: Any = loss_of(model, generator)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 40) == 0 or step == steps:
            errors.append((step, error_of(model)))
    return Run(model, losses, errors, first, time.process_time() - began)


def draw(runs: dict[str, Run], path: Path) -> None:
    """Level sets and errors on the slice y = 0, and both over the training."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    along = torch.linspace(-1, 1, 201)
    z, x = torch.meshgrid(along, along, indexing="ij")
    side = along.numpy()
    points = torch.stack([x, torch.zeros_like(x), z], dim=2).reshape(-1, 3)
    truth = exact(points).reshape(x.shape).numpy()
    with torch.no_grad():
        found = {name: run.model(points).reshape(x.shape).numpy() for name, run in runs.items()}
    worst = max(abs(each - truth).max() for each in found.values())
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.8), layout="constrained")
    levels = [-0.15, -0.1, -0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    for column, (name, run) in enumerate(runs.items()):
        sets: Any = axes[0][column]
        lines = sets.contour(side, side, found[name], levels, cmap="viridis", linewidths=1)
        sets.clabel(lines, fontsize=7)
        sets.contour(side, side, found[name], [0.0], colors="black", linewidths=2)
        sets.contour(side, side, truth, [0.0], colors="red", linewidths=1.2, linestyles="dashed")
        sets.set_title(
            f"{name}: level sets at y = 0\nsurface black, exact surface red", fontsize=10
        )
        errors: Any = axes[1][column]
        errors.imshow(
            abs(found[name] - truth),
            extent=(-1, 1, -1, 1),
            origin="lower",
            vmin=0,
            vmax=worst,
            cmap="magma",
        )
        errors.set_title(
            f"{name}: error at y = 0\nmean in the whole box {run.errors[-1][1]:.4f}", fontsize=10
        )
        for each in (sets, errors):
            each.set_aspect("equal")
            each.set_xlabel("x")
            each.set_ylabel("z")
    image = axes[1][0].images[0]  # of one scale with the other
    figure.colorbar(image, ax=axes[1][:2].tolist(), shrink=0.9, label="|learned − exact distance|")
    width = max(1, len(next(iter(runs.values())).losses) // 40)
    for name, run in runs.items():
        chunks = torch.tensor(run.losses[: len(run.losses) // width * width]).reshape(-1, width)
        at = [width * (i + 0.5) for i in range(len(chunks))]
        axes[0][2].semilogy(at, chunks.mean(1).tolist(), label=name)
        axes[1][2].semilogy(*zip(*run.errors, strict=True), label=name)
    axes[0][2].set_title(f"loss, mean over {width} steps", fontsize=10)
    axes[1][2].set_title("mean error in the box", fontsize=10)
    for each in axes[:, 2]:
        each.set_xlabel("steps")
        each.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Train twice; return 0 if both began as the same function, and came closer to the torus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--picture", type=Path, help="where a PNG goes")
    args = parser.parse_args(argv)

    runs = {
        name: train(normed, args.steps, args.lr)
        for name, normed in (("plain", False), ("weight norm", True))
    }
    for name, run in runs.items():
        print(
            f"{name}: mean error {run.errors[0][1]:.4f} at first, {run.errors[-1][1]:.4f} after "
            f"{args.steps} steps; {run.seconds:.0f} s of CPU time"
        )
    plain, normed = runs.values()
    same = torch.equal(plain.first, normed.first)
    print(f"both began with {'the same function, bit for bit' if same else 'other functions'}")
    if args.picture is not None:
        draw(runs, args.picture)
        print(f"{args.picture} is drawn")
    closer = all(run.errors[-1][1] < run.errors[0][1] for run in runs.values())
    return 0 if same and closer else 1


if __name__ == "__main__":
    sys.exit(main())
