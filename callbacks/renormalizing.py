"""Putting v back after the steps of a run's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

import wn_surgery as wn
from wn_surgery.model.sites import normed
from wn_surgery.surgery.optimizers import all_unwrapped

__all__ = ["AfterSteps", "asks", "renormalizing"]


def renormalizing(rules: Sequence[wn.Rule], every: int | None) -> tuple[wn.Rule, ...]:
    """Return the rules, with ``renormalize`` where a number of steps is given and none has it."""
    if every is not None and every < 1:
        raise ValueError(f"renormalize_every_n_steps={every}; expected at least 1, or None")
    if every is None or any(rule.renormalize for rule in rules):
        return tuple(rules)
    return tuple(
        replace(rule, renormalize=1.0) if rule.action == "apply" else rule for rule in rules
    )


def asks(model: nn.Module) -> bool:
    """Return whether a site of the model wants its v put back."""
    return any(site.held.renormalize is not None for site in normed(model))


class AfterSteps:
    """Calls :func:`wn_surgery.renormalize` after each step of an optimizer that is ``due``.

    The optimizer itself calls it: after the last batch of an accumulation, not after a step that a
    GradScaler has skipped, and whoever calls ``step``.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def start(self, model: nn.Module, optimizers: Any, due: Callable[[], bool]) -> None:
        """Begin to follow the optimizers of a run."""
        self.stop()

        def after(optimizer: Any, *_: Any) -> None:
            if due():
                wn.renormalize(model, optimizers=[optimizer])

        for optimizer in all_unwrapped(optimizers):
            self._handles.append(optimizer.register_step_post_hook(after))

    def stop(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
