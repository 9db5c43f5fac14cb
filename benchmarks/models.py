"""The models that are measured and are not in transformers: plain, small, and called as usual."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GAN", "RNN", "TCN", "Discriminators", "ReadWeights", "WaveNet", "gan_step"]

Block: TypeAlias = Callable[[], AbstractContextManager[object]]


class _Causal(nn.Module):
    """Two dilated causal convolutions and a residual connection (arXiv:1803.01271, fig. 1b)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.past = (kernel - 1) * dilation
        self.conv1 = nn.Conv1d(c_in, c_out, kernel, dilation=dilation)
        self.conv2 = nn.Conv1d(c_out, c_out, kernel, dilation=dilation)
        self.downsample = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(F.pad(x, (self.past, 0))))
        y = F.relu(self.conv2(F.pad(y, (self.past, 0))))
        return F.relu(y + self.downsample(x))


class TCN(nn.Module):
    """17 convolutions: 8 blocks of two, and the first block's downsample."""

    def __init__(self, channels: int = 64, levels: int = 8, kernel: int = 3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                _Causal(1 if level == 0 else channels, channels, kernel, 2**level)
                for level in range(levels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 1, time)`` to ``(batch, channels, time)``."""
        y: Tensor = self.blocks(x)
        return y


class _Gated(nn.Module):
    """A gated unit with its residual and its skip output (arXiv:1609.03499, fig. 4)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, 2 * channels, 3, dilation=dilation, padding=dilation)
        self.residual = nn.Conv1d(channels, channels, 1)
        self.skip = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = self.conv(x).chunk(2, 1)
        y = torch.tanh(value) * torch.sigmoid(gate)
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    """93 convolutions: 30 gated blocks of three, one before and two after them."""

    def __init__(self, channels: int = 64, blocks: int = 30) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, channels, 1)
        self.blocks = nn.ModuleList(_Gated(channels, 2 ** (i % 10)) for i in range(blocks))
        self.last = nn.Sequential(
            nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 1, time)`` to the same."""
        x = self.first(x)
        total = torch.zeros_like(x)
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        y: Tensor = self.last(total)
        return y


class Small(nn.Module):
    """92 convolutions of 24 channels, one after another: as little arithmetic as a model has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(24, 24, 3, padding=1) for _ in range(92))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 24, time)`` to the same."""
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return x


class _Cell(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.input = nn.Linear(size, size)
        self.state = nn.Linear(size, size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.state(h))


class RNN(nn.Module):
    """A loop over one cell of two Linears."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.cell = _Cell(size)

    def forward(self, x: Tensor) -> Tensor:
        """``(time, batch, size)`` to the last state, ``(batch, size)``."""
        h = torch.zeros_like(x[0])
        for step in x:
            h = self.cell(step, h)
        return h


class ReadWeights(nn.Module):
    """Nothing but the weights of some layers: their weight norm without the layers' own work.

    Args:
        layers: modules with a ``weight``.
        dtype: what each is converted to, as the layer would under autocast.
    """

    def __init__(self, layers: list[nn.Module], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dtype = dtype

    def forward(self) -> list[Tensor]:
        """The weights; where a layer's pre-hooks compute it, they are called."""
        weights = []
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weights.append(weight if self.dtype is None else weight.to(self.dtype))
        return weights


class _Period(nn.Module):
    """Sees every p-th sample (arXiv:2010.05646, section 2.3)."""

    def __init__(self, period: int, narrow: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, *(width // narrow for width in (32, 128, 512, 1024))]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, (5, 1), stride=(3, 1), padding=(2, 0)) for a, b in pairwise(widths)
        )
        self.convs.append(nn.Conv2d(widths[-1], widths[-1], (5, 1), padding=(2, 0)))
        self.last = nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.pad(x, (0, -x.shape[-1] % self.period))
        x = x.view(*x.shape[:-1], -1, self.period)
        return _features(x, self.convs, self.last)


class _Scale(nn.Module):
    """Sees the signal after some average pooling (arXiv:1910.06711)."""

    # kernel, stride, groups, and the width that follows
    _LAYERS = ((15, 1, 1, 128), (41, 2, 4, 128), (41, 2, 16, 256), (41, 4, 16, 512),
               (41, 4, 16, 1024), (41, 1, 16, 1024), (5, 1, 1, 1024))  # fmt: skip

    def __init__(self, poolings: int, narrow: int) -> None:
        super().__init__()
        self.poolings = poolings
        self.convs = nn.ModuleList()
        before = 1
        for kernel, stride, groups, wide in self._LAYERS:
            width = wide // narrow
            self.convs.append(
                nn.Conv1d(before, width, kernel, stride, kernel // 2, groups=min(groups, before))
            )
            before = width
        self.last = nn.Conv1d(before, 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        for _ in range(self.poolings):
            x = F.avg_pool1d(x, 4, 2, padding=2)
        return _features(x, self.convs, self.last)


def _features(x: Tensor, convs: nn.ModuleList, last: nn.Module) -> tuple[Tensor, list[Tensor]]:
    seen = []
    for conv in convs:
        x = F.leaky_relu(conv(x), 0.1)
        seen.append(x)
    return last(x), seen


class Discriminators(nn.Module):
    """Discriminators of one kind, each for the real and then for the generated signal."""

    def __init__(self, each: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)

    def forward(
        self, real: Tensor, fake: Tensor
    ) -> list[tuple[tuple[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]]:
        """``(batch, 1, time)`` twice to (score, features) of both, for each discriminator."""
        return [(one(real), one(fake)) for one in self.each]


class GAN(nn.Module):
    """A generator with HiFi-GAN's discriminators, every convolution of them a plain one.

    Args:
        generator: ``(batch, frames, mels)`` to ``(batch, time)``.
        narrow: the discriminators' widths are the published ones over this; a power of two.
    """

    def __init__(self, generator: nn.Module, narrow: int = 1) -> None:
        super().__init__()
        self.generator = generator
        self.periods = Discriminators([_Period(p, narrow) for p in (2, 3, 5, 7, 11)])
        self.scales = Discriminators([_Scale(n, narrow) for n in range(3)])


def gan_step(gan: GAN, mel: Tensor, real: Tensor, block: Block) -> Tensor:
    """One training step's computations; nothing is stepped, so that each step is the same.

    Args:
        gan: its gradients are ``None``.
        mel: ``(batch, frames, mels)``.
        real: ``(batch, 1, time)``.
        block: what surrounds each of the two halves: between them an optimizer would step.

    Returns:
        Both losses, ``(2,)``. The discriminators' gradients are the sum of both halves', since
        nothing is zeroed in between.
    """
    judges = (gan.periods, gan.scales)
    with block():
        fake = gan.generator(mel).unsqueeze(1)
        judging = torch.zeros((), device=real.device)
        for judge in judges:
            for (good, _), (bad, _) in judge(real, fake.detach()):
                judging = judging + (good - 1).square().mean() + bad.square().mean()
        judging.backward()  # type: ignore[no-untyped-call]
    with block():
        fooling = 45 * F.l1_loss(fake, real)
        for judge in judges:
            for (_, wanted), (score, found) in judge(real, fake):
                fooling = fooling + (score - 1).square().mean()
                for a, b in zip(wanted, found, strict=True):
                    fooling = fooling + 2 * F.l1_loss(b, a.detach())
        fooling.backward()  # type: ignore[no-untyped-call]
    return torch.stack([judging.detach(), fooling.detach()])
