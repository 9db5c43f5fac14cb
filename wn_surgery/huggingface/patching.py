"""Patching a model by a config, replaying the sites of one, and taking weight norm off again."""

from __future__ import annotations

import copy
from importlib import import_module
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import wn_surgery as wn
from wn_surgery.huggingface import config as configs
from wn_surgery.huggingface import conversions, embeddings
from wn_surgery.huggingface.adapters import without_adapters
from wn_surgery.huggingface.config import ConfigLike, WeightNormConfig, fill_in, recorded
from wn_surgery.huggingface.generation import fold_while_generating
from wn_surgery.huggingface.usual import rules_for
from wn_surgery.model import records, reloading
from wn_surgery.model.sites import normed
from wn_surgery.model.state_keys import keys_of
from wn_surgery.rules.sources import Rule

__all__ = ["freeze", "patch_model", "put", "repair", "unpatch_model"]


def patch_model(model: nn.Module, config: ConfigLike = None, *, optimizers: Any = ()) -> wn.Report:
    """Put weight norm on a model, note in its config where, and return what was done.

    ``model.save_pretrained(folder)`` then saves g and v, and ``from_pretrained(folder)`` gives the
    patched model back wherever ``wn_surgery.huggingface`` has been imported.

    Args:
        model: any model of transformers or diffusers; its outputs stay as they are (bit for bit in
            float32).
        config: a :class:`WeightNormConfig`, or its rules: a rule, a list of rules or dicts, a
            file, or a preset's name; None for :func:`rules_for` the model, if it is of
            transformers. A config that has sites already, from another model of the same kind, is
            replayed instead.
        optimizers: optimizers that hold the weights, which get g and v in their place.

    Returns:
        What was done. ``model.config`` is now a copy that no other model shares, and
        ``model.config.quantization_config`` the config with its sites.

    Raises:
        WeightNormError: the rules do not fit the model; see :func:`wn_surgery.apply`. The model is
            quantized, or its config says it will be. The config is of another kind of model.
        RuleError: the rules are wrong, or None for a model type that has no usual ones.
        TypeError: ``model`` is not a model of transformers or diffusers.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from wn_surgery.huggingface import patch_model
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> len(patch_model(model).changed)
        6
        >>> model.config.quantization_config.sites[0]["name"]
        'encoder.layer.0.attention.self.query.weight'
    """
    if (library := reloading.is_model_of(model)) not in configs.PATCHED:
        raise TypeError(
            f"expected a model of transformers or diffusers, got {type(model).__name__}; for any "
            "other module there is wn_surgery.apply(model, rules)"
        )
    if library == "diffusers":
        import_module("wn_surgery.huggingface.diffusion").register()  # or raise, if it is too old
    config = configs.as_config(config)
    held = recorded(model.config)
    _refuse_quantized(model, held)
    model_type = configs.type_of(model)
    if config.sites is not None and config.model_type not in (None, model_type):
        raise wn.UnmatchedRuleError(
            f"the config was made for a {config.model_type} model, this is a {model_type}; "
            "patch it with WeightNormConfig(rules=[...]) of its own"
        )
    # The note may be that of another model, with sites that this one does not have.
    there = {site["name"] for site in records.record(model)}
    before = [site for site in (held.sites if held else None) or () if site["name"] in there]
    noted = copy.deepcopy(config)
    report = put(model, noted, optimizers=optimizers)
    conversions.drop_ours(model)  # those left by a checkpoint or by unpatch_model()
    noted.sites = fill_in(noted.sites, before)
    configs.put_note(model, noted)
    return report


