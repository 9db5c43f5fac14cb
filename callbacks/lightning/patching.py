"""Applying the rules to a LightningModule: when, and with errors that name its hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
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

__all__ = ["Replaced", "Rules", "apply_rules", "building_hooks", "once_after", "refuse_stale"]

Replaced: TypeAlias = list[tuple[str, weakref.ref[Tensor]]]
"""Weights that g and v have replaced, by name."""

# They run in this order, after the callback's own `setup`.
_BUILDING_HOOKS = ("setup", "configure_model")
_LIGHTNING_CORE = ("lightning.pytorch.core.", "pytorch_lightning.core.")


def apply_rules(
    pl_module: LightningModule, rules: Sequence[wn.Rule], on_unmatched: OnUnmatched
) -> tuple[wn.Report | None, Replaced]:
    """Apply the rules; return what was done, or None, and the weights that g and v replaced."""
    try:
        plan = wn.plan(pl_module, rules, on_unmatched=on_unmatched)
        if not plan.changes:
            return None, []
        replaced = [
            (step.site.name, weakref.ref(step.site.tensor))
            for step in plan.changes
            if step.site.tensor is not None
        ]
        # The plan has raised or warned for unmatched rules.
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
            f"{error}\nThe callback cannot reach layers that configure_model() builds and shards: "
            "build them in __init__, or call wn_surgery.apply(self, rules) in configure_model() "
            "before sharding them.",
            kind="wrapped",
            site=error.site,
        ) from error


def refuse_stale(optimizers: Sequence[Any], replaced: Replaced) -> None:
    """Refuse optimizers that hold replaced weights: they would silently train nothing."""
    held = held_by(optimizers)
    stale = [name for name, weight in replaced if id(weight()) in held]
    if stale:
        more = f" and {len(stale) - 3} more" if len(stale) > 3 else ""
        raise wn.CallbackError(
            f"an optimizer holds {', '.join(stale[:3])}{more}, which weight norm has replaced by g "
            "and v: it was built before the callback ran and would train neither; build it in "
            "configure_optimizers(), from self.parameters()"
        )


def building_hooks(pl_module: LightningModule) -> list[str]:
    """Return the hooks that the user's class or the module defines and that may build layers."""

    def overrides(hook: str) -> bool:
        owner = next(cls for cls in type(pl_module).__mro__ if hook in vars(cls))
        return hook in vars(pl_module) or not owner.__module__.startswith(_LIGHTNING_CORE)

    return [hook for hook in _BUILDING_HOOKS if overrides(hook)]


def once_after(pl_module: LightningModule, hook: str, then: Callable[[], None]) -> None:
    """Call ``then`` after the module's hook, the next time that it runs."""
    own = vars(pl_module).get(hook)
    if isinstance(own, partial) and own.func is _run_then:
        # Left by a run that ended before it came to the hook.
        own = own.args[2]
    # A partial, not a closure: it can be told from a hook of the user's. And not
    # functools.wraps: Lightning looks through it for whether the class overrides the hook.
    setattr(pl_module, hook, partial(_run_then, pl_module, hook, own, then))


def _run_then(pl_module: Any, hook: str, own: Any, then: Any, *args: Any, **kwargs: Any) -> None:
    delattr(pl_module, hook)
    if own is not None:
        setattr(pl_module, hook, own)
    getattr(pl_module, hook)(*args, **kwargs)
    then()
