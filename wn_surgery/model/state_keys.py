"""The keys that a live model's weight-normed parameters have in its state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wn_surgery.model.sites import NormedSite, normed
from wn_surgery.norm.math import weight_norm
from wn_surgery.norm.naming import keys_for

__all__ = ["Keys", "keys_of", "plain_state_dict", "stripped"]


@dataclass(frozen=True, eq=False)
class Keys:
    """One parameter under one of its names.

    Attributes:
        site: the parameter.
        weight: its key without weight norm.
        g: the key of the magnitude as it is stored now.
        v: the key of the direction as it is stored now.
    """

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
    """The keys of every weight-normed parameter, under all of its names.

    Args:
        model: any module tree. Wrapper segments such as ``_orig_mod`` are in the keys, as they
            are in state dicts.

    Returns:
        In the order of the model; a shared module's parameter as often as it has names.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.model.state_keys import keys_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> _ = wn.apply(model, "linears")
        >>> [(key.weight, key.g) for key in keys_of(model)]
        [('0.weight', '0.parametrizations.weight.original0')]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: list[Keys] = []
    for site in normed(model):
        ends = keys_for(site.param, site.held.layout)
        for v in names.get(id(site.held.v), ()):
            # Tied parameters have the names of both ends; those of this site end like it.
            prefix = v.removesuffix(ends[1])
            if prefix != v and f"{prefix}{ends[0]}" in names.get(id(site.held.g), ()):
                key = Keys(site, prefix + site.param, prefix + ends[0], v)
                if all(other.v != v for other in found[-8:]):
                    found.append(key)
    return found


def stripped(state: Mapping[str, Any], keys: Iterable[Keys]) -> dict[str, Any]:
    """A state dict with the weights in the places of their g and v.

    Args:
        state: tensors by key, not changed; those of ``keys`` that it lacks are left out.
        keys: what to strip.

    Returns:
        The same order and the same other values. Each weight has the bits that
        ``wn_surgery.remove`` gives, and shares no memory with the model.
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


def plain_state_dict(model: nn.Module, *, maker: str | None = None) -> dict[str, Any]:
    """``model.state_dict()`` as it would be without weight norm; the model is not changed.

    Args:
        model: any module tree, in any layout.
        maker: strip only what ``wn_surgery`` or ``torch`` computes; by default all.

    Returns:
        The state dict that ``model.state_dict()`` gives after :func:`wn_surgery.remove`, bit for
        bit. Tensors that have nothing to do with weight norm are the model's own.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.model.state_keys import plain_state_dict
        >>> model = torch.nn.Linear(2, 3)
        >>> weight = model.weight.detach().clone()
        >>> _ = wn.apply(model, "linears")
        >>> torch.equal(plain_state_dict(model)["weight"], weight)
        True
    """
    keys = keys_of(model)
    if maker is not None:
        keys = [key for key in keys if key.site.held.maker == maker]
    return stripped(model.state_dict(), keys)


def _weight(site: NormedSite, g: Tensor, v: Tensor) -> Tensor:
    held = site.held
    live = held.v.data_ptr() == v.data_ptr() and held.v.shape == v.shape
    # A class of the user's own may compute it in a way of its own.
    return held.compute().detach().clone() if live else weight_norm(v, g, *site.norm)
