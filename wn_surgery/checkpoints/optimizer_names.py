"""Optimizer states whose keys are parameter names, as distributed checkpoints have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from wn_surgery.checkpoints.pairs import Pair, examine

__all__ = ["is_numbered", "moments_of", "renamed_lists"]


def moments_of(state: Mapping[Any, Any]) -> list[Pair]:
    """The pairs whose optimizer state a mapping holds, by names alone.

    Args:
        state: perhaps ``{"fc.weight_g": {"exp_avg": ..., "step": ...}, ...}``.

    Returns:
        The pairs of keys whose values are mappings with tensors. Their axes mean nothing: what
        an optimizer keeps of a tensor need not have its shape.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints.optimizer_names import moments_of
        >>> moment = {"exp_avg": torch.ones(3)}
        >>> moments_of({"fc.weight_g": moment, "fc.weight_v": moment, "fc.bias": moment})[0].weight
        'fc.weight'
    """
    names = [
        key
        for key, value in state.items()
        if isinstance(key, str)
        and isinstance(value, Mapping)
        and any(isinstance(each, Tensor) for each in value.values())
    ]
    return examine(dict.fromkeys(names, ()))[0]


def is_numbered(state: Mapping[Any, Any]) -> bool:
    """Whether a mapping is an optimizer's state dict whose parameters are numbers, as torch's is.

    Example:
        >>> from wn_surgery.checkpoints.optimizer_names import is_numbered
        >>> is_numbered({"state": {0: {}}, "param_groups": []}), is_numbered({"state": 3})
        (True, False)
    """
    inner = state.get("state")
    return (
        "param_groups" in state
        and isinstance(inner, Mapping)
        and any(isinstance(key, int) for key in inner)
    )


def renamed_lists(groups: Any, rename: Callable[[str], str | None]) -> Any:
    """An optimizer's ``param_groups`` with other parameter names.

    Args:
        groups: a list of dicts; anything else comes back as it is.
        rename: the new name of a parameter; None leaves it out.

    Returns:
        New lists of the names under ``params`` and ``param_names``; the rest is the same.

    Example:
        >>> from wn_surgery.checkpoints.optimizer_names import renamed_lists
        >>> renamed_lists([{"lr": 0.1, "params": ["a", "b"]}], {"a": "c", "b": None}.get)
        [{'lr': 0.1, 'params': ['c']}]
    """
    if not isinstance(groups, list):
        return groups

    def of(value: Any) -> Any:
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return [new for name in value if (new := rename(name)) is not None]
        return value

    return [
        {key: of(value) if key in ("params", "param_names") else value for key, value in g.items()}
        if isinstance(g, dict)
        else g
        for g in groups
    ]
