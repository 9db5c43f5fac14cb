"""Named rules for the models that made weight norm known, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wn_surgery.errors import RuleError
from wn_surgery.rules.fields import did_you_mean
from wn_surgery.rules.rule import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """Rules with a name, the publication and code that they follow, and a sentence."""

    name: str
    rules: tuple[Rule, ...]
    source: str
    summary: str


def preset(name: str) -> tuple[Rule, ...]:
    """The rules of a preset, labelled ``"preset NAME"``."""
    found = PRESETS.get(name)
    if found is None:
        raise RuleError(
            f"no preset is called {name!r}{did_you_mean(name, PRESETS)} "
            f"(the presets are {', '.join(PRESETS)})"
        )
    return found.rules


def _preset(name: str, *, source: str, summary: str, **fields: Any) -> Preset:
    return Preset(name, (Rule(label=f"preset {name}", **fields),), source, summary)


# One rule each: a preset has to fit a model as a whole, and a rule that matches nothing in the
# model is an error, so a second rule for a variant would make the preset fail on the others.
_ALL = (
    _preset(
        "convolutions",
        source="torch.nn.utils.parametrizations.weight_norm, with its default dim",
        summary="Every convolution, transposed ones too, over axis 0 (the input channels of a "
        'transposed one; write the rule with `dim: "out"` for its output channels).',
        types=[f"torch.nn.Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)],
    ),
    _preset(
        "linears",
        source="Salimans & Kingma 2016, arXiv:1602.07868 (one g for each output unit)",
        summary="Every Linear, and the transposed Conv1D of GPT-2 in transformers, over the "
        "output features. The output projection inside MultiheadAttention is a Linear too.",
        types=["torch.nn.Linear", "transformers.pytorch_utils.Conv1D"],
        dim="out",
    ),
    _preset(
        "hifigan",
        source="Kong, Kim & Bae 2020, arXiv:2010.05646; jik876/hifi-gan, models.py, Generator",
        summary="conv_pre, the upsampling layers, the residual blocks and conv_post of the "
        "generator: all of its Conv1d and ConvTranspose1d. Not for the discriminators, of which "
        "the first multi-scale one has spectral norm in its place.",
        types=["torch.nn.Conv1d", "torch.nn.ConvTranspose1d"],
    ),
    _preset(
        "wav2vec2",
        source="Baevski et al. 2020, arXiv:2006.11477; facebookresearch/fairseq, wav2vec2.py; "
        "transformers, modeling_wav2vec2.py",
        summary="The convolution that embeds positions, over its kernel axis: wav2vec 2.0, "
        "HuBERT, WavLM, SEW, UniSpeech and SpeechT5, as named by transformers and torchaudio "
        "(pos_conv_embed.conv) or fairseq (pos_conv.0).",
        names=["**.pos_conv_embed.conv", "**.pos_conv.0"],
        types="torch.nn.Conv1d",
        dim=2,
    ),
    _preset(
        "dino-head",
        source="Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino, "
        "vision_transformer.py, DINOHead",
        summary="The last layer of DINO's head, or the classifier of an image model of "
        "transformers (ViT, DINOv2): g is filled with 1 and frozen (norm_last_layer=True, DINO's "
        "default).",
        names=["**.last_layer", "**.classifier"],
        types="torch.nn.Linear",
        g_init=1.0,
        train_g=False,
    ),
    _preset(
        "tcn",
        source="Bai, Kolter & Koltun 2018, arXiv:1803.01271; locuslab/TCN, tcn.py, TemporalBlock",
        summary="Both dilated convolutions of each block, under either of their names (conv1 and "
        "net.0); the 1x1 downsample stays plain.",
        types="torch.nn.Conv1d",
        exclude_names="**.downsample",
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({entry.name: entry for entry in _ALL})
"""Every preset, by name."""
