"""Whether a run's optimizers hold g and v, and so train what the callbacks have made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

import wn_surgery as wn
from wn_surgery.model.sites import normed

__all__ = ["held_by", "refuse_unheld"]


def held_by(optimizers: Iterable[Any]) -> set[int]:
    """The ids of the parameters that the optimizers hold."""
    return {
        id(parameter)
        for optimizer in optimizers
        for group in getattr(optimizer, "param_groups", ())
        for parameter in group["params"]
    }


def refuse_unheld(model: nn.Module, optimizers: Iterable[Any], advice: str) -> None:
    """Refuse a run in which weight-normed layers would stay as they are, in silence.

    An optimizer may well be given a part of a model. So a layer that it leaves out altogether is
    an error only if it leaves out all of them; one of which it has g alone, v alone or the bias
    alone always is.

    Args:
        model: with weight norm.
        optimizers: all of the run's.
        advice: what to do, to end the message with.

    Raises:
        wn_surgery.CallbackError: g or v, which require gradients, are in none of them.
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
