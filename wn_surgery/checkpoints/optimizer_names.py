"""Optimizer states whose keys are parameter names, as distributed checkpoints have them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from wn_surgery.checkpoints.pairs import examine
from wn_surgery.norm.naming import keys_for

__all__ = ["is_numbered", "new_names", "renamed", "renamed_lists", "warn_of_forgotten"]

LISTS = ("params", "param_names")
"""Where ``param_groups`` list parameters."""


def new_names(state: Mapping[Any, Any], to: str) -> dict[str, str | None]:
    """What the optimizer states of g and v that a mapping holds are called in another layout.

    None where there is no place for them. The mapping is ``{"fc.weight_g": {"exp_avg": ...}, ...}``
    or ``{"state": {...}, "param_groups": [...]}`` around it.
    """
    names: dict[str, str | None] = {}
    for holder in (state, state.get("state") if "param_groups" in state else None):
        moments = [
            key
            for key, value in (holder.items() if isinstance(holder, Mapping) else ())
            if isinstance(key, str)
            and isinstance(value, Mapping)
            and any(isinstance(each, Tensor) for each in value.values())
        ]
        # What an optimizer keeps of a tensor need not have its shape.
        for pair in examine(dict.fromkeys(moments, ()))[0]:
            g, v = (None, None) if to == "plain" else keys_for(pair.weight, to)
            names |= {pair.g: g, pair.v: v}
    return names


def is_numbered(state: Mapping[Any, Any]) -> bool:
    """Whether a mapping is an optimizer's state dict whose parameters have numbers, not names."""
    inner = state.get("state")
    return (
        "param_groups" in state
        and isinstance(inner, Mapping)
        and any(isinstance(key, int) for key in inner)
    )


def renamed(value: Any, names: Mapping[str, str | None]) -> Any:
    """A list of parameters' names with the new ones; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return [new for name in value if (new := names.get(name, name)) is not None]
    return value


def warn_of_forgotten(parameters: Collection[str], stacklevel: int) -> None:
    """Warn of the parameters whose optimizer's state has no place in plain weights, if any."""
    if parameters:
        warnings.warn(
            f"the optimizer's state of {len(parameters)} tensors is left out, such as that of "
            f"{next(iter(parameters))!r}: g and v have moments of their own, a weight would need "
            "others",
            stacklevel=stacklevel + 1,
        )


def renamed_lists(groups: Any, names: Mapping[str, str | None]) -> Any:
    """An optimizer's ``param_groups`` with new names under ``params`` and ``param_names``."""
    if not isinstance(groups, list):
        return groups
    return [
        {key: renamed(value, names) if key in LISTS else value for key, value in g.items()}
        if isinstance(g, dict)
        else g
        for g in groups
    ]
