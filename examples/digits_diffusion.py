"""A small diffusion model of scikit-learn's digits, with and without renormalized directions.

The denoiser follows Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion
Models", arXiv:2312.02696) in small: magnitude-preserving layers without biases, one trained gain,
Adam with an inverse square root schedule, and an average of the weights, to sample from. Both runs
begin with the same weights and see the same batches. Both have weight norm with g fixed at 1, so
that the gain is the only magnitude that trains. In the second, after each step, v goes back to the
norm that the preset "edm2" asks for: there the effective learning rate of each layer is what the
schedule says. In the first it is lower.

    python examples/digits_diffusion.py --picture digits_diffusion.png   (or: make diffusion)
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.rules.presets import preset

SIGMA_DATA = 0.6  # of pixels from -1 to 1


class Denoiser(nn.Module):
    """A multilayer perceptron in the preconditioning of Karras et al. 2022 (arXiv:2206.00364)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int = 128, features: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        sizes = [64 + features + 1, width, width, width]
        self.hidden = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in pairwise(sizes))
        self.last = nn.Linear(width, 64, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))

    @override
    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The denoised images, ``(batch, 64)``, for noise levels ``(batch, 1)``."""
        total = (sigma.square() + SIGMA_DATA**2).sqrt()
        level = (self.frequencies * sigma.log() / 4 + self.phases).cos() * math.sqrt(2)
        x = torch.cat([noisy / total, level, torch.ones_like(sigma)], dim=1)
        for layer in self.hidden:
            x = F.silu(layer(x)) / 0.596  # which keeps the magnitude
        x = self.last(x) * self.gain
        denoised: Tensor = noisy * (SIGMA_DATA / total).square() + x * sigma * SIGMA_DATA / total
        return denoised


def digits() -> tuple[Tensor, Tensor]:
    """Images to train on and 300 others, ``(n, 64)``, with pixels from -1 to 1."""
    pixels, _ = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float() / 8 - 1
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[300:], images[:300]


def loss_of(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """The weighted denoising loss, at random noise levels."""
    normal = torch.randn(len(images), 1, generator=generator)
    sigma = (normal * 1.2 - 1.0).exp()
    noise = torch.randn(images.shape, generator=generator)
    weight = (sigma.square() + SIGMA_DATA**2) / (sigma * SIGMA_DATA).square()
    loss: Tensor = (weight * (model(images + noise * sigma, sigma) - images).square()).mean()
    return loss


class Run(NamedTuple):
    """What one training gave."""

    held_out: float
    samples: Tensor
    effective: list[list[float]]  # for each layer, the learning rate over ‖v‖², in rms units
    magnitudes: list[list[float]]  # the mean g of each layer, and then the gain
    seconds: float


def train(rules: tuple[wn.Rule, ...], put_back: bool, steps: int, lr: float) -> Run:
    """Train with or without renormalized directions, from the same start."""
    torch.manual_seed(0)
    began = time.process_time()
    train_on, held_out = digits()
    model = Denoiser()
    wn.apply(model, rules)
    wn.renormalize(model, "rms")  # both begin alike
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 / math.sqrt(max(1.0, step / (steps / 4)))
    )
    averaging: Any = get_ema_multi_avg_fn  # torch leaves it untyped
    average = AveragedModel(model, multi_avg_fn=averaging(0.99))
    generator = torch.Generator().manual_seed(1)
    effective: list[list[float]] = []
    magnitudes: list[list[float]] = []
    for step in range(steps):
        batch = train_on[torch.randint(len(train_on), (128,), generator=generator)]
        optimizer.zero_grad()
        loss: Any = loss_of(model, batch, generator)
        loss.backward()
        optimizer.step()
        schedule.step()
        if put_back:
            wn.renormalize(model)
        average.update_parameters(model)
        if step % max(1, steps // 100) == 0:
            sites = wn.statistics(model, optimizer).sites
            fans = [site.shape[1] for site in wn.sites(model) if site.normed]
            rates = [site.effective_lr or 0.0 for site in sites]
            effective.append([rate * fan for rate, fan in zip(rates, fans, strict=True)])
            magnitudes.append([*(site.g[1] for site in sites), model.gain.item()])
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(2)
        held = sum(float(loss_of(average, held_out, fixed)) for _ in range(10)) / 10
        seconds = time.process_time() - began
        return Run(held, sample(average), effective, magnitudes, seconds)


def sample(model: nn.Module, count: int = 40, steps: int = 24) -> Tensor:
    """Images from noise, by Heun's method (Karras et al. 2022, algorithm 1)."""
    ramp = torch.linspace(0, 1, steps)
    high, low = 20.0 ** (1 / 7), 0.01 ** (1 / 7)
    sigmas: list[float] = [*(high + ramp * (low - high)).pow(7).tolist(), 0.0]
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(3)) * sigmas[0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        denoised: Tensor = model(x, torch.full((count, 1), sigma))
        found: Tensor = (x - denoised) / sigma
        return found

    for now, then in pairwise(sigmas):
        first = slope(x, now)
        x_then = x + (then - now) * first
        if then > 0:
            x_then = x + (then - now) * (first + slope(x_then, then)) / 2
        x = x_then
    return x


def draw(runs: dict[str, Run], path: Path) -> None:
    """Samples, g and effective learning rates, side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        3, 2, figsize=(10, 9), height_ratios=(1.15, 0.9, 1.1), layout="constrained"
    )
    rates = [rate for run in runs.values() for row in run.effective for rate in row]
    largest = max(value for run in runs.values() for row in run.magnitudes for value in row)
    for column, (name, run) in enumerate(runs.items()):
        # White edges, so that the digits stand apart.
        tiles = F.pad(run.samples.clamp(-1, 1).reshape(5, 8, 8, 8), (1, 1, 1, 1), value=-1)
        shown: Any = axes[0][column]
        image = tiles.permute(0, 2, 1, 3).reshape(50, 80)
        shown.imshow(image.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        shown.set_title(f"{name}\nheld-out loss {run.held_out:.4f}; samples:", fontsize=11)
        shown.axis("off")
        percent = [100 * i / len(run.effective) for i in range(len(run.effective))]
        *layers, gain = zip(*run.magnitudes, strict=True)
        g: Any = axes[1][column]
        for layer, values in enumerate(layers):
            label = "g of layers 0 to 3 (fixed)" if layer == 0 else None
            g.plot(percent, values, color="gray", label=label)
        g.plot(percent, gain, color="black", label="gain of the last layer (trained)")
        g.set_ylim(0, 1.1 * largest)
        g.set_ylabel("magnitudes")
        curves: Any = axes[2][column]
        for layer, values in enumerate(zip(*run.effective, strict=True)):
            style: Any = (0, (4, layer))  # lines that lie on each other stay visible
            curves.semilogy(percent, values, label=f"layer {layer}", linestyle=style)
        curves.set_ylim(min(rates) * 0.8, max(rates) * 1.25)
        curves.set_ylabel("effective learning rate")
        for each in (g, curves):
            each.set_xlabel("percent of the steps")
            each.legend(fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Train twice; return 0 if the renormalized run kept the rate that its schedule says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--picture", type=Path, help="where a PNG goes")
    args = parser.parse_args(argv)

    edm2 = preset("edm2")
    fixed = tuple(replace(rule, renormalize=None) for rule in edm2)
    runs = {
        "weight norm": train(fixed, put_back=False, steps=args.steps, lr=args.lr),
        "weight norm, directions renormalized": train(edm2, True, args.steps, args.lr),
    }
    for name, run in runs.items():
        ends = [f"{rate:.2g}" for rate in run.effective[-1]]
        print(f"{name}: held-out loss {run.held_out:.4f}, {run.seconds:.0f} s of CPU time")
        print(f"  effective learning rates of the layers at the end: {', '.join(ends)}")
    if args.picture is not None:
        draw(runs, args.picture)
        print(f"{args.picture} is drawn")
    last = runs["weight norm, directions renormalized"].effective[-1]
    return 0 if max(last) <= 1.001 * min(last) else 1


if __name__ == "__main__":
    sys.exit(main())
