"""Checking that a run's optimizers hold g and v."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

import wn_surgery as wn
from wn_surgery.model.sites import normed

__all__ = ["held_by", "refuse_scalars", "refuse_unheld"]


def held_by(optimizers: Iterable[Any]) -> set[int]:
    """Return the ids of the parameters that the optimizers hold."""
    return {
        id(parameter)
        for optimizer in optimizers
        for group in getattr(optimizer, "param_groups", ())
        for parameter in group["params"]
    }


def refuse_unheld(model: nn.Module, optimizers: Iterable[Any], advice: str) -> None:
    """Raise CallbackError for a run that would silently not train some weight-normed layers.

    An optimizer may be given a part of a model, so a layer that is left out as a whole is an error
    only if all are. One of which only g, only v or only the bias is held always is.
    """
    held = held_by(optimizers)
    lacking: list[str] = []
    halves: list[str] = []
    reached = False
    for site in normed(model):
        if not site.ours:
            continue
        parts = [p for p in (site.held.g, site.held.v) if p.requires_grad]
        there = [id(part) in held for part in parts]
        reached = reached or any(there)
        if not all(there):
            lacking.append(site.name)
            beside = site.module._parameters.values()
            if any(there) or any(id(p) in held for p in beside if p is not None):
                halves.append(site.name)
    wrong = halves if reached else lacking
    if not held or not wrong:
        return
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise wn.CallbackError(
        f"no optimizer holds g and v of {wrong[0]}{more}, which would not be trained: {advice}"
    )


def refuse_scalars(names: Iterable[str], engine: str) -> None:
    """Raise CallbackError for a scalar g, which an engine that cuts parameters cannot cut."""
    for name in names:
        raise wn.CallbackError(
            f"{name} has dim=None, for which g is a scalar, and {engine} cannot cut scalars; write "
            "dim=[] (no axes): the same norm, with a g that has as many axes as the weight"
        )
