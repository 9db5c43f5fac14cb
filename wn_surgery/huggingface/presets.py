"""The rules that are usual for a model type."""

from __future__ import annotations

from typing import Any

from wn_surgery.errors import RuleError
from wn_surgery.rules.fields import did_you_mean
from wn_surgery.rules.sources import Rule, as_rules

__all__ = ["rules_for"]

# Every projection of attention and of the MLP, and nothing else: no embedding, head or norm.
_PROJECTIONS: dict[str, Any] = {
    "names": [
        "**.{self_attn,self_attention,attn,attention,mlp,feed_forward}.**",
        "**.{q,k,v,o,gate,up,down}_proj",
    ],
    "types": ["Linear", "transformers.pytorch_utils.Conv1D"],
    "dim": "out",
}
# The convolutions of vocoders and codecs, dim=0 as their own apply_weight_norm() has it.
_CONVOLUTIONS: dict[str, Any] = {"types": ["Conv1d", "ConvTranspose1d"]}

_DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("gpt2", "gpt_neox", "gptj", "opt", "falcon", "olmo", "olmo2", "smollm3"),
)
_VOCODERS = (
    *("speecht5_hifigan", "hifigan", "fastspeech2_conformer_hifigan", "univnet", "vits"),
    *("encodec", "dac", "mimi", "xcodec", "snac"),
)
_OTHERS: dict[str, dict[str, Any]] = {
    # The positional convolution keeps one norm for each tap of the kernel (arXiv:2006.11477).
    "wav2vec2": {"names": "**.pos_conv_embed.conv", "dim": 2},
    "hubert": {"names": "**.pos_conv_embed.conv", "dim": 2},
    "wavlm": {"names": "**.pos_conv_embed.conv", "dim": 2},
    "bert": {"names": "**.encoder.layer.*.**", "types": "Linear"},
    "roberta": {"names": "**.encoder.layer.*.**", "types": "Linear"},
    "vit": {"names": "**.{encoder.layer,layers}.*.**", "types": "Linear"},
    "dinov2": {"names": "**.encoder.layer.*.**", "types": "Linear"},
    "t5": {"names": "**.block.*.layer.*.**", "types": "Linear"},
}


def rules_for(model_type: str) -> tuple[Rule, ...]:
    """The preset for a model type: ``model.config.model_type``.

    For decoders every attention and MLP projection, for encoders the linear layers of their
    blocks, for vocoders and codecs every convolution, for wav2vec2 and its kin the positional
    convolution. Embeddings and heads are left as they are; for a classifier of ViT or DINOv2 there
    is the preset ``"dino-head"``.

    Args:
        model_type: as transformers names it.

    Returns:
        The rules.

    Raises:
        RuleError: there is no preset for it.

    Example:
        >>> from wn_surgery.huggingface import rules_for
        >>> print(rules_for("wav2vec2")[0].describe())
        apply names=**.pos_conv_embed.conv dim=2
    """
    if model_type in _DECODERS:
        return as_rules(_PROJECTIONS)
    if model_type in _VOCODERS:
        return as_rules(_CONVOLUTIONS)
    if model_type in _OTHERS:
        return as_rules(_OTHERS[model_type])
    known = [*_DECODERS, *_VOCODERS, *_OTHERS]
    raise RuleError(
        f"there are no usual rules for model type {model_type!r}"
        f"{did_you_mean(model_type, known)}; give the rules: patch_model(model, [{{...}}])"
    )
