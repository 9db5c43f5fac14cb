"""Where a model has weight norm, as plain data that is written beside weights and replayed.

A record is a list with one dict for each site. The Lightning callback writes it into checkpoints,
under :data:`KEY`; the config of a patched transformers model holds one too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from torch import nn

from wn_surgery.errors import RuleError
from wn_surgery.model.sites import normed
from wn_surgery.norm.naming import keys_for
from wn_surgery.norm.options import NormOptions
from wn_surgery.rules import fields
from wn_surgery.rules.rule import Rule

__all__ = ["KEY", "VERSION", "bare", "is_record", "line", "options_of", "record", "replay"]

KEY = "wn_surgery"
"""The entry of a Lightning checkpoint that the callback writes."""

VERSION = 1
"""The newest version of that entry that this release reads."""


def record(model: nn.Module) -> list[dict[str, Any]]:
    """The sites on which this library has put weight norm, with their options.

    Weight norm that a model's own code puts on is left out: it is there when the model is built
    again. ``g_init`` is where a rule has filled g, so that the same rule does not fill it again;
    ``renormalize`` is the norm that v is put back to.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.model.records import record
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> _ = wn.apply(model, {"types": "Linear", "eps": 1e-6})
        >>> record(model)
        [{'name': '0.weight', 'dim': 0, 'eps': 1e-06, 'norm_dtype': None}]
    """
    sites = []
    for site in normed(model):
        if site.ours:
            held = {key: getattr(site.held, key) for key in ("g_init", "renormalize")}
            said = {key: value for key, value in held.items() if value is not None}
            sites.append({"name": site.name, **site.norm.to_dict(), **said})
    return sites


def options_of(site: Mapping[str, Any]) -> NormOptions:
    """The options in one site of a record, which may come from a hostile file.

    An option that is not valid is a ``RuleError``, and a missing one a ``KeyError``.
    """
    dim = fields.dim(_dim(site))
    if dim == "out":
        raise RuleError("dim='out' in a record")
    return NormOptions(dim, fields.eps(site["eps"]), fields.norm_dtype(site["norm_dtype"]))


def _dim(site: Mapping[str, Any]) -> Any:
    return tuple(site["dim"]) if isinstance(site["dim"], list) else site["dim"]


def replay(records: Iterable[Mapping[str, Any]], *, replace: bool = False) -> list[Rule]:
    """The rules that put weight norm where :func:`record` found it.

    Sites with the same options share a rule, and tied parameters stay tied. ``g_init``,
    ``train_g`` and ``renormalize`` are taken from a site that has them, as of a rule. ``replace``
    is for a model that was just built and has weight norm with other options.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for site in records:
        path, _, param = site["name"].rpartition(".")
        options = (_dim(site), site["eps"], site["norm_dtype"], site.get("g_init"))
        key = (param, *options, site.get("train_g", True), site.get("renormalize"))
        alike.setdefault(key, []).append(f"re:{re.escape(path)}")
    given = ("params", "dim", "eps", "norm_dtype", "g_init", "train_g", "renormalize")
    return [
        Rule(names=names, tied="together", replace=replace, **dict(zip(given, key, strict=True)))
        for key, names in alike.items()
    ]


def bare(sites: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sites by name, without what is about training: what two share that compute the same."""
    training = ("g_init", "train_g", "renormalize")
    return {site["name"]: {key: site[key] for key in site if key not in training} for site in sites}


def line(site: Mapping[str, Any]) -> str:
    """One line for a site of a record, for messages."""
    more = "".join(f" {name}={site[name]}" for name in ("eps", "norm_dtype") if site[name])
    return f"{site['name']} dim={site['dim']}{more}"


def is_record(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is what the Lightning callback writes under :data:`KEY`."""
    return isinstance(value, Mapping) and "sites" in value and "version" in value


def with_exact(state: Mapping[Any, Any], parts: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state dict with the exact g and v, from ``parts``, in the places of plain weights."""
    whole: dict[Any, Any] = {}
    for key, value in state.items():
        both = keys_for(str(key), "parametrized")
        whole |= {part: parts[part] for part in both} if set(both) <= parts.keys() else {key: value}
    return whole
