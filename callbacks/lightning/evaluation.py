"""Plain weights while a Trainer validates, tests or predicts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

import wn_surgery as wn
from wn_surgery.model.sites import normed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["Folding"]


class Folding:
    """Enters ``wn_surgery.folded`` at the first batch of an evaluation, and leaves at its end.

    Not before the first batch: weight averaging exchanges the weights when the epoch starts.
    """

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    @property
    def active(self) -> bool:
        """Whether the weights are plain now."""
        return self._stack is not None

    def start(self, pl_module: LightningModule) -> None:
        """Fold, if it is not done and there is something to fold."""
        if self._stack is not None:
            return
        self._stack = ExitStack()
        found = normed(pl_module)
        # A sharded v is not whole before the forward of its unit.
        if not found or any(_split(site) for site in found):
            return
        # Not as inference tensors: a step may turn gradients on, for a penalty.
        with torch.inference_mode(False), torch.no_grad():
            self._stack.enter_context(wn.folded(pl_module))

    def stop(self) -> None:
        """Compute the weights anew at each use again."""
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()


def _split(site: wn.Site) -> bool:
    wrapped = site.node.wrapped not in (None, "DistributedDataParallel")
    tensor = site.tensor
    return wrapped or type(tensor).__name__ == "DTensor" or hasattr(tensor, "ds_id")
