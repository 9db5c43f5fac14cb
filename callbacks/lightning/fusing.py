"""How a run computes weights: in groups in training, once for all batches in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

import wn_surgery as wn
from wn_surgery.fused import is_fused
from wn_surgery.model.holders import in_parts
from wn_surgery.model.sites import normed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["Folding", "Fused", "fuse"]

Fused: TypeAlias = Literal["auto", "off", "triton", "cpu", "native"]


def fuse(pl_module: LightningModule, mode: Fused, optimizers: Sequence[Any] = ()) -> None:
    """Fuse the modules that ``training_step`` calls, if they are not fused already.

    With ``optimizers``, weights last until the next step of one.
    """
    if mode == "off":
        return
    # Who has not asked for it gets nothing that has not been run on a GPU.
    asked = bool(optimizers)
    if mode == "auto" and not asked and any(p.device.type != "cpu" for p in pl_module.parameters()):
        return
    for root in _roots(pl_module):
        if not is_fused(root):
            wn.fuse(root, mode, optimizers=optimizers)


def _roots(pl_module: LightningModule) -> list[nn.Module]:
    """Return the modules that ``training_step`` calls, as far as can be told.

    Usually they are children, such as a generator and a discriminator, and the module itself
    is not called. Where a weight-normed layer is a child itself, the module is.
    """
    roots: list[nn.Module] = []
    waiting: list[nn.Module] = list(pl_module.children())
    while waiting:
        child = waiting.pop(0)
        found = normed(child)
        if any(site.module is child for site in found):
            return [pl_module]
        if type(child).forward is nn.Module.forward:  # a list or dict of modules
            waiting[:0] = child.children()
        elif found:
            roots.append(child)
    return roots


class Folding:
    """Enters ``wn_surgery.folded`` at the first batch of an evaluation, and leaves at its end.

    Not before the first batch: weight averaging exchanges the weights when the epoch starts.
    """

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    def start(self, pl_module: LightningModule) -> None:
        """Fold, unless the weights are folded or there is nothing to fold."""
        if self._stack is not None:
            return
        self._stack = ExitStack()
        found = normed(pl_module)
        # FSDP1 and ZeRO-3 make parts whole in a forward only.
        if not found or any(in_parts(site.tensor) for site in found):
            return
        # Not as inference tensors: a step may turn gradients on, for a penalty.
        with torch.inference_mode(False), torch.no_grad():
            self._stack.enter_context(wn.folded(pl_module))

    def stop(self) -> None:
        """Compute the weights at each use again."""
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()
