"""Embeddings: transformers names the tensors it ties, and makes new modules when it resizes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

import wn_surgery as wn
from wn_surgery.huggingface.bases import PreTrainedModel
from wn_surgery.model import records
from wn_surgery.model.layouts import Normed
from wn_surgery.model.sites import Site
from wn_surgery.model.state_keys import keys_of

__all__ = ["follow", "follows", "is_g_frozen", "ties_of", "unfollow"]

_TIES = "get_expanded_tied_weights_keys"
_KEYS = "_tied_weights_keys"
_RESIZE = "resize_token_embeddings"


def ties_of(model: PreTrainedModel) -> dict[str, str]:
    """What the model ties, by the names of weights: asked for while they have these names."""
    translated = vars(model).get(_TIES)
    return dict(translated.args[1] if translated else model.all_tied_weights_keys)


def follow(model: PreTrainedModel, ties: dict[str, str]) -> None:
    """Have a patched model tie g with g and v with v, and resize embeddings without weight norm.

    Args:
        model: patched.
        ties: what it tied before.
    """
    normed = {key.weight for key in keys_of(model)}
    if normed & {*ties.keys(), *ties.values()}:
        # On the instance: tie_weights(), from_pretrained and resizing ask it for the names.
        vars(model)[_TIES] = partial(_translated, model, ties)
        model.all_tied_weights_keys = _translated(model, ties)
        # Saving looks here for which of two names of one tensor to leave out.
        vars(model)[_KEYS] = _translated(model, ties)
    if any(site.normed and site.module in _embeddings(model) for site in wn.sites(model)):
        vars(model)[_RESIZE] = partial(_resize, model)


def follows(model: PreTrainedModel) -> bool:
    """Whether it ties what has weight norm: :func:`follow` has seen to that."""
    return _TIES in vars(model)


def unfollow(model: PreTrainedModel) -> None:
    """Tie and resize as the class does."""
    vars(model).pop(_RESIZE, None)
    vars(model).pop(_KEYS, None)
    if vars(model).pop(_TIES, None) is not None:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _translated(
    model: PreTrainedModel,
    ties: dict[str, str],
    all_submodels: bool = True,  # noqa: ARG001 - transformers' signature
) -> dict[str, str]:
    parts = {key.weight: (key.g, key.v) for key in keys_of(model)}
    found: dict[str, str] = {}
    for target, source in ties.items():
        if target in parts and source in parts:
            found |= dict(zip(parts[target], parts[source], strict=True))
        elif target not in parts and source not in parts:
            found[target] = source
        # One end alone was untied by its rule.
    return found


def _resize(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Resize plain embeddings, and put weight norm on the new ones."""
    ties = ties_of(model)
    embeddings = _embeddings(model)
    paths = {path for path, module in model.named_modules() if module in embeddings}
    frozen = {site.name for site in wn.sites(model) if is_g_frozen(site)}
    own = [
        {**site, "train_g": site["name"] not in frozen}
        for site in records.record(model)
        if site["name"].rpartition(".")[0] in paths
    ]
    # remove() takes rules that apply for rules that remove.
    wn.remove(model, records.replay(own))
    unfollow(model)
    try:
        return getattr(type(model), _RESIZE)(model, *args, **kwargs)
    finally:
        wn.apply(model, records.replay(own))
        follow(model, ties)


def is_g_frozen(site: Site) -> bool:
    """Whether g alone is not trained, as by a rule with ``train_g=False``."""
    held = site.held
    return isinstance(held, Normed) and held.v.requires_grad and not held.g.requires_grad


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    found: list[nn.Module] = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            module = get()
        except (AttributeError, NotImplementedError):
            continue  # a model without words
        if isinstance(module, nn.Module):
            found.append(module)
    return found
