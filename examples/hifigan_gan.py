"""The networks of examples/hifigan.py and how they are trained: HiFi-GAN, arXiv:2010.05646.

The generator is transformers' SpeechT5HifiGan. Its discriminator and losses are not in
transformers; they are here, from the paper. No line says weight norm: that is for the rules.
"""

from __future__ import annotations

__all__ = ["Gan", "MultiPeriodDiscriminator", "PeriodDiscriminator", "small_generator"]

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from hifigan_speech import LogMel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
from typing_extensions import override

import wn_surgery as wn

Judged = tuple[list[Tensor], list[Tensor]]
"""The scores of all sub-discriminators, and the features of all their layers."""


def small_generator() -> SpeechT5HifiGan:
    """A generator of the paper's shape, with fewer and narrower layers, randomly initialized."""
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            upsample_initial_channel=96,
            upsample_rates=[8, 8, 4],
            upsample_kernel_sizes=[16, 16, 8],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            # The default, 0.01, is for wide layers: through these it leaves nothing of a signal.
            initializer_range=0.05,
        )
    )


class PeriodDiscriminator(nn.Module):
    """Sees every ``period``-th sample: convolutions along the columns of a folded waveform."""

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        widths = [1, *channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, (5, 1), (3 if c_in < c_out else 1, 1), padding=(2, 0))
            for c_in, c_out in zip(widths, channels, strict=False)
        )
        self.conv_post = nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, samples: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``(batch, time)`` to scores ``(batch, n)`` and the features of each layer."""
        x = F.pad(samples[:, None], (0, -samples.shape[1] % self.period), mode="reflect")
        x = x.view(len(x), 1, -1, self.period)
        features: list[Tensor] = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.conv_post(x)
        return x.flatten(1), [*features, x]


class MultiPeriodDiscriminator(nn.Module):
    """One discriminator for each prime period (the paper's section 2.3), here narrower."""

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        channels: Sequence[int] = (8, 16, 32, 64, 64),
    ) -> None:
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(p, channels) for p in periods)

    def forward(self, samples: Tensor) -> Judged:
        """``(batch, time)`` to the scores and features of all."""
        judged = [one(samples) for one in self.periods]
        return [score for score, _ in judged], [x for _, features in judged for x in features]


class Gan(L.LightningModule):
    """The paper's recipe: least-squares losses, feature matching, and 45 times the mel L1.

    Args:
        generator: mel spectrograms to waveforms.
        discriminator: tells recordings from what the generator makes of their spectrograms.
        lr: of both AdamW optimizers.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = generator
        self.discriminator = discriminator
        self.log_mel = LogMel()
        self.lr = lr

    def mel_l1(self, made: Tensor, mel: Tensor) -> Tensor:
        """How far the spectrogram of a made waveform is from the one that it was made of."""
        return F.l1_loss(self.log_mel(made), mel)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        optimizers: Any = self.optimizers()
        for_generator, for_discriminator = optimizers
        mel = self.log_mel(batch)
        made = self.generator(mel)

        with self.toggled_optimizer(for_discriminator):
            real, _ = self.discriminator(batch)
            fake, _ = self.discriminator(made.detach())
            pairs = zip(real, fake, strict=True)
            judging = _sum((1 - r).square().mean() + f.square().mean() for r, f in pairs)
            self._step(for_discriminator, judging)

        with self.toggled_optimizer(for_generator):
            with torch.no_grad():
                _, wanted = self.discriminator(batch)
            fake, features = self.discriminator(made)
            fooling = _sum((1 - f).square().mean() for f in fake)
            matching = _sum(F.l1_loss(f, w) for f, w in zip(features, wanted, strict=True))
            mel_l1 = self.mel_l1(made, mel)
            self._step(for_generator, fooling + 2 * matching + 45 * mel_l1)

        losses = {
            "discriminator": judging,
            "generator": fooling,
            "feature_matching": matching,
            "mel_l1": mel_l1,
        }
        losses = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        self.log_dict(losses, on_step=True, on_epoch=True, batch_size=len(batch))
        return losses

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    @override
    def on_train_epoch_end(self) -> None:
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers:
            scheduler.step()

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        mel = self.log_mel(batch)
        self.log("val/mel_l1", self.mel_l1(self.generator(mel), mel), batch_size=len(batch))

    @override
    def configure_optimizers(self) -> Any:
        # By now the callback has been there: g and v are what is trained.
        optimizers = [
            torch.optim.AdamW(
                wn.parameter_groups(network, weight_decay=0.01), lr=self.lr, betas=(0.8, 0.99)
            )
            for network in (self.generator, self.discriminator)
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()
