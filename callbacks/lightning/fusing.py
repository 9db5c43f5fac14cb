"""Which modules of a LightningModule to fuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import nn

import wn_surgery as wn
from wn_surgery.fused import is_fused
from wn_surgery.model.sites import normed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["Fused", "fuse"]

Fused: TypeAlias = Literal["auto", "off", "triton", "cpu"]


def fuse(pl_module: LightningModule, mode: Fused) -> None:
    """Fuse what ``training_step`` calls, if it is not fused already.

    Raises:
        wn_surgery.FusionError: a weight cannot take the path that ``mode`` asks for.
    """
    if mode == "off":
        return
    # The Triton kernels have not been run on a GPU: they are there for who asks for them.
    if mode == "auto" and any(p.device.type != "cpu" for p in pl_module.parameters()):
        return
    for root in _roots(pl_module):
        if not is_fused(root):
            wn.fuse(root, mode)


def _roots(pl_module: LightningModule) -> list[nn.Module]:
    """The modules to fuse: those that ``training_step`` calls, as far as can be told.

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
