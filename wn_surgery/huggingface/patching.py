"""Patching a model by config, and taking every kind of weight norm off again."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import nn

import wn_surgery as wn
from wn_surgery.huggingface import embeddings, noting
from wn_surgery.huggingface.bases import PreTrainedModel
from wn_surgery.huggingface.config import ConfigLike, as_config, recorded
from wn_surgery.huggingface.conversions import is_ours, save_as_built
from wn_surgery.huggingface.placing import put
from wn_surgery.model import records, reloading
from wn_surgery.model.state_keys import keys_of

__all__ = ["patch_model", "repair", "unpatch_model"]


def patch_model(model: PreTrainedModel, config: ConfigLike = None) -> wn.Report:
    """Put weight norm on a model, and note in its config where.

    ``model.save_pretrained(folder)`` then saves g and v, and ``from_pretrained(folder)`` gives the
    patched model back wherever ``wn_surgery.huggingface`` has been imported.

    Args:
        model: any model of transformers; its outputs stay as they are (bit for bit in float32).
        config: a :class:`WeightNormConfig`, or its rules: a rule, a list of rules or dicts, a
            file, or a preset's name; None for :func:`rules_for` the model's type. A config that
            has sites already, from another model of the same kind, is replayed instead.

    Returns:
        What was done. ``model.config`` is a copy from now on, which no other model has, and
        ``model.config.quantization_config`` the config with its sites.

    Raises:
        WeightNormError: the rules do not fit the model; see :func:`wn_surgery.apply`.
        RuleError: the rules are wrong, or None for a model type that has no usual ones.
        ModelError: the model is quantized, or its config says it will be.
        UnmatchedRuleError: the config is of another kind of model. Nothing has changed then.
        TypeError: ``model`` is not a model of transformers.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from wn_surgery.huggingface import patch_model
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                   intermediate_size=16, vocab_size=20)
        >>> model = BertModel(tiny)
        >>> len(patch_model(model).changed)
        6
        >>> model.config.quantization_config.sites[0]["name"]
        'encoder.layer.0.attention.self.query.weight'
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a model of transformers, got {type(model).__name__}; for any other module "
            "there is wn_surgery.apply(model, rules)"
        )
    config = as_config(config)
    _refuse_quantized(model)
    model_type = model.config.model_type
    tied = embeddings.ties_of(model)
    if config.sites is not None and config.model_type not in (None, model_type):
        raise wn.UnmatchedRuleError(
            f"the config was made for a {config.model_type} model, this is a {model_type}; "
            "patch it with WeightNormConfig(rules=[...]) of its own"
        )
    held = recorded(model.config)
    # The config may be that of another model, and speak of what this one does not have.
    there = {site["name"] for site in records.record(model)}
    before = [site for site in (held.sites if held else None) or () if site["name"] in there]
    noted = copy.deepcopy(config)
    report = put(model, noted)
    embeddings.follow(model, tied)
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        # Left by a checkpoint or by unpatch_model(): saving would undo what has just been done.
        kept: Any = [each for each in conversions if not is_ours(each)]
        model._weight_conversions = kept
    noted.sites = noting.joined(noted.sites, before)
    noting.of_its_own(model)
    noting.write(model.config, noted)
    return report


def unpatch_model(model: nn.Module, *, optimizers: Any = ()) -> wn.Report:
    """Take all weight norm off a model, bit for bit, and forget the config.

    Also the weight norm that a model of transformers puts on itself, in whichever form of torch:
    the vocoders and codecs whose own ``remove_weight_norm()`` raises (docs/huggingface.md). Where
    the class puts it on when it is built, ``model.save_pretrained`` goes on writing g and v, so
    that the checkpoint loads as ever; also for a model of diffusers or a ``PyTorchModelHubMixin``,
    and for a model of which this is a part.

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
    keys = keys_of(model)
    report = wn.remove(model, optimizers=optimizers)
    foreign = any(not key.site.ours for key in keys)
    # Ours reads plain weights, but diffusers reads key by key, past the hooks of modules.
    if foreign or reloading.is_model_of(model) == "diffusers":
        reloading.save_as_built(model)
    if isinstance(model, PreTrainedModel):
        save_as_built(model, [key.weight for key in keys])
        embeddings.unfollow(model)
        if recorded(model.config) is not None:
            noting.of_its_own(model)
            noting.forget(model.config)
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
        held is None or recorded(model.config) is not None
    ):
        return
    method = held.get("quant_method") if isinstance(held, dict) else type(held).__name__
    raise wn.ModelError(
        f"{type(model).__name__} is quantized ({method}); patch the model before it is quantized, "
        "train, unpatch_model(), and quantize then",
        kind="quantized",
    )
