"""``load_from_checkpoint`` runs no callbacks: a mixin for the module, which puts weight norm on."""

from __future__ import annotations

from typing import Any

from torch import nn

from wn_surgery.callbacks.lightning.layouts import apply_recorded

__all__ = ["WeightNormMixin"]


class WeightNormMixin:
    """Lets ``load_from_checkpoint`` load what was trained with :class:`WeightNorm`.

    A checkpoint says where the callback put weight norm and with which options; the mixin puts
    it there before the weights are loaded. It does nothing for checkpoints with
    ``save_layout="plain"``, which load without it, and for modules that have weight norm already.

    Put it before LightningModule, and call ``super().on_load_checkpoint(checkpoint)`` where the
    class has a hook of its own.

    Example:
        >>> import lightning.pytorch as lp, torch
        >>> from wn_surgery.callbacks.lightning import WeightNormMixin
        >>> class Model(WeightNormMixin, lp.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 3)
        >>> site = {"name": "layer.weight", "dim": 0, "eps": 0.0, "norm_dtype": None}
        >>> model = Model()
        >>> model.on_load_checkpoint({
        ...     "wn_surgery": {"version": 1, "layout": "parametrized", "sites": [site]}
        ... })
        >>> model.layer.parametrizations.weight.original0.shape
        torch.Size([3, 1])
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put weight norm where the checkpoint has it.

        Raises:
            wn_surgery.WeightNormError: the module has no such parameter, or it cannot carry
                weight norm; the module is then as it was.
        """
        assert isinstance(self, nn.Module)  # a mixin for LightningModule
        apply_recorded(self, checkpoint)
        # LightningModule's hook, or that of another mixin.
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
