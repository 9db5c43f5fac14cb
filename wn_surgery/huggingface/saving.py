"""Saving: checkpoints that load without this library, and a note of weight norm in every other."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

import wn_surgery as wn
from wn_surgery.huggingface.config import (
    PATCHED,
    WeightNormConfig,
    fill_in,
    forget,
    nested,
    put_note,
    recorded,
    write,
)
from wn_surgery.huggingface.conversions import built_in
from wn_surgery.huggingface.embeddings import follows, frozen_g, ties_of
from wn_surgery.model import records, reloading
from wn_surgery.model.reloading import is_model_of, match
from wn_surgery.model.state_keys import Keys, keys_of, stripped
from wn_surgery.norm.savers import Layouts

__all__ = ["note", "save_pretrained"]


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    layout: Literal["parametrized", "plain"] = "parametrized",
    **kwargs: Any,
) -> None:
    """Call ``model.save_pretrained(folder)`` in a layout to choose; the model is not changed.

    Args:
        model: of transformers or diffusers, patched or not.
        folder: where to.
        layout: ``"parametrized"`` is what ``model.save_pretrained`` does itself. ``"plain"`` saves
            the weights that were put under weight norm by :func:`patch_model` or
            ``wn_surgery.apply``, and a config without the note of it. Weight norm that the
            model's class puts on when it is built stays g and v, which is what that class loads.
        kwargs: to ``model.save_pretrained``, such as ``max_shard_size``.

    Raises:
        ValueError: ``layout`` is none of these.
        TypeError: ``model`` is not a model of transformers or diffusers.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from wn_surgery.huggingface import patch_model, save_pretrained
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> _ = patch_model(model)
        >>> folder = tempfile.mkdtemp()
        >>> save_pretrained(model, folder, layout="plain")
        >>> hasattr(BertModel.from_pretrained(folder).config, "quantization_config")
        False
    """
    if layout not in ("parametrized", "plain"):
        raise ValueError(f"layout={layout!r}; expected 'parametrized' or 'plain'")
    if is_model_of(model) not in PATCHED:
        raise TypeError(
            f"expected a model of transformers or diffusers, got {type(model).__name__}; any other "
            "model's own save_pretrained() saves what its class reads"
        )
    if layout == "parametrized":
        model.save_pretrained(folder, **kwargs)
    elif isinstance(model, PreTrainedModel):
        _save_plain(model, folder, kwargs)
    else:
        held = recorded(model.config)
        put_note(model, None)
        try:
            with warnings.catch_warnings():
                # That what no config names is saved plain, which is what was asked for.
                warnings.filterwarnings("ignore", f".*{re.escape(reloading.UNNAMED)}", UserWarning)
                model.save_pretrained(folder, **kwargs)
        finally:
            put_note(model, held)


def _save_plain(model: PreTrainedModel, folder: str | Path, kwargs: dict[str, Any]) -> None:
    held = recorded(model.config)
    ours = [key for key in keys_of(model) if key.site.ours]
    built = {key.weight for key in built_in(model)} if ours else set()
    state = stripped(model.state_dict(), [key for key in ours if key.weight not in built])
    forget(model.config)
    try:
        model.save_pretrained(folder, state_dict=state, **kwargs)
    finally:
        if held is not None:
            write(model.config, held)


def note(model: PreTrainedModel, call: Mapping[str, Any], ours: list[Keys]) -> Layouts:
    """Note weight norm in the folder that ``save_pretrained`` writes; return layouts to change.

    For a model that got weight norm by ``wn_surgery.apply``, a part of a patched model, or a whole
    of which a part was patched, the config has no note or other names. Then the folder's config is
    written once more; the model's own stays as it is, since the whole may share it. ``call`` has
    the variables of the model's ``save_pretrained``, which has written the config by now.
    """
    if call.get("_hf_peft_config_loaded"):
        return {}  # adapters alone are saved, and no config
    held = recorded(model.config)
    noted = {site["name"]: site for site in (held.sites if held else None) or ()}
    sites = {site["name"]: site for site in records.record(model)}
    if records.bare(noted.values()) == records.bare(sites.values()):
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
        _write_into(model, call, kept)
    return match(model, ours, built)


def _write_into(model: PreTrainedModel, call: Mapping[str, Any], sites: list[Any]) -> None:
    name, held = type(model).__name__, recorded(model.config)
    if held is None and getattr(model.config, "quantization_config", None) is not None:
        raise wn.ModelError(
            f"the config of {name} has a quantization, and no place to say where weight norm is; "
            "call wn_surgery.remove(model) before saving",
            kind="quantized",
        )
    folder = call.get("save_directory")
    if folder is None:
        raise wn.CheckpointMismatchError(
            f"{name} has weight norm on {sites[0]['name'] if sites else 'a part'} which its config "
            "does not name, and would be reloaded without: use wn_surgery.huggingface."
            "patch_model(model, rules) instead of wn_surgery.apply, or remove it before saving"
        )
    config = copy.deepcopy(model.config)
    for each in (config, *nested(config)):
        forget(each)
    if sites:
        frozen = [{"name": name, "train_g": False} for name in frozen_g(model)]
        said = fill_in(fill_in(sites, held.sites if held else None), frozen)
        write(config, WeightNormConfig(held.rules if held else None, said, config.model_type))
    if call.get("is_main_process", True) and call.get("save_on_this_rank", True):
        config.save_pretrained(folder)
