"""Small random models of real architectures that carry weight norm.

Each entry is the architecture as its library builds it: with weight norm where its
``__init__`` puts it on, without where the model has an ``apply_weight_norm()`` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

WAVE = torch.sin(torch.arange(400) / 7).reshape(1, 400)
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
}
VOCODER = {
    "upsample_initial_channel": 16,
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
}
UNITS = {
    "unit_hifi_gan_vocab_size": 10,
    "unit_embed_dim": 8,
    "lang_embed_dim": 4,
    "spkr_embed_dim": 4,
    "vocoder_num_langs": 3,
    "vocoder_num_spkrs": 3,
    "hidden_size": 16,
}
CODEC = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": [4, 4],
    "decoder_hidden_size": 16,
    "n_codebooks": 2,
    "codebook_size": 16,
    "codebook_dim": 4,
    "hidden_size": 8,
}
MIMI = {
    "hidden_size": 16,
    "num_filters": 4,
    "num_residual_layers": 1,
    "upsampling_ratios": [4, 2],
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "upsample_groups": 16,
}


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        build: a small model with random weights.
        run: its output on a fixed input.
        rules: what the model's own weight norm is in our rules.
        own: the path of the submodule whose own ``apply_weight_norm()`` puts weight norm on;
            ``each`` where many layers have one of their own; ``None`` where ``__init__`` does it.
        own_remover: whether the model's own ``remove_weight_norm()`` works after its own
            ``apply_weight_norm()``; ``None`` where it has none.
    """

    build: Callable[[], nn.Module]
    run: Callable[[Any], Tensor]
    rules: Any
    own: str | None = None
    own_remover: bool | None = None

    def normed(self) -> nn.Module:
        """The model with its own weight norm on, ready to run."""
        torch.manual_seed(0)
        model = self.build().eval()
        for layer in self.owners(model):
            layer.apply_weight_norm()
        return model

    def owners(self, model: nn.Module) -> list[Any]:
        """The submodules whose own methods put weight norm on and take it off."""
        if self.own == "each":
            return [m for m in model.modules() if hasattr(m, "apply_weight_norm")]
        return [] if self.own is None else [model.get_submodule(self.own)]


def _hidden(model: Any) -> Tensor:
    output: Tensor = model(WAVE).last_hidden_state
    return output


def _audio(model: Any) -> Tensor:
    output: Tensor = model(WAVE[None]).audio_values
    return output


def _spectrogram(model: Any) -> Tensor:
    output: Tensor = model(torch.ones(5, 6))
    return output


def _units(model: Any) -> Tensor:
    output: Tensor = model(torch.tensor([[1, 2, 3]]), torch.tensor([[0]]), torch.tensor([[0]]))[0]
    return output


def _speech(name: str, **options: Any) -> Model:
    def build() -> nn.Module:
        config = getattr(hf, f"{name}Config")(**SPEECH, **options)
        return getattr(hf, f"{name}Model")(config)

    return Model(build, _hidden, "wav2vec2")


def _logits(model: Any) -> Tensor:
    output: Tensor = model(WAVE, decoder_input_ids=torch.tensor([[1, 2]])).logits
    return output


def _speecht5() -> nn.Module:
    renamed = {
        f"{part}_{new}": SPEECH[old]
        for part in ("encoder", "decoder")
        for new, old in [
            ("layers", "num_hidden_layers"),
            ("attention_heads", "num_attention_heads"),
            ("ffn_dim", "intermediate_size"),
        ]
    }
    config = hf.SpeechT5Config(**{**SPEECH, **renamed})
    return hf.SpeechT5ForSpeechToText(config)


def _modeling(family: str, name: str) -> Any:
    return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)


def _unit_vocoder(family: str, name: str, kernel: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(hf, f"{name}Config")(**UNITS, **VOCODER, **{kernel: 3})
        model: nn.Module = _modeling(family, f"{name}CodeHifiGan")(config)
        return model

    return build


def _vits() -> nn.Module:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 16,
        "flow_size": 16,
        "spectrogram_bins": 9,
        "wavenet_layers": 1,
        "prior_encoder_num_wavenet_layers": 1,
        "posterior_encoder_num_wavenet_layers": 1,
        "prior_encoder_num_flows": 2,
        "duration_predictor_num_flows": 1,
        "duration_predictor_filter_channels": 16,
        "depth_separable_num_layers": 1,
    }
    return hf.VitsModel(hf.VitsConfig(vocab_size=10, **sizes, **VOCODER))


def _run_vits(model: Any) -> Tensor:
    torch.manual_seed(0)  # it samples
    output: Tensor = model(torch.tensor([[1, 2, 3]])).waveform
    return output


def _univnet() -> nn.Module:
    config = hf.UnivNetConfig(
        model_in_channels=4,
        model_hidden_channels=4,
        num_mel_bins=6,
        resblock_kernel_sizes=[3],
        resblock_stride_sizes=[2],
        resblock_dilation_sizes=[[1, 3]],
        kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=4,
    )
    return hf.UnivNetModel(config)


def _run_univnet(model: Any) -> Tensor:
    output: Tensor = model(torch.ones(1, 5, 6), noise_sequence=torch.ones(1, 5, 4)).waveforms
    return output


def _encodec() -> nn.Module:
    config = hf.EncodecConfig(
        num_filters=4,
        hidden_size=8,
        num_residual_layers=1,
        upsampling_ratios=[4, 2],
        codebook_size=16,
        codebook_dim=8,
        num_lstm_layers=1,
    )
    return hf.EncodecModel(config)