def unpatch_model(model: nn.Module, *, optimizers: Any = ()) -> wn.Report:
    """Take all weight norm off a model, bit for bit, forget the config, and return what was done.

    This includes the weight norm that a model of transformers puts on itself, in either layout of
    torch: the vocoders and codecs whose own ``remove_weight_norm()`` raises (docs/huggingface.md).
    Where the class puts it on when it is built, ``model.save_pretrained`` still writes g and v, so
    that the checkpoint loads as before. So does that of a model of diffusers, of a
    ``PyTorchModelHubMixin``, and of a model of which this is a part.

    Args:
        model: any module.
        optimizers: optimizers that hold g and v, which get the weight in their place.

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
    foreign = not all(key.site.ours for key in keys)
    # A model with our weight norm reads plain weights. But diffusers reads key by key, without
    # calling the hooks of modules.
    library = reloading.is_model_of(model)
    if foreign or library == "diffusers":
        reloading.save_as_built(model)
    if isinstance(model, PreTrainedModel):
        conversions.save_as_built(model, [key.weight for key in keys])
        embeddings.unfollow(model)
    if library in configs.PATCHED and recorded(model.config) is not None:
        configs.put_note(model, None)
    return report


def repair(model: nn.Module) -> nn.Module:
    """Make the model's own ``remove_weight_norm()`` methods work on this instance, and return it.

    Each module in it that has such a method gets one that removes its weight norm in any layout.
    The classes are not changed, and copies of the model have the new methods too.

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


def _refuse_quantized(model: nn.Module, ours: WeightNormConfig | None) -> None:
    held = getattr(model.config, "quantization_config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    idle = isinstance(getattr(quantizer, "quantization_config", None), WeightNormConfig)
    if (quantizer is None or idle) and (held is None or ours is not None):
        return
    method = held.get("quant_method") if isinstance(held, dict) else type(held).__name__
    raise wn.ModelError(
        f"{type(model).__name__} is quantized ({method}); patch the model before it is quantized, "
        "train, unpatch_model(), and quantize then",
        kind="quantized",
    )


def put(
    model: nn.Module, config: WeightNormConfig, *, replace: bool = False, optimizers: Any = ()
) -> wn.Report:
    """Put weight norm on a model by a config, and write into the config what was put where.

    With ``replace``, sites are replayed over weight norm that the model's class has put on with
    other options. If this raises, neither model nor config has changed.
    """
    model_type = configs.type_of(model)
    if config.sites is not None:
        rules, meant = tuple(_replayed(model, config, replace)), config.rules
    else:
        meant = rules_for(model) if config.rules is None else config.rules
        rules = without_adapters(model, meant)
    tied = embeddings.ties_of(model)
    of_g = [_of_g(step) for step in wn.plan(model, rules).steps]
    report = wn.apply(model, rules, optimizers=optimizers)
    embeddings.follow(model, tied)
    fold_while_generating(model)
    config.rules, config.model_type = meant, model_type
    config.sites = fill_in(records.record(model), of_g)
    return report


def _of_g(step: wn.Step) -> dict[str, Any]:
    """Return what a rule says about the g of a site, where it is not just the weight's norm."""
    said: dict[str, Any] = {"name": step.site.name}
    if step.rule and step.rule.g_init is not None:
        said["g_init"] = step.rule.g_init
    if step.rule and not step.rule.train_g:
        said["train_g"] = False
    return said


def freeze(model: nn.Module, config: WeightNormConfig) -> None:
    """Freeze each g that the config says is not trained: loading makes new Parameters."""
    frozen = {site["name"] for site in config.sites or () if not site.get("train_g", True)}
    for site in normed(model):
        if site.name in frozen:
            site.held.g.requires_grad_(False)


def _replayed(model: nn.Module, config: WeightNormConfig, replace: bool) -> list[Rule]:
    """Return rules for the sites that a config names, and for no others.

    In transformers a body loads the checkpoint of the whole model, and the other way round. Then
    the names differ by the body's prefix, and the sites of a head may be absent.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for site in wn.sites(model) for name in site.names}
    body = f"{getattr(model, 'base_model_prefix', '')}."
    found: list[dict[str, Any]] = []
    lacking: list[str] = []
    for site in config.sites or ():
        name = site["name"]
        here = [n for n in (name, name.removeprefix(body), f"{body}{name}") if n in known]
        if here:
            found.append({**site, "name": here[0]})
        else:
            lacking.append(name)
    whole = getattr(model.config, "architectures", None) or ()
    part = isinstance(model, PreTrainedModel) and type(model).__name__ not in whole
    if lacking and not (part and found):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise wn.UnmatchedRuleError(
            f"the weight-norm config names {lacking[0]}{more}, which {type(model).__name__} does "
            "not have; it is of another model, or of another release of its library"
        )
    return records.replay(found, replace=replace)
