"""Applying the rules to a LightningModule, with errors that speak of one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

import wn_surgery as wn
from wn_surgery.callbacks.holding import held_by
from wn_surgery.rules.sources import Rule, RulesLike
from wn_surgery.surgery.planning import OnUnmatched

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    Rules: TypeAlias = RulesLike
else:
    # What LightningCLI sees: it would let a mapping pass with any field. Not in the callback's
    # own file, of which jsonargparse reads what is under TYPE_CHECKING.
    Rules: TypeAlias = str | Rule | list[str | Rule]

__all__ = ["Replaced", "Rules", "apply_rules", "refuse_stale"]

Replaced: TypeAlias = list[tuple[str, weakref.ref[Tensor]]]
"""Weights that g and v have replaced, by name."""


def apply_rules(
    pl_module: LightningModule, rules: Sequence[wn.Rule], on_unmatched: OnUnmatched
) -> tuple[wn.Report | None, Replaced]:
    """Apply the rules.

    Returns:
        What was done, None for nothing; and the weights that are no Parameters any more.

    Raises:
        wn_surgery.WeightNormError: as :func:`wn_surgery.apply`; nothing has changed.
    """
    try:
        plan = wn.plan(pl_module, rules, on_unmatched=on_unmatched)
        if not plan.changes:
            return None, []
        replaced = [
            (step.site.name, weakref.ref(step.site.tensor))
            for step in plan.changes
            if step.site.tensor is not None
        ]
        # The plan has told, or warned of, what is unmatched.
        return wn.apply(pl_module, rules, on_unmatched="ignore"), replaced
    except wn.UnmatchedRuleError as error:
        children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
        raise wn.UnmatchedRuleError(
            f"{error}\nNames are relative to the LightningModule, {type(pl_module).__name__} "
            f"(its children: {children}). Layers are found if __init__, setup or "
            "configure_model builds them, not later."
        ) from error
    except wn.ModelError as error:
        if error.kind != "wrapped":
            raise
        raise wn.ModelError(
            f"{error}\nLayers that configure_model() builds and shards are out of the "
            "callback's reach: build them in __init__, or call wn_surgery.apply(self, rules) "
            "in configure_model() before sharding them.",
            kind="wrapped",
            site=error.site,
        ) from error


def refuse_stale(optimizers: Sequence[Any], replaced: Replaced) -> None:
    """Refuse optimizers that hold replaced weights: they would train nothing, in silence.

    Raises:
        wn_surgery.CallbackError: one does.
    """
    held = held_by(optimizers)
    stale = [name for name, weight in replaced if id(weight()) in held]
    if stale:
        more = f" and {len(stale) - 3} more" if len(stale) > 3 else ""
        raise wn.CallbackError(
            f"an optimizer holds {', '.join(stale[:3])}{more}, which weight norm has replaced by g "
            "and v: it was built before the callback ran and would train neither; build it in "
            "configure_optimizers(), from self.parameters()"
        )
