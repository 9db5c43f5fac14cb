"""Groups of weights that are computed together, and the slots that hand them out."""

from __future__ import annotations

from collections.abc import Iterable
from threading import get_ident
from typing import TypeAlias, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from ..norm import g_shape, traced, transformed
from ..parametrization import WeightNorm, WeightNormList
from .cpu import CpuEvaluator
from .evaluator import Evaluator, Spec
from .node import evaluate
from .scope import Scope

__all__ = ["CudaSlot", "Group", "Slot", "infrastructure_mode"]

_PLAIN_TYPES = frozenset({torch.Tensor, nn.Parameter})
_INFRASTRUCTURE = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)

Where: TypeAlias = "tuple[int, torch.dtype | None] | None"
# A weight, the g and v it was computed from, their versions then, and where that was.
Entry: TypeAlias = "tuple[Tensor, Tensor, Tensor, int, int, Where]"

_is_grad_enabled = torch.is_grad_enabled
_modes = torch._C._len_torch_dispatch_stack
_graph_task = torch._C._current_graph_task_id


class Slot:
    """The weight of one parameter of one module, while it may be reused.

    Attributes:
        spec: what the weight is.
        grad: what grad mode sees during the forward.
        plain: what no-grad mode sees; it has no graph, and must not stand in for ``grad``.
        kept: what a backward sees that runs checkpointed parts again, and in which era.
        reusable: ``plain`` after the forward, with the addresses of g and v.
    """

    __slots__ = (
        "_alone", "_g_shape", "_group", "_norm", "_parameters", "_parametrizations", "_scope",
        "_seen", "grad", "kept", "plain", "reusable", "spec",
    )  # fmt: skip

    def __init__(self, group: Group, plist: WeightNormList, spec: Spec) -> None:
        # Weak, so that a model that is dropped is freed at once and not by the collector.
        self._group: ReferenceType[Group] = ref(group)
        self._scope = group.scope
        # The dictionaries themselves: what is in them may be other objects at each forward.
        self._parameters = plist._parameters
        self._parametrizations = plist._modules
        self._alone: Evaluator | None = None
        self._seen: tuple[Tensor, Tensor, int, int] | None = None
        self._g_shape = g_shape(spec.shape, spec.dim)
        self._norm = cast(WeightNorm, plist[0])
        self.spec = spec
        self.forget()

    def forget(self) -> None:
        """Drop every value."""
        self.grad: Entry | None = None
        self.plain: Entry | None = None
        self.kept: tuple[Entry, int] | None = None
        self.reusable: tuple[Entry, int, int] | None = None

    def weight(self) -> Tensor | None:
        """The weight, computed with its whole group where it is not there yet.

        Returns:
            The weight; ``None`` where it must be computed as if nothing were fused.
        """
        entry = self.grad if _is_grad_enabled() else self.plain
        if entry is not None:
            # is_current() once more, without the call: this is read thousands of times a second.
            # Nor is it asked whether a transform is active: one of g or v has other objects.
            weight, g, v, g_version, v_version, _ = entry
            held = self._parameters
            if (
                held.get("original0") is g
                and held.get("original1") is v
                and g._version == g_version
                and v._version == v_version
                and self._scope.thread == get_ident()
            ):
                return weight
        return self._compute()

    def is_current(self, entry: Entry) -> bool:
        """Whether g and v are the tensors that the entry was computed from, unwritten.

        A write that does not raise the version (``.data``, a fused optimizer) goes unseen
        here; that is why no entry outlives its forward by default.
        """
        _, g, v, g_version, v_version, _ = entry
        held = self._parameters
        return (
            held.get("original0") is g
            and held.get("original1") is v
            and g._version == g_version
            and v._version == v_version
        )

    def where(self) -> Where:
        """What else the weight depends on."""
        return None

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The g and v of now; ``None`` if they are not what the group was made for."""
        g, v = self._parameters.get("original0"), self._parameters.get("original1")
        norm, spec = self._norm, self.spec
        if (
            g is None
            or v is None
            or self._parametrizations.get("0") is not norm
            or norm.dim != spec.dim
            or norm.eps != spec.eps
            or norm.norm_dtype is not spec.norm_dtype
            or len(self._parametrizations) != 1
            or v.shape != spec.shape
        ):
            return None
        # What is the same object at the same address is of the same dtype and device.
        seen = self._seen
        if (
            seen is None
            or seen[0] is not g
            or seen[1] is not v
            or seen[2] != g.data_ptr()
            or seen[3] != v.data_ptr()
        ):
            if g.shape != self._g_shape or any(
                tensor.dtype is not dtype
                or tensor.device != device
                or type(tensor) not in _PLAIN_TYPES
                or tensor.is_inference()
                for tensor in (g, v)
            ):
                return None
            self._seen = g, v, g.data_ptr(), v.data_ptr()
        return g, v

    def keep(self) -> None:
        """Remember what was computed without grad for the next forward of that kind."""
        entry = self.plain
        if entry is not None and (self.reusable is None or self.reusable[0] is not entry):
            self.reusable = entry, entry[1].data_ptr(), entry[2].data_ptr()

    def take_up(self) -> bool:
        """Reuse the value of an earlier forward without grad; whether g and v allow it."""
        if self.reusable is None:
            return True
        entry, g_address, v_address = self.reusable
        _, g, v, *_ = entry
        if not self.is_current(entry) or (g.data_ptr(), v.data_ptr()) != (g_address, v_address):
            return False
        self.plain = entry
        return True

    def _compute(self) -> Tensor | None:
        group = self._group()
        if group is None or traced() or transformed() or infrastructure_mode():
            return None
        if self._scope.thread == get_ident():
            return group.fill(self)
        if _graph_task() != -1:
            # Backward: an activation checkpoint runs a part of the last forward again. Nothing
            # has held on to its weights; they are computed, once for all the parts that follow.
            kept = self.kept
            if kept is not None and kept[1] == self._scope.era and _is_grad_enabled():
                entry = kept[0]
                if self.is_current(entry):
                    return entry[0]
            return group.fill(self, keep=True)
        # Outside of any forward. If it is one after all, of a part of the model that will be
        # checkpointed, then its backward must not see the weights of an earlier one.
        self._scope.era += 1
        pair = self.tensors(group.dtype, group.device)
        if pair is None:
            return None
        if self._alone is None:
            self._alone = CpuEvaluator([self.spec], group.device)
        return evaluate(self._alone, (self.spec,), pair[1:], pair[:1])[0]


class CudaSlot(Slot):
    """A slot whose weight is good for one stream, and for one dtype of autocast."""

    __slots__ = ("_castable", "_index")

    def __init__(
        self, group: Group, plist: WeightNormList, spec: Spec, index: int, castable: bool
    ) -> None:
        super().__init__(group, plist, spec)
        self._index = index
        self._castable = castable

    def weight(self) -> Tensor | None:
        """As in the base class, if the value is good for here."""
        entry = self.grad if _is_grad_enabled() else self.plain
        if entry is not None and self.is_current(entry) and self._scope.thread == get_ident():
            return entry[0]
        return self._compute()

    def is_current(self, entry: Entry) -> bool:
        """As in the base class, and on the current stream."""
        return entry[5] == self.where() and super().is_current(entry)

    def where(self) -> Where:
        """The current stream, and the dtype that autocast would convert the weight to."""
        # torch's public function makes an object each time.
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        cast = self._castable and torch.is_autocast_enabled("cuda")
        return stream, torch.get_autocast_dtype("cuda") if cast else None


class Group:
    """Weights that one call computes, behind one autograd node.

    Attributes:
        slots: the members', in the order of the evaluator's specs.

    Args:
        scope: tells whether a forward is under way.
        dtype: of every g and v.
        device: of every g and v.
        evaluator: computes the weights.
        stays: whether values computed without grad stay to the end of the forward, or only
            until another group is computed.
    """

    def __init__(
        self,
        scope: Scope,
        dtype: torch.dtype,
        device: torch.device,
        evaluator: Evaluator,
        stays: bool = False,
    ) -> None:
        self.scope = scope
        self.dtype = dtype
        self.device = device
        self.slots: list[Slot] = []
        self._specs: tuple[Spec, ...] | None = None
        self._stays = stays
        self._dropped = -1
        self._evaluator = evaluator

    def begin(self, reuse: bool) -> None:
        """A forward begins: nothing is at hand, unless a value of an earlier one is still good.

        Args:
            reuse: whether this forward may reuse anything.
        """
        slots = self.slots
        for slot in slots:
            slot.grad = slot.plain = slot.kept = None
        if self._stays and not (reuse and all(map(Slot.take_up, slots))):
            for slot in slots:
                slot.plain = slot.reusable = None

    def end(self, keep: bool) -> None:
        """A forward has ended: its graph holds what its backward needs, and frees it.

        Args:
            keep: whether to keep what was computed without grad for the next forward.
        """
        for slot in self.slots:
            if keep:
                slot.keep()
            slot.grad = slot.plain = None

    def fill(self, wanted: Slot, keep: bool = False) -> Tensor | None:
        """Compute all weights; that of ``wanted``, or ``None`` if one cannot be computed.

        Args:
            wanted: the slot that was asked.
            keep: put them where a backward looks for them; the forward has ended.
        """
        if self.scope.stale:
            return None
        if not (keep or _is_grad_enabled()):
            self._make_room()
        g: list[Tensor] = []
        v: list[Tensor] = []
        for slot in self.slots:
            pair = slot.tensors(self.dtype, self.device)
            if pair is None:
                self.scope.stale = True
                return None
            g.append(pair[0])
            v.append(pair[1])
        where = wanted.where()
        if self._specs is None:
            self._specs = tuple(slot.spec for slot in self.slots)
        weights = evaluate(self._evaluator, self._specs, v, g, where and where[1])
        _put(zip(self.slots, weights, g, v, strict=True), where, self.scope.era if keep else None)
        return next(w for slot, w in zip(self.slots, weights, strict=True) if slot is wanted)

    def _make_room(self) -> None:
        """Before computing without grad, drop what the last group to do so has computed.

        Its weights have probably been read for the last time, and memory that was used just
        now is fast, while fresh memory costs as much as the computation. A group for which
        that was wrong is not dropped again.
        """
        if self._dropped == self.scope.era:
            self._stays = True
        last = self.scope.last
        if last is not None and last is not self:
            last.drop()
        self.scope.last = self

    def drop(self) -> None:
        """Drop what was computed without grad, unless that was wrong before."""
        if not self._stays:
            self._dropped = self.scope.era
            for slot in self.slots:
                slot.plain = None


def _put(
    filled: Iterable[tuple[Slot, Tensor, Tensor, Tensor]], where: Where, era: int | None
) -> None:
    grad = _is_grad_enabled()
    for slot, weight, g, v in filled:
        entry = (weight, g, v, g._version, v._version, where)
        if era is None:
            if grad:
                slot.grad = entry
            else:
                slot.plain = entry
        elif grad:
            slot.kept = entry, era


def infrastructure_mode() -> bool:
    """Whether tensors are fake, proxies or functional: their values must not be kept."""
    return _modes() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None for key in _INFRASTRUCTURE
    )
