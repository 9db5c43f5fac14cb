"""Where a model has weight norm, as plain data: written beside weights, and replayed from there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from wn_surgery.model.sites import Site, sites
from wn_surgery.norm.parametrization import WeightNorm
from wn_surgery.rules.rule import Rule

__all__ = ["bare", "line", "record", "replay"]

_OF_G = ("g_init", "train_g")


def record(model: nn.Module) -> list[dict[str, Any]]:
    """The sites that carry weight norm of this library, with their options.

    Weight norm that a model's own code puts on is left out: it is there again when the model is
    built again.

    Args:
        model: any module tree.

    Returns:
        For each site its name, ``dim`` (an int, a list or None), ``eps`` and ``norm_dtype`` (a name
        or None), in the order of the model; and ``g_init`` where a rule has filled g, so that the
        same rule does not fill it again.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.model.records import record
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> _ = wn.apply(model, {"types": "Linear", "eps": 1e-6})
        >>> record(model)
        [{'name': '0.weight', 'dim': 0, 'eps': 1e-06, 'norm_dtype': None}]
    """
    return [_options(site) for site in sites(model) if _ours(site)]


def replay(records: Iterable[Mapping[str, Any]], *, replace: bool = False) -> list[Rule]:
    r"""The rules that put weight norm where :func:`record` found it.

    Sites with the same options share a rule. Tied parameters stay tied.

    Args:
        records: what :func:`record` returned, or the same read from JSON. ``g_init`` and
            ``train_g`` are taken from a site that has them, as of a rule.
        replace: put it also where a model that was just built has weight norm with other options.

    Returns:
        The rules; none for no records.

    Raises:
        RuleError: an option is no valid one.

    Example:
        >>> from wn_surgery.model.records import replay
        >>> site = {"name": "a.0.weight", "dim": 0, "eps": 0.0, "norm_dtype": None}
        >>> print(replay([site])[0].describe())
        apply names=re:a\.0 tied=together
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for site in records:
        path, _, param = site["name"].rpartition(".")
        dim = tuple(site["dim"]) if isinstance(site["dim"], list) else site["dim"]
        options = (
            *(param, dim, site["eps"], site["norm_dtype"]),
            *(site.get("g_init"), site.get("train_g", True)),
        )
        alike.setdefault(options, []).append(f"re:{re.escape(path)}")
    return [
        Rule(
            names=names,
            params=param,
            dim=dim,
            eps=eps,
            norm_dtype=norm_dtype,
            g_init=g_init,
            train_g=train_g,
            tied="together",
            replace=replace,
        )
        for (param, dim, eps, norm_dtype, g_init, train_g), names in alike.items()
    ]


def bare(sites: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sites by name, without what they say of g: what two have to share to compute the same.

    Args:
        sites: as of :func:`record`.

    Returns:
        For each name the name and the options.

    Example:
        >>> from wn_surgery.model.records import bare
        >>> site = {"name": "0.weight", "dim": 0, "eps": 0.0, "norm_dtype": None, "g_init": 2.0}
        >>> bare([site])
        {'0.weight': {'name': '0.weight', 'dim': 0, 'eps': 0.0, 'norm_dtype': None}}
    """
    return {
        site["name"]: {key: value for key, value in site.items() if key not in _OF_G}
        for site in sites
    }


def line(site: Mapping[str, Any]) -> str:
    """One line for a site of a record, for messages."""
    more = "".join(f" {name}={site[name]}" for name in ("eps", "norm_dtype") if site[name])
    return f"{site['name']} dim={site['dim']}{more}"


def _ours(site: Site) -> bool:
    return site.normed and site.held is not None and site.held.maker == "wn_surgery"


def _options(site: Site) -> dict[str, Any]:
    norm: WeightNorm | None = site.norm
    assert norm is not None  # of a weight-normed site
    filled = site.held and site.held.g_init
    return {
        "name": site.name,
        "dim": list(norm.dim) if isinstance(norm.dim, tuple) else norm.dim,
        "eps": norm.eps,
        "norm_dtype": norm.norm_dtype and str(norm.norm_dtype).removeprefix("torch."),
        **({} if filled is None else {"g_init": filled}),
    }