def _wavtokenizer() -> nn.Module:
    config = hf.WavTokenizerConfig(
        num_filters=4,
        hidden_size=32,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        codebook_size=16,
        codebook_dim=32,
        decoder_hidden_size=32,
        decoder_intermediate_size=16,
        decoder_num_layers=1,
    )
    return hf.WavTokenizerModel(config)


def _mimi() -> nn.Module:
    config = hf.MimiConfig(
        **MIMI,
        codebook_size=16,
        codebook_dim=8,
        num_quantizers=2,
        vector_quantization_hidden_dimension=8,
        num_semantic_quantizers=1,
    )
    return hf.MimiModel(config)


def _pocket_tts() -> nn.Module:
    model: nn.Module = _modeling("pocket_tts_audio_tokenizer", "PocketTTSAudioTokenizerModel")(
        hf.PocketTTSAudioTokenizerConfig(**MIMI, latent_stride=2, latent_dim=4)
    )
    return model


def _xcodec() -> nn.Module:
    config = hf.XcodecConfig(
        target_bandwidths=[4.0],
        codebook_size=16,
        codebook_dim=24,
        acoustic_model_config=hf.DacConfig(**CODEC),
        semantic_model_config=hf.HubertConfig(**SPEECH),
    )
    return hf.XcodecModel(config)


def _mel_vocoder(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(hf, f"{name}Config")(model_in_dim=6, **VOCODER)
        return getattr(hf, name)(config)

    return build


def _dac() -> nn.Module:
    return hf.DacModel(hf.DacConfig(**CODEC))


CONVOLUTIONS = {"types": ["Conv1d", "ConvTranspose1d"]}
VARIANCE = "variance_predictor_kernel_size"


def _in(names: str) -> dict[str, Any]:
    return {**CONVOLUTIONS, "names": names}


TRANSFORMERS: dict[str, Model] = {
    "wav2vec2": _speech("Wav2Vec2"),
    "hubert": _speech("Hubert"),
    "wavlm": _speech("WavLM"),
    "sew": _speech("SEW", squeeze_factor=2),
    "sew_d": _speech("SEWD", squeeze_factor=2, max_position_embeddings=64),
    "unispeech": _speech("UniSpeech"),
    "unispeech_sat": _speech("UniSpeechSat"),
    "wav2vec2_conformer": _speech("Wav2Vec2Conformer", conv_depthwise_kernel_size=3),
    "speecht5": Model(_speecht5, _logits, "wav2vec2"),
    "encodec": Model(_encodec, _audio, _in("{encoder,decoder}.**")),
    "speecht5_hifigan": Model(
        _mel_vocoder("SpeechT5HifiGan"), _spectrogram, CONVOLUTIONS, "", own_remover=False
    ),
    "fastspeech2_hifigan": Model(
        _mel_vocoder("FastSpeech2ConformerHifiGan"),
        _spectrogram,
        CONVOLUTIONS,
        "",
        own_remover=False,
    ),
    "univnet": Model(_univnet, _run_univnet, CONVOLUTIONS, "", own_remover=False),
    "vits": Model(
        _vits, _run_vits, _in("decoder.{upsampler,resblocks}.**"), "decoder", own_remover=False
    ),
    "dac": Model(_dac, _audio, CONVOLUTIONS, "", own_remover=False),
    "wavtokenizer": Model(_wavtokenizer, _audio, _in("encoder_model.encoder.**")),
    "mimi": Model(_mimi, _audio, _in("**.conv"), "each", own_remover=False),
    "pocket_tts": Model(_pocket_tts, _audio, _in("**.conv"), "each", own_remover=False),
    "seamless_m4t": Model(
        _unit_vocoder("seamless_m4t", "SeamlessM4T", VARIANCE),
        _units,
        _in("hifi_gan.**"),
        "",
        own_remover=False,
    ),
    "seamless_m4t_v2": Model(
        _unit_vocoder("seamless_m4t_v2", "SeamlessM4Tv2", VARIANCE),
        _units,
        _in("hifi_gan.**"),
        "",
        own_remover=False,
    ),
    "xcodec": Model(_xcodec, _audio, _in("acoustic_{encoder,decoder}.**"), "", own_remover=True),
}
if not hasattr(hf, "WavTokenizerConfig"):  # it came with transformers 5.24
    del TRANSFORMERS["wavtokenizer"]


def _oobleck() -> nn.Module:
    from diffusers import AutoencoderOobleck

    return AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=2,
        audio_channels=1,
    )


def _styletts2() -> nn.Module:
    from styletts2.Modules.discriminators import DiscriminatorP

    return DiscriminatorP(3)


def _snac() -> nn.Module:
    from snac import SNAC

    return SNAC(
        encoder_dim=4,
        encoder_rates=[2, 2],
        latent_dim=16,
        decoder_dim=16,
        decoder_rates=[2, 2],
        attn_window_size=None,
        codebook_size=8,
        codebook_dim=4,
        vq_strides=[2, 1],
        noise=False,
    )


def _pytorch_tcn() -> nn.Module:
    from pytorch_tcn import TCN

    return TCN(3, [4, 4])


# The layers of the first two carry the legacy hook, those of the last two the parametrization.
LEGACY: dict[str, Model] = {
    "diffusers": Model(
        _oobleck, lambda model: model.decoder(WAVE[None, :, :64].view(1, 2, 32)), None
    ),
    "styletts2": Model(_styletts2, lambda model: model(WAVE[None])[0], None),
}
PARAMETRIZED: dict[str, Model] = {
    "snac": Model(_snac, lambda model: model(WAVE[None])[0], None),
    "pytorch_tcn": Model(_pytorch_tcn, lambda model: model(WAVE[:, :60].view(1, 3, 20)), None),
}
