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

    def to_dict(self) -> dict[str, Any]:
        """The preset as plain JSON data."""
        rules = [rule.to_dict() for rule in self.rules]
        return {"rules": rules, "source": self.source, "summary": self.summary}


def preset(name: str) -> tuple[Rule, ...]:
    """The rules of a preset, labelled ``"preset NAME"``."""
    found = PRESETS.get(name)
    if found is None:
        raise RuleError(
            f"no preset is called {name!r}{did_you_mean(name, PRESETS)} "
            f"(the presets are {', '.join(PRESETS)})"
        )
    return found.rules


def _preset(name: str, *more: dict[str, Any], source: str, summary: str, **fields: Any) -> Preset:
    rules = tuple(Rule(label=f"preset {name}", **each) for each in (fields, *more))
    return Preset(name, rules, source, summary)


# One rule each, where one suffices: a preset has to fit a model as a whole, and a rule that matches
# nothing in the model is an error, so a second rule for a variant would make the preset fail on the
# others.
_CONV1D = ["torch.nn.Conv1d", "torch.nn.ConvTranspose1d"]
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
        types=_CONV1D,
    ),
    _preset(
        "bigvgan",
        source="Lee et al. 2023, arXiv:2206.04658; NVIDIA/BigVGAN, bigvgan.py, BigVGAN",
        summary="The generator's Conv1d and ConvTranspose1d, all of them, as in HiFi-GAN; the "
        "filters of its anti-aliased activations are buffers.",
        types=_CONV1D,
    ),
    _preset(
        "vits",
        source="Kim, Kong & Son 2021, arXiv:2106.06103; jaywalnut310/vits, modules.py (WN, "
        "ResBlock1) and models.py (Generator); transformers, modeling_vits.py",
        summary="The WaveNets of the posterior encoder and the flow (in_layers, res_skip_layers, "
        "cond_layer), and the decoder's upsampling layers and residual blocks; unlike in HiFi-GAN, "
        "conv_pre and conv_post stay plain.",
        names=[
            "**.{in_layers,res_skip_layers,ups,upsampler}.*",
            "**.resblocks.**",
            "**.cond_layer",
        ],
        types=_CONV1D,
    ),
    _preset(
        "encodec",
        source="Défossez et al. 2022, arXiv:2210.13438; facebookresearch/encodec, "
        "modules/conv.py; transformers, modeling_encodec.py",
        summary="Every convolution of encoder and decoder, for the models with weight norm "
        "(24 kHz; the 48 kHz model has a group norm in its place). Not the LSTM.",
        types=_CONV1D,
    ),
    _preset(
        "dac",
        source="Kumar et al. 2023, arXiv:2306.06546; descriptinc/descript-audio-codec, "
        "nn/layers.py (WNConv1d); transformers, modeling_dac.py",
        summary="Every convolution: encoder, decoder, and the projections of the quantizer.",
        types=_CONV1D,
    ),
    _preset(
        "mimi",
        source="Défossez et al. 2024, arXiv:2410.00037; transformers, modeling_mimi.py",
        summary="The convolutions of the SEANet encoder and decoder. Not the transformers, nor the "
        "quantizer's projections, nor the layers that change the frame rate.",
        names="**.{encoder,decoder}.**",
        types=_CONV1D,
    ),
    _preset(
        "waveglow",
        source="Prenger, Valle & Catanzaro 2019, arXiv:1811.00002; NVIDIA/waveglow, glow.py, WN",
        summary="The WaveNet of each coupling: start, cond_layer, in_layers and res_skip_layers. "
        "The last layer (end, which starts at zero), the 1x1 convolutions and the upsampling stay "
        "plain.",
        names=["**.{start,cond_layer}", "**.{in_layers,res_skip_layers,cond_layers}.*"],
        types="torch.nn.Conv1d",
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
    _preset(
        "pixelcnn++",
        source="Salimans et al. 2017, arXiv:1701.05517; openai/pixel-cnn, pixel_cnn_pp/nn.py",
        summary="Every 2-D convolution and dense layer, over the output channels. Then call "
        "initialize_from_batch: the paper initializes g and the biases from the first batch.",
        types=["torch.nn.Conv2d", "torch.nn.ConvTranspose2d", "torch.nn.Linear"],
        dim="out",
    ),
    _preset(
        "deepsdf",
        source="Park et al. 2019, arXiv:1901.05103; facebookresearch/DeepSDF, "
        "deep_sdf_decoder.py, with the published NormLayers [0, ..., 7]",
        summary="The eight hidden layers lin0 to lin7 of the decoder; lin8, which gives the "
        "distance, stays plain.",
        names="**.lin{0..7}",
        types="torch.nn.Linear",
    ),
    _preset(
        "neus",
        source="Wang et al. 2021, arXiv:2106.10689; Totoro97/NeuS, models/fields.py, SDFNetwork "
        "and RenderingNetwork; IGR (arXiv:2002.10099) and VolSDF name them alike",
        summary="Every layer lin0, lin1, ... of the MLPs, the last one too. Initialize the SDF "
        "geometrically (Atzmon & Lipman 2020, arXiv:1911.10414) first: weight norm keeps the "
        "weights that it finds.",
        names="**.lin*",
        types="torch.nn.Linear",
    ),
    _preset(
        "edm2",
        source="Karras et al. 2024, arXiv:2312.02696, section 2.3, equations 47 (magnitude-"
        "preserving layers) and 66 (forced weight normalization); NVlabs/edm2, MPConv",
        summary="Every Conv2d and Linear: g is 1 and fixed, so that each output has the magnitude "
        "of its input, whatever the fan-in; v goes back to 1 per element (norm: the root of the "
        "fan-in) after each step, if you call renormalize. The layers should have no bias, and the "
        "gains that the paper trains are parameters of your model.",
        types=["torch.nn.Conv2d", "torch.nn.Linear"],
        g_init=1.0,
        train_g=False,
        renormalize="rms",
    ),
    _preset(
        "ngpt",
        {
            "names": ["**.{o_proj,out_proj,down_proj,c_proj,att_c_proj,mlp_c_proj}"],
            "types": "torch.nn.Linear",
            "dim": 1,
            "g_init": 1.0,
            "train_g": False,
            "renormalize": True,
        },
        source="Loshchilov et al. 2024, arXiv:2410.01131, sections 2.1 to 2.6; NVIDIA/ngpt, "
        "train.py, normalize_matrices",
        summary="Every matrix of a decoder, along the embedding: the rows of the embedding, the "
        "head and what reads the residual stream, the columns of what writes into it (as named in "
        "Llama and its relatives, or in nanoGPT). g is 1 and fixed, v goes back to norm 1. The "
        "scales of nGPT, its residual steps and its missing norm layers are parts of your model.",
        names=[
            "**.{q_proj,k_proj,v_proj,gate_proj,up_proj,query,key,value,c_fc}",
            "**.{embed_tokens,wte,lm_head}",
        ],
        types=["torch.nn.Linear", "torch.nn.Embedding"],
        g_init=1.0,
        train_g=False,
        renormalize=True,
        tied="together",
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({entry.name: entry for entry in _ALL})
"""Every preset, by name."""
