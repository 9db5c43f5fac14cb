"""Embeddings: transformers ties tensors by name, and makes new modules when it resizes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import wn_surgery as wn
from wn_surgery.model import records
from wn_surgery.model.sites import normed
from wn_surgery.model.state_keys import keys_of

__all__ = ["follow", "follows", "frozen_g", "ties_of", "unfollow"]

_TIES = "get_expanded_tied_weights_keys"
_KEYS = "_tied_weights_keys"
_RESIZE = "resize_token_embeddings"


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return what the model ties, by the names of weights; call it while they have these names."""
    if not isinstance(model, PreTrainedModel):
        return {}
    translated = vars(model).get(_TIES)
    return dict(translated.args[1] if translated else model.all_tied_weights_keys)


def follow(model: nn.Module, ties: dict[str, str]) -> None:
    """Have a patched model tie g with g and v with v, and resize embeddings without weight norm.

    ``ties`` is what :func:`ties_of` gave before it was patched.
    """
    if not isinstance(model, PreTrainedModel):
        return  # diffusers ties nothing by name
    if {key.weight for key in keys_of(model)} & {*ties.keys(), *ties.values()}:
        # On the instance: tie_weights(), from_pretrained and resizing ask it for the names, and
        # saving looks at the keys for which of two names of one tensor to leave out.
        vars(model)[_TIES] = partial(_translated, model, ties)
        vars(model)[_KEYS] = _translated(model, ties)
        model.all_tied_weights_keys = _translated(model, ties)
    if any(site.module in _embeddings(model) for site in normed(model)):
        vars(model)[_RESIZE] = partial(_resize, model)


def follows(model: PreTrainedModel) -> bool:
    """Return whether the model ties what has weight norm, by :func:`follow`."""
    return _TIES in vars(model)


def unfollow(model: PreTrainedModel) -> None:
    """Have the model tie and resize as its class does."""
    vars(model).pop(_RESIZE, None)
    vars(model).pop(_KEYS, None)
    if vars(model).pop(_TIES, None) is not None:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _translated(
    model: PreTrainedModel,
    ties: dict[str, str],
    all_submodels: bool = True,  # noqa: ARG001
) -> dict[str, str]:
    parts = {key.weight: (key.g, key.v) for key in keys_of(model)}
    found: dict[str, str] = {}
    for target, source in ties.items():
        if target in parts and source in parts:
            found |= dict(zip(parts[target], parts[source], strict=True))
        elif target not in parts and source not in parts:
            found[target] = source
        # Otherwise a rule has untied them.
    return found


def _resize(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Resize plain embeddings, and put weight norm on the new ones."""
    ties = ties_of(model)
    embeddings = _embeddings(model)
    paths = {path for path, module in model.named_modules() if module in embeddings}
    frozen = frozen_g(model)
    own = [
        {**site, "train_g": site["name"] not in frozen}
        for site in records.record(model)
        if site["name"].rpartition(".")[0] in paths
    ]
    # remove() takes rules that apply as rules that remove.
    wn.remove(model, records.replay(own))
    unfollow(model)
    try:
        return getattr(type(model), _RESIZE)(model, *args, **kwargs)
    finally:
        wn.apply(model, records.replay(own))
        follow(model, ties)


def frozen_g(model: PreTrainedModel) -> set[str]:
    """Return the sites of which g alone is not trained, as by a rule with ``train_g=False``."""
    return {
        site.name
        for site in normed(model)
        if site.held.v.requires_grad and not site.held.g.requires_grad
    }


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
