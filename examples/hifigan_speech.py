"""Speech for examples/hifigan.py: recordings, random pieces of them, and log-mel spectrograms."""

from __future__ import annotations

__all__ = [
    "HOP",
    "MELS",
    "RATE",
    "SOUNDS",
    "LogMel",
    "Pieces",
    "Waves",
    "draw",
    "made_up",
    "read_wav",
    "recordings",
    "write_wav",
]

import math
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from typing_extensions import override

SOUNDS = Path("/usr/share/sounds/alsa")
"""Where Debian's alsa-utils has its recordings: a woman says "front center", "rear left", ..."""
RATE, HOP, MELS = 16_000, 256, 80
_WINDOW = 1024
_LOW, _HIGH = 80.0, 7600.0


class LogMel(nn.Module):
    """Log-mel spectrograms: natural logarithms of magnitudes, as HiFi-GAN has them.

    80 triangular filters from 80 to 7,600 Hz, windows of 1,024 samples and a hop of 256, padded so
    that there is a frame for every 256 samples.
    """

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)
        self.register_buffer("filters", _filters(), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        """``(batch, 256 * frames)`` samples to ``(batch, frames, 80)``."""
        edge = (_WINDOW - HOP) // 2
        padded = F.pad(samples[:, None], (edge, edge), mode="reflect")[:, 0]
        spectrum = torch.stft(
            padded, _WINDOW, HOP, window=self.window, center=False, return_complex=True
        )
        # The gradient of a magnitude has no limit at 0.
        magnitudes = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
        return (self.filters @ magnitudes).clamp(min=1e-5).log().transpose(1, 2)


def _filters() -> Tensor:
    """``(80, 513)``: triangles of height 1 whose corners are evenly spaced in mel."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (_LOW, _HIGH))
    corners = 700 * (10 ** (torch.linspace(low, high, MELS + 2) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, _WINDOW // 2 + 1)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def recordings(folder: Path) -> dict[str, Tensor]:
    """Every recording of speech in a folder, at 16 kHz, by name: ``(256 * frames,)`` each."""
    found = sorted(path for path in folder.glob("*.wav") if path.stem != "Noise")
    return {path.stem: read_wav(path) for path in found}


def made_up() -> dict[str, Tensor]:
    """Tones and chirps with overtones and some noise, where there is no speech: 1.4 s each."""
    time = torch.arange(HOP * 88) / RATE
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    sounds: dict[str, Tensor] = {}
    for number in range(4):
        low = 110 * 1.25**number
        vibrato = low * (1 + 0.02 * torch.sin(2 * torch.pi * 5 * time))
        glide = low * 2 ** (time / time[-1] if number % 2 else 1 - time / time[-1])
        # As loud as syllables are, two to five of them.
        envelope = torch.sin(torch.pi * (2 + number) * time / time[-1]).abs()
        for name, pitch in (("tone", vibrato), ("chirp", glide)):
            phase = 2 * torch.pi * torch.cumsum(pitch, 0) / RATE
            overtones = torch.stack([(k * phase).sin() / k for k in range(1, 16)]).sum(0)
            sounds[f"{name}_{number + 1}"] = _levelled((overtones + 0.05 * noise) * envelope)
    return sounds


def read_wav(path: Path) -> Tensor:
    """The first channel of a 16-bit file: resampled to 16 kHz, cut to whole frames, levelled."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"{path} has {8 * file.getsampwidth()}-bit samples; expected 16-bit")
        data = bytearray(file.readframes(file.getnframes()))
        samples = torch.frombuffer(data, dtype=torch.int16).float()[:: file.getnchannels()]
        rate = file.getframerate()
    # The whole recording at once, so an ideal low-pass filter costs nothing.
    size = len(samples) * RATE // rate
    samples = torch.fft.irfft(torch.fft.rfft(samples)[: size // 2 + 1], size)
    return _levelled(samples[: size // HOP * HOP])


def write_wav(path: Path, samples: Tensor) -> None:
    """Write ``(samples,)`` in [-1, 1] as a 16-bit file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        integers = (samples.clamp(-1, 1) * 32767).round().to(torch.int16)
        file.writeframes(integers.numpy().tobytes())


def draw(path: Path, mels: Mapping[str, Tensor]) -> None:
    """A picture of log-mel spectrograms, ``(frames, 80)`` each, below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(mels)), layout="constrained")
    rows: Any = figure.subplots(len(mels), 1, sharex=True, squeeze=False)[:, 0]
    top = max(float(mel.max()) for mel in mels.values())
    seconds = max(len(mel) for mel in mels.values()) * HOP / RATE
    for axes, (title, mel) in zip(rows, mels.items(), strict=True):
        axes.imshow(
            mel.T.numpy(),
            origin="lower",
            aspect="auto",
            # One scale for all: what is darker is quieter.
            vmin=top - 9,
            vmax=top,
            extent=(0, seconds, 0, MELS),
            cmap="magma",
        )
        axes.set_title(title)
        axes.set_ylabel("mel filter")
    rows[-1].set_xlabel("seconds")
    figure.colorbar(rows[0].images[0], ax=list(rows), label="log magnitude")
    figure.savefig(path, dpi=100)


def _levelled(samples: Tensor) -> Tensor:
    """With a peak of 0.95, as the paper's data has: the generator ends in a tanh."""
    return samples * (0.95 / samples.abs().max().clamp(min=1e-8))


class Waves(Dataset[Tensor]):
    """Waveforms, or pieces of them.

    Args:
        waves: of any lengths.
        length: of a piece in samples; None for the whole.
    """

    def __init__(self, waves: list[Tensor], length: int | None = None) -> None:
        self.waves = waves
        self.length = length

    def __len__(self) -> int:
        return len(self.waves)

    @override
    def __getitem__(self, index: int | tuple[int, int]) -> Tensor:
        """The whole of waveform ``index``, or a piece of it for a pair of that and the start."""
        which, start = index if isinstance(index, tuple) else (index, 0)
        end = None if self.length is None else start + self.length
        return self.waves[which][start:end]


class Pieces(Sampler[tuple[int, int]]):
    """Where the pieces of an epoch are: others in each epoch, and the same in a resumed run.

    Lightning calls ``set_epoch``; a sampler that draws from the global generator instead would
    make a resumed run see other data, since a checkpoint does not hold that generator.

    Args:
        data: what to cut from.
        pieces: how many in an epoch.
    """

    def __init__(self, data: Waves, pieces: int) -> None:
        self.data = data
        self.pieces = pieces
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.pieces

    @override
    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = torch.Generator().manual_seed(self.epoch)
        length = self.data.length or 0
        for _ in range(self.pieces):
            which = int(torch.randint(len(self.data), (), generator=random))
            room = len(self.data.waves[which]) - length + 1
            yield which, int(torch.randint(room, (), generator=random))
