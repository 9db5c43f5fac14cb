"""The note in a model's config that says where weight norm is, and a config for each model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

import wn_surgery as wn
from wn_surgery.huggingface.bases import PreTrainedConfig, PreTrainedModel
from wn_surgery.huggingface.config import WeightNormConfig, recorded
from wn_surgery.huggingface.conversions import built_in
from wn_surgery.huggingface.embeddings import follows, is_g_frozen, ties_of
from wn_surgery.huggingface.guard import guard, unguard
from wn_surgery.model import records
from wn_surgery.model.reloading import match
from wn_surgery.model.state_keys import Keys
from wn_surgery.norm.savers import Layouts

__all__ = ["forget", "joined", "note", "of_its_own", "write"]

# What a site says of its g, beside what records.record() says of the weight norm.
_OF_G = ("g_init", "train_g")


def of_its_own(model: nn.Module) -> None:
    """Give a model a config that no other model has.

    Models that are made from one config object share it, and a part of a model has that of the
    whole, or a part of it. What the one notes there would be said of the other.
    """
    config: Any = model.config
    copies: dict[int, Any] = {}
    own = copy.deepcopy(config, copies)
    for part in _nested(own):
        forget(part)  # of a part that was patched by itself: what counts is the whole's
    for module in model.modules():
        held = vars(module)
        # Whatever it is called there; a part of the config goes over to its copy.
        for name, value in list(held.items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                held[name] = copies[id(value)]


def write(config: Any, said: WeightNormConfig) -> None:
    """Note in a model's config where weight norm is."""
    config.quantization_config = said
    guard(config)


def forget(config: Any) -> None:
    """Take the note out of a model's config, where there is one."""
    if recorded(config) is not None:
        vars(config).pop("quantization_config")
        unguard(config)


def joined(
    sites: Iterable[Mapping[str, Any]] | None, more: Iterable[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The sites, with what is said of g elsewhere, unless they say it."""
    known = {site["name"]: {key: site[key] for key in _OF_G if key in site} for site in more or ()}
    return [{**site, **known.get(site["name"], {}), **site} for site in sites or ()]


def note(model: PreTrainedModel, call: Mapping[str, Any], ours: list[Keys]) -> Layouts:
    """See that the folder which ``model.save_pretrained`` is writing says where weight norm is.

    It does for a model that :func:`patch_model` has patched. For one that got weight norm by
    ``wn_surgery.apply``, for a part of a patched model and for a whole of which a part was
    patched, the model's config says nothing or speaks of other names. Then that of the folder is
    written once more. The model's own stays as it is: the whole may share it.

    Args:
        model: what is saved.
        call: the variables of its ``save_pretrained``, which has written the config by now.
        ours: the weight norm of this library that it has.

    Returns:
        Which weights have to be saved in another layout than theirs.

    Raises:
        CheckpointMismatchError: nothing can be noted, or the class computes other weights.
        ModelError: the config speaks of another quantization.
    """
    if call.get("_hf_peft_config_loaded"):
        return {}  # adapters alone are saved, and no config
    held = recorded(model.config)
    noted = {site["name"]: site for site in (held.sites if held else None) or ()}
    sites = {site["name"]: site for site in records.record(model)}
    if _bare(noted) == _bare(sites):
        return {}
    tied = {name for pair in ties_of(model).items() for name in pair}
    if not follows(model) and (ends := [name for name in sites if name in tied]):
        raise wn.CheckpointMismatchError(
            f"{type(model).__name__} ties {ends[0]}, which has weight norm, and cannot save g and "
            "v of a tie that it does not know: use wn_surgery.huggingface.patch_model(model, "
            "rules) instead of wn_surgery.apply, or call wn_surgery.remove(model) before saving"
        )
    built = {key.weight: key for key in built_in(model)}
    # What the class puts on itself is not noted, unless it was: it loads without this library.
    kept = [site for name, site in sites.items() if name not in built or name in noted]
    if kept or held is not None:
        _write_into(model, call, held, kept)
    return match(model, ours, built)


def _write_into(
    model: PreTrainedModel,
    call: Mapping[str, Any],
    held: WeightNormConfig | None,
    sites: list[dict[str, Any]],
) -> None:
    name = type(model).__name__
    if held is None and getattr(model.config, "quantization_config", None) is not None:
        raise wn.ModelError(
            f"the config of {name} speaks of a quantization, and cannot say as well where weight "
            "norm is; call wn_surgery.remove(model) before saving",
            kind="quantized",
        )
    folder = call.get("save_directory")
    if folder is None:
        raise wn.CheckpointMismatchError(
            f"{name} has weight norm on {sites[0]['name'] if sites else 'a part'} which its config "
            "does not speak of, and would be reloaded without: use "
            "wn_surgery.huggingface.patch_model(model, rules) instead of wn_surgery.apply, or call "
            "wn_surgery.remove(model) before saving"
        )
    config = copy.deepcopy(model.config)
    for each in (config, *_nested(config)):
        forget(each)
    if sites:
        frozen = [
            {"name": site.name, "train_g": False} for site in wn.sites(model) if is_g_frozen(site)
        ]
        said = joined(joined(sites, held.sites if held else None), frozen)
        rules = held.rules if held else None
        write(config, WeightNormConfig(rules, said, config.model_type))
    if call.get("is_main_process", True) and call.get("save_on_this_rank", True):
        config.save_pretrained(folder)


def _bare(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sites without what they say of g."""
    return {
        name: {key: value for key, value in site.items() if key not in _OF_G}
        for name, site in sites.items()
    }


def _nested(config: Any) -> Iterator[Any]:
    """The configs of the parts of a model, in its own."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _nested(value)
