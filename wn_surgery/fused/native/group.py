"""Groups whose slots, values and node are compiled: slots.cpp, node.h and loops.h."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from wn_surgery.fused.groups import Group
from wn_surgery.fused.native.building import load
from wn_surgery.fused.sharing import AnySlot, module_hooks_of
from wn_surgery.norm.math import g_shape, has_kernel
from wn_surgery.norm.modes import builds_graph
from wn_surgery.norm.parametrization import WeightNormList

if TYPE_CHECKING:
    from wn_surgery.fused.evaluator import Lasting, Spec
    from wn_surgery.fused.sharing import Scope

__all__ = ["NativeGroup"]


class NativeGroup(Group):
    """A group whose members keep, check and compute their weights without Python."""

    def __init__(self, scope: Scope, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(scope, dtype, device)
        self._native: Any = load()
        self._slots: tuple[AnySlot, ...] = ()

    @property
    def slots(self) -> Sequence[AnySlot]:
        """The slots, in the order of the specs."""
        return self._slots

    def add(self, plist: WeightNormList, spec: Spec, name: str, _: bool, /) -> AnySlot:
        """Put a slot into the list that holds the g and v of the weight ``name``."""
        shape, norm = tuple(spec.shape), spec.norm
        kernel = norm.dim if has_kernel(plist.original1, *norm) else -1
        slot: AnySlot = self._native.Slot(
            ref(self), self.scope, plist._parameters, plist._modules, module_hooks_of(plist),
            plist[0], tuple(norm), shape, g_shape(shape, norm.dim), kernel, name,
            torch.empty(0, dtype=self.dtype),
        )  # fmt: skip
        self._slots += (slot,)
        plist.__dict__["slot"] = slot
        return slot

    def _values(
        self, wanted: AnySlot, whole: bool, extent: Hashable, lasting: Lasting | None
    ) -> Sequence[Tensor] | None:
        slots = self._slots if whole else (wanted,)
        found: list[Tensor] | None = self._native.compute(slots, builds_graph(), extent, lasting)
        return found
