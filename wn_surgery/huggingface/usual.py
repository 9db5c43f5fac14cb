"""The usual rules for a model: from a table of model types, or from how the model is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wn_surgery.errors import RuleError
from wn_surgery.huggingface.config import type_of
from wn_surgery.rules.fields import did_you_mean
from wn_surgery.rules.presets import preset
from wn_surgery.rules.sources import Rule, as_rules

__all__ = ["rules_for"]

_LINEAR: dict[str, Any] = {"types": ["Linear", "transformers.pytorch_utils.Conv1D"], "dim": "out"}
# Every projection of attention and of the MLP; no embedding, head or norm.
_PROJECTIONS: dict[str, Any] = {
    "names": [
        "**.{self_attn,self_attention,attn,attention,mlp,feed_forward}.**",
        "**.{q,k,v,o,gate,up,down}_proj",
    ],
    **_LINEAR,
}
_BLOCKS: dict[str, Any] = {"names": "**.encoder.layer.*.**", "types": "Linear"}
_DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("gpt2", "gpt_neox", "gptj", "opt", "falcon", "olmo", "olmo2", "smollm3"),
)
_VOCODERS = (
    *("speecht5_hifigan", "hifigan", "fastspeech2_conformer_hifigan", "univnet"),
    *("xcodec", "snac"),
)
_RULES: dict[str, str | dict[str, Any]] = {
    **dict.fromkeys(_DECODERS, _PROJECTIONS),
    **dict.fromkeys(_VOCODERS, "hifigan"),
    **{name: name for name in ("vits", "encodec", "dac", "mimi")},
    **dict.fromkeys(["wav2vec2", "hubert", "wavlm"], "wav2vec2"),
    **dict.fromkeys(["bert", "roberta", "dinov2"], _BLOCKS),
    "vit": {"names": "**.{encoder.layer,layers}.*.**", "types": "Linear"},
    "t5": {"names": "**.block.*.layer.*.**", "types": "Linear"},
}
# What chooses experts: its outputs are compared with each other, and mean nothing else.
_ROUTERS = ["**.{router,gate,gating,shared_expert_gate}", "**.{router,gate,gating}.**"]


def rules_for(model: nn.Module | str) -> tuple[Rule, ...]:
    """Return the usual rules for a model, or for a model type of the table below.

    For decoders every attention and MLP projection, for encoders the linear layers of their
    blocks, for vocoders and codecs the preset of their paper (``"hifigan"``, ``"vits"``,
    ``"encodec"``, ``"dac"``, ``"mimi"``), for wav2vec2, HuBERT and WavLM the positional convolution
    (preset ``"wav2vec2"``). For a model of any other type, every linear layer inside its repeated
    blocks, except routers of experts. Embeddings, heads and norms are left as they are; for a
    classifier of ViT or DINOv2 there is the preset ``"dino-head"``. ``print(wn_surgery.plan(model,
    rules_for(model)))`` shows what they change.

    Args:
        model: a model of transformers; or a ``model.config.model_type``, for the types with rules
            of their own.

    Raises:
        RuleError: there are none: it is not a model of transformers, or it has no repeated blocks
            with linear layers in them.

    Example:
        >>> from transformers import DistilBertConfig, DistilBertModel
        >>> from wn_surgery.huggingface import rules_for
        >>> print(rules_for("bert")[0].describe())
        apply types=Linear names=**.encoder.layer.*.**
        >>> model = DistilBertModel(DistilBertConfig(dim=8, hidden_dim=8, n_heads=2, n_layers=1))
        >>> rules_for(model)[0].names
        ('transformer.layer.*.**',)
    """
    model_type = model if isinstance(model, str) else type_of(model)
    rules = _RULES.get(model_type)
    if isinstance(rules, str):
        return preset(rules)
    if rules is not None:
        return as_rules(rules)
    if isinstance(model, str):
        raise RuleError(
            f"there are no usual rules for model type {model_type!r}"
            f"{did_you_mean(model_type, _RULES)}; give the model: rules_for(model), which looks at "
            "how it is built"
        )
    lists = list(_block_lists(model)) if isinstance(model, PreTrainedModel) else []
    if not lists:
        raise RuleError(
            f"there are no usual rules for model type {model_type!r}: {type(model).__name__} is "
            "not a model of transformers with repeated blocks that have linear layers; give the "
            "rules: patch_model(model, [{...}])"
        )
    names = [f"{path}.*.**" for path in lists]
    label = f"usual rules for {model_type}, from its repeated blocks"
    return (Rule(names=names, exclude_names=_ROUTERS, label=label, **_LINEAR),)


def _block_lists(model: PreTrainedModel) -> Iterator[str]:
    """Yield the paths of the outermost lists of blocks with linear layers, heads excluded."""
    body = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    if not isinstance(body, nn.Module) or body is model:
        yield from _below(model, "")
        return
    path = next(name for name, module in model.named_modules() if module is body)
    yield from _below(body, f"{path}.")


def _below(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        # A list of bare layers is an MLP or a set of heads.
        blocks = list(child) if isinstance(child, nn.ModuleList) else []
        if blocks and all(any(block.children()) for block in blocks) and _has_linear(child):
            yield f"{prefix}{name}"
        else:
            yield from _below(child, f"{prefix}{name}.")


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(each, nn.Linear | Conv1D) for each in module.modules())
