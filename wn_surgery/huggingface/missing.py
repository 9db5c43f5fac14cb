"""Weights that a checkpoint lacks: drawn as the model's class does, and g and v made of them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import wn_surgery as wn
from wn_surgery.huggingface.bases import PreTrainedModel
from wn_surgery.huggingface.config import WeightNormConfig
from wn_surgery.model.sites import NormedSite, normed

__all__ = ["draw_missing", "forget_missing"]

_INITIALIZE = "initialize_weights"
# The mark by which transformers knows what it has read.
_READ = "_is_hf_initialized"


def draw_missing(model: PreTrainedModel, config: WeightNormConfig) -> None:
    """Have ``from_pretrained`` initialize a g and v that it does not find, or of another shape.

    It asks the model's class to write into ``layer.weight``. Of a weight-normed layer that is a
    tensor just computed, and g and v would stay as they happen to be in memory.
    """
    # On the instance, and only until it is loaded.
    vars(model)[_INITIALIZE] = partial(_initialize, model, config)


def forget_missing(model: PreTrainedModel) -> None:
    """The model is loaded: initialize as the class does."""
    vars(model).pop(_INITIALIZE, None)


def _initialize(model: PreTrainedModel, config: WeightNormConfig) -> None:
    unread = [site for site in normed(model) if _is_unread(site)]
    with ExitStack() as opened:
        for module in {id(site.module): site.module for site in unread}.values():
            opened.enter_context(wn.writable(module))
        for site in unread:
            # It may be v's, where g alone was lacking.
            vars(getattr(site.module, site.param)).pop(_READ, None)
        getattr(type(model), _INITIALIZE)(model)
    fills = {site["name"]: site.get("g_init") for site in config.sites or ()}
    for site in unread:
        fill = fills.get(site.name)
        if fill is not None:
            site.held.g.data.fill_(fill)


def _is_unread(site: NormedSite) -> bool:
    """Whether g or v was not in the checkpoint."""
    # What is on disk is on meta here, and so is an end that will be tied.
    parts = [part for part in (site.held.g, site.held.v) if not part.is_meta]
    return any(not getattr(part, _READ, False) for part in parts)
