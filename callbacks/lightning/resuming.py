"""Optimizer states of a checkpoint in which weights were plain, or in torch's legacy layout."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from wn_surgery.callbacks.lightning.layouts import KEY, stored
from wn_surgery.training.optimizer_states import names_in, names_in_layout, remap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["rename_optimizer_states"]

_log = logging.getLogger(__name__)


def rename_optimizer_states(
    checkpoint: dict[str, Any], trainer: Trainer, pl_module: LightningModule
) -> list[str]:
    """Give a checkpoint's optimizer states, in place, the numbers of this run's parameters.

    A state dict numbers parameters by their order, which g and v have changed. What the callback
    itself has written is in this order already.

    Returns:
        The weights that were plain, whose g and v start without state.

    Raises:
        wn_surgery.CheckpointMismatchError: the states do not fit; nothing has changed.
    """
    states = checkpoint.get("optimizer_states")
    ours = checkpoint.get(KEY, {}).get("sites")
    if not states or ours or len(states) != len(trainer.optimizers):
        return []
    layouts = stored(checkpoint["state_dict"], pl_module)
    if set(layouts.values()) <= {"parametrized"}:
        return []
    legacy, parametrized = (
        {key for key, layout in layouts.items() if layout == which}
        for which in ("legacy", "parametrized")
    )
    renamed: list[dict[str, Any]] = []
    fresh: list[str] = []
    for state, optimizer in zip(states, trainer.optimizers, strict=True):
        new = names_in(optimizer, pl_module)
        old = names_in_layout(new, pl_module, legacy, parametrized)
        moved, without = remap(state, old, new, pl_module)
        renamed.append(moved)
        fresh += without
    checkpoint["optimizer_states"] = renamed
    if fresh and trainer.is_global_zero:
        _log.info(
            "The checkpoint's optimizer has no state for g and v of %d weights, which were plain "
            "there: %s%s start afresh; everything else goes on.",
            len(fresh),
            ", ".join(fresh[:3]),
            ", ..." if len(fresh) > 3 else "",
        )
    return fresh
