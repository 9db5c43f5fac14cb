"""The groups of weights that are computed together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from wn_surgery.fused.evaluator import Evaluator, Lasting, Spec, Stacks, evaluate
from wn_surgery.fused.sharing import (  # fmt: skip
    AnySlot,
    CudaSlot,
    Scope,
    Slot,
    gradient_hooks,
    infrastructure_mode,
)
from wn_surgery.norm.math import values
from wn_surgery.norm.modes import builds_graph, traced, transformed
from wn_surgery.norm.nodes import recorded_weight
from wn_surgery.norm.parametrization import WeightNormList

__all__ = ["EvaluatedGroup", "Group"]


class Group:
    """Weights of one dtype and device that one call computes."""

    def __init__(self, scope: Scope, dtype: torch.dtype, device: torch.device) -> None:
        self.scope = scope
        self.dtype = dtype
        self.device = device
        # Whether values without a graph stay to the end of the forward, or only until another
        # group is computed. On CUDA the allocator keeps their memory at hand.
        self._stays = device.type != "cpu"
        self._dropped = -1

    @property
    def slots(self) -> Sequence[AnySlot]:
        """The slots, in the order of the specs."""
        raise NotImplementedError

    def add(self, plist: WeightNormList, spec: Spec, name: str, castable: bool, /) -> AnySlot:
        """Put a slot into the list that holds the g and v of the weight ``name``."""
        raise NotImplementedError

    def _values(
        self, wanted: AnySlot, whole: bool, extent: Hashable, lasting: Lasting | None
    ) -> Sequence[Tensor] | None:
        """Compute and keep the ``whole`` group, or what is ``wanted``; ``None`` if it cannot be."""
        raise NotImplementedError

    def compute(self, wanted: AnySlot, extent: Hashable, alone: bool) -> Tensor | None:
        """The weight of a slot, computed with the others or ``alone``.

        Alone where something was written, frozen or exchanged since the group was computed. The
        others will find out for themselves. ``None`` where it must be computed as if unfused.
        """
        if traced() or transformed() or infrastructure_mode():
            return None
        return self._alone(wanted, extent) if alone else self._fill(wanted, extent)

    def _alone(self, wanted: AnySlot, extent: Hashable) -> Tensor | None:
        lasting = None
        if wanted.lasts(builds_graph()):
            lasting = Lasting((wanted.name,), self.scope.reuse)
        weights = self._values(wanted, False, extent, lasting)
        return None if weights is None else weights[0]

    def _fill(self, wanted: AnySlot, extent: Hashable) -> Tensor | None:
        if self.scope.stale:
            return None
        builds = builds_graph()
        if not builds:
            self._make_room()
        lasting = None
        if wanted.lasts(builds):
            lasting = Lasting([slot.name for slot in self.slots], self.scope.reuse)
            self.scope.kept.add(self)
        else:
            self.scope.filled[self] = None
        weights = self._values(wanted, True, extent, lasting)
        if weights is None:
            self.scope.stale = True
            return None
        return weights[self.slots.index(wanted)]

    def _make_room(self) -> None:
        """Before computing without a graph, drop what the last group to do so has computed.

        Its weights have probably been read for the last time, and memory that was used just
        now is fast, while fresh memory costs as much as the computation. A group for which
        that was wrong is not dropped again.
        """
        if self._dropped == self.scope.calls:
            self._stays = True
        last = self.scope.last
        if isinstance(last, Group) and last is not self and not last._stays:
            last._dropped = self.scope.calls
            for slot in last.slots:
                slot.forget_plain()
        self.scope.last = self


class EvaluatedGroup(Group):
    """A group that an evaluator computes; ``stacks`` are those of the evaluator."""

    def __init__(
        self,
        scope: Scope,
        dtype: torch.dtype,
        device: torch.device,
        evaluator: Evaluator,
        stacks: Stacks | None = None,
    ) -> None:
        super().__init__(scope, dtype, device)
        self._slots: list[Slot] = []
        self._evaluator = evaluator
        self._stacks = stacks
        # Whether one weight is best computed like one of a model that is not fused.
        self._by_itself = type(evaluator) is Evaluator

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots, in the order of the specs."""
        return self._slots

    def add(self, plist: WeightNormList, spec: Spec, name: str, castable: bool, /) -> Slot:
        """Put a slot into the list that holds the g and v of the weight ``name``."""
        cuda = self.device.type == "cuda"
        slot = (
            CudaSlot(self, plist, spec, name, castable) if cuda else Slot(self, plist, spec, name)
        )
        self._slots.append(slot)
        plist.__dict__["slot"] = slot
        return slot

    def _values(
        self, wanted: AnySlot, whole: bool, extent: Hashable, lasting: Lasting | None
    ) -> Sequence[Tensor] | None:
        assert isinstance(wanted, Slot)
        slots = self._slots if whole else [wanted]
        out_dtype = wanted.out_dtype()
        if len(slots) == 1 and self._by_itself and lasting is None and out_dtype is None:
            return self._one(wanted, extent)
        hooks = builds_graph() and len(slots) > 1
        states: list[tuple[object, ...]] = []
        g: list[Tensor] = []
        v: list[Tensor] = []
        for slot in slots:
            state = slot.state()
            pair = slot.tensors(state, self.dtype, self.device)
            if state is None or pair is None or (hooks and gradient_hooks(*pair)):
                return None
            states.append(state)
            g.append(pair[0])
            v.append(pair[1])
        evaluator, stacks = self._evaluator, self._stacks
        if not whole:
            evaluator, stacks = wanted.alone or Evaluator([wanted.spec]), None
            wanted.alone = evaluator
        weights = evaluate(evaluator, v, g, out_dtype, stacks, lasting)
        for slot, weight, now, m, x in zip(slots, weights, states, g, v, strict=True):
            slot.put(weight, extent, now, m, x)
        return weights

    def _one(self, slot: Slot, extent: Hashable) -> Sequence[Tensor] | None:
        """The weight of one slot, without what several of them need."""
        state = slot.state()
        pair = slot.tensors(state, self.dtype, self.device)
        if state is None or pair is None:
            return None
        g, v = pair
        if builds_graph() and (v.requires_grad or g.requires_grad):
            weight = recorded_weight(v, g, *slot.spec.norm)
        else:
            with torch.inference_mode(False), torch.no_grad():  # as in evaluate()
                weight = values(v, g, *slot.spec.norm)[0]
        slot.put(weight, extent, state, g, v)
        return (weight,)
