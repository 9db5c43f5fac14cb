"""Patching a model by config, and taking every kind of weight norm off again."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import nn

import wn_surgery as wn
from wn_surgery.state_keys import keys_of

from . import ties
from .bases import PreTrainedModel
from .config import WeightNormConfig
from .conversions import is_ours, save_as_built
from .guard import guard, unguard
from .placing import joined, put

__all__ = ["patch_model", "repair", "unpatch_model"]


def patch_model(model: PreTrainedModel, config: WeightNormConfig) -> wn.Report:
    """Put weight norm on a model, and note in its config where.

    ``model.save_pretrained(folder)`` then saves g and v, and ``from_pretrained(folder)`` gives the
    patched model back wherever ``wn_surgery.huggingface`` has been imported.

    Args:
        model: any model of transformers; its outputs stay as they are (bit for bit in float32).
        config: its rules are applied; one that has sites already, from another model of the same
            kind, is replayed instead.

    Returns:
        What was done. ``model.config.quantization_config`` is the config with its sites.

    Raises:
        WeightNormError: the rules do not fit the model; see :func:`wn_surgery.apply`.
        QuantizedWeightError: the model is quantized, or its config says it will be.
        UnmatchedRuleError: the config is of another kind of model. Nothing has changed then.
        TypeError: ``model`` is not a model of transformers.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from wn_surgery.huggingface import WeightNormConfig, patch_model
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                   intermediate_size=16, vocab_size=20)
        >>> model = BertModel(tiny)
        >>> len(patch_model(model, WeightNormConfig()).changed)
        6
        >>> model.config.quantization_config.sites[0]["name"]
        'encoder.layer.0.attention.self.query.weight'
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a model of transformers, got {type(model).__name__}; for any other module "
            "there is wn_surgery.apply(model, rules)"
        )
    _refuse_quantized(model)
    model_type = model.config.model_type
    tied = ties.ties_of(model)
    if config.sites is not None and config.model_type not in (None, model_type):
        raise wn.UnmatchedRuleError(
            f"the config was made for a {config.model_type} model, this is a {model_type}; "
            "patch it with WeightNormConfig(rules=[...]) of its own"
        )
    held = getattr(model.config, "quantization_config", None)
    noted = copy.deepcopy(config)
    report = put(model, noted)
    ties.follow(model, tied)
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        # Left by a checkpoint or by unpatch_model(): saving would undo what has just been done.
        kept: Any = [each for each in conversions if not is_ours(each)]
        model._weight_conversions = kept
    if isinstance(held, WeightNormConfig):
        noted.sites = joined(noted.sites, held.sites)
    model.config.quantization_config = noted
    guard(model.config)
    return report


def unpatch_model(model: nn.Module, *, optimizers: Any = ()) -> wn.Report:
    """Take all weight norm off a model, bit for bit, and forget the config.

    Also the weight norm that a model of transformers puts on itself, in whichever form of torch:
    the vocoders and codecs whose own ``remove_weight_norm()`` raises (docs/huggingface.md). Where
    the class puts it on when it is built, ``model.save_pretrained`` goes on writing g and v, so
    that the checkpoint loads as ever.

    Args:
        model: any module.
        optimizers: optimizers that hold g and v, which get the weight in their place.

    Returns:
        What was done.

    Raises:
        WeightNormError: as :func:`wn_surgery.remove` does.

    Example:
        >>> from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
        >>> from wn_surgery.huggingface import unpatch_model
        >>> vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=32))
        >>> vocoder.apply_weight_norm()
        >>> len(unpatch_model(vocoder).changed)
        78
    """
    weights = [key.weight for key in keys_of(model)]
    report = wn.remove(model, optimizers=optimizers)
    if isinstance(model, PreTrainedModel):
        save_as_built(model, weights)
        ties.unfollow(model)
        if isinstance(getattr(model.config, "quantization_config", None), WeightNormConfig):
            vars(model.config).pop("quantization_config")
            unguard(model.config)
    return report


def repair(model: nn.Module) -> nn.Module:
    """Make the model's own ``remove_weight_norm()`` methods work, on this instance.

    Each module below that has such a method gets one that removes its weight norm in whichever
    form it is. The classes are not changed, and copies of the model have it too.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        TypeError: no module has a ``remove_weight_norm`` method.

    Example:
        >>> from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
        >>> from wn_surgery.huggingface import repair
        >>> vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=32))
        >>> vocoder.apply_weight_norm()
        >>> repair(vocoder).remove_weight_norm()
    """
    found = [module for module in model.modules() if hasattr(type(module), "remove_weight_norm")]
    if not found:
        raise TypeError(f"no module of {type(model).__name__} has a remove_weight_norm() method")
    for module in found:
        vars(module)["remove_weight_norm"] = MethodType(_remove_weight_norm, module)
    return model


def _remove_weight_norm(module: nn.Module) -> None:
    wn.remove(module)


def _refuse_quantized(model: PreTrainedModel) -> None:
    held = getattr(model.config, "quantization_config", None)
    if getattr(model, "hf_quantizer", None) is None and (
        held is None or isinstance(held, WeightNormConfig)
    ):
        return
    method = held.get("quant_method") if isinstance(held, dict) else type(held).__name__
    raise wn.QuantizedWeightError(
        f"{type(model).__name__} is quantized ({method}); patch the model before it is quantized, "
        "train, unpatch_model(), and quantize then"
    )
