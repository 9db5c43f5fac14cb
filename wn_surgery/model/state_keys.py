"""The keys that a live model's weight-normed parameters have in its state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wn_surgery.model.sites import NormedSite, normed
from wn_surgery.norm.naming import keys_for
from wn_surgery.norm.operator import weight_norm

__all__ = ["Keys", "keys_of", "plain_state_dict", "stripped"]


@dataclass(frozen=True, eq=False)
class Keys:
    """One parameter under one of its names: the plain key, and those of g and v as stored now."""

    site: NormedSite
    weight: str
    g: str
    v: str

    @property
    def legacy(self) -> tuple[str, str]:
        """The keys of g and v in torch's legacy layout."""
        return keys_for(self.weight, "legacy")

    @property
    def parametrized(self) -> tuple[str, str]:
        """The keys of g and v in torch's parametrized layout."""
        return keys_for(self.weight, "parametrized")


def keys_of(model: nn.Module) -> list[Keys]:
    """The keys of every weight-normed parameter, under all of its names, in the model's order.

    Wrapper segments such as ``_orig_mod`` are in the keys, as they are in state dicts.
    """
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(f"{path}." if path else "")
    return [
        Keys(site, path + site.param, *keys_for(path + site.param, site.held.layout))
        for site in normed(model)
        for path in paths[id(site.module)]
    ]


def stripped(state: Mapping[str, Any], keys: Iterable[Keys]) -> dict[str, Any]:
    """A state dict with weights in the places of their g and v; keys that it lacks are left out.

    Each weight has the bits that ``wn_surgery.remove`` gives, and shares no memory with the model.
    """
    by_g = {key.g: key for key in keys if key.g in state and key.v in state}
    gone = {key.v for key in by_g.values()}
    plain: dict[str, Any] = {}
    with torch.no_grad():
        for name, value in state.items():
            if name in by_g:
                key = by_g[name]
                plain[key.weight] = _weight(key.site, value, state[key.v])
            elif name not in gone:
                plain[name] = value
    return plain


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` as it is after ``wn_surgery.remove``; the model is not changed.

    Tensors that have nothing to do with weight norm are the model's own.
    """
    return stripped(model.state_dict(), keys_of(model))


def _weight(site: NormedSite, g: Tensor, v: Tensor) -> Tensor:
    held = site.held
    live = held.v.data_ptr() == v.data_ptr() and held.v.shape == v.shape
    # A class of the user's own may compute it in a way of its own.
    return held.compute().detach().clone() if live else weight_norm(v, g, *site.norm)
