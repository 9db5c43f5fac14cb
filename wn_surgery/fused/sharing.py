"""When a weight that was computed may be handed out again: calls, and the slots that keep it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from types import FrameType
from typing import Protocol, TypeAlias, cast
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor
from torch.nn.modules import module as module_hooks

from wn_surgery.fused.evaluator import Evaluator, Reuse, Spec
from wn_surgery.norm.math import PLAIN_TYPES, g_shape
from wn_surgery.norm.parametrization import WeightNorm, WeightNormList
from wn_surgery.norm.slots import NotCopied

__all__ = [
    "STEP", "AnySlot", "CudaSlot", "Scope", "Slot", "gradient_hooks", "infrastructure_mode",
    "module_hooks_of",
]  # fmt: skip

_Mode = torch._C._TorchDispatchModeKey
_INFRASTRUCTURE = (_Mode.FAKE, _Mode.PROXY, _Mode.FUNCTIONAL)

_get_ident = threading.get_ident
_graph_task = torch._C._current_graph_task_id
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
_modes = torch._C._len_torch_dispatch_stack


class AnySlot(Protocol):
    """A slot as its group sees it: :class:`Slot`, or a compiled one."""

    @property
    def name(self) -> str:
        """The name of the weight."""
        ...

    def weight(self) -> Tensor | None:
        """The weight, computed with its whole group where it is not there yet."""
        ...

    def lasts(self, builds: bool, /) -> bool:
        """Whether a value that is computed now may be shared until the next optimizer step."""
        ...

    def forget(self) -> None:
        """Drop both values."""
        ...

    def forget_plain(self) -> None:
        """Drop the value without a graph."""
        ...


class AnyGroup(Protocol):
    """A group as its slots and its scope see it: see :mod:`wn_surgery.fused.groups`."""

    scope: Scope
    device: torch.device

    @property
    def slots(self) -> Sequence[AnySlot]:
        """The slots, in the order of the specs."""
        ...

    def compute(self, wanted: AnySlot, extent: Hashable, alone: bool) -> Tensor | None:
        """The weight of a slot, computed with the others or alone; ``None`` if it cannot be."""
        ...


class Scope:
    """The call of a fused root that is under way, if any; one at a time."""

    __slots__ = (
        "_clear", "_lock", "_owner", "_thread", "calls", "filled", "kept", "last", "reuse", "stale",
        "steps",
    )  # fmt: skip

    def __init__(self) -> None:
        self.calls = 0
        self.steps = False  # whether a weight with a graph lasts until the next optimizer step
        # With such weights. Weak, since a group holds its scope.
        self.kept: WeakSet[AnyGroup] = WeakSet()
        self.reuse = Reuse()  # of such weights, since the last step
        # With values that were computed since forget(), in this order.
        self.filled: dict[AnyGroup, None] = {}
        self.last: AnyGroup | None = None  # of them, the last to compute without a graph
        self.stale = False  # whether the groups no longer fit the model
        self._thread: int | None = None
        self._owner: object = None
        self._clear: Callable[[], None] = _is_running
        self._lock = threading.Lock()

    def enter(self, owner: object) -> bool:
        """Begin a call; ``False`` inside another call, of this thread or another one.

        ``owner`` is the frame that the call runs in, or any object that certainly leaves.
        """
        with self._lock:
            if self._thread is not None and self._runs():
                return False
            self._thread, self._owner = _get_ident(), owner
            self._clear = owner.clear if isinstance(owner, FrameType) else _is_running
            self.calls += 1
            self.forget()
            return True

    def leave(self, owner: object) -> None:
        """End the call of ``owner``, if it is the outermost one."""
        with self._lock:
            if self._thread is None or (self._owner is not owner and self._runs()):
                return
            self._thread, self._owner, self._clear = None, None, _is_running
            self.forget()

    def rest(self) -> None:
        """Let go of a call that was interrupted: its frame would keep the model in memory."""
        with self._lock:
            if self._thread is not None and not self._runs():
                self._thread, self._owner, self._clear = None, None, _is_running

    def forget(self, step: bool = False) -> None:
        """Drop the values of a call: a graph holds what its backward needs, and frees it.

        After an optimizer's ``step``, those that last until then as well.
        """
        filled, self.filled, self.last = [*self.filled], {}, None
        if step:
            filled += self.kept
            self.kept.clear()
            self.reuse = Reuse()
        for group in filled:
            for slot in group.slots:
                slot.forget()

    def note_reuse(self) -> None:
        """A weight that lasts until the next step is read."""
        call = self.calls if self._thread is not None else -1
        if self.reuse.call is None:
            self.reuse.call = call
        elif self.reuse.call != call or call == -1:
            self.reuse.happened = True

    def here(self) -> Hashable:
        """What a value that is computed here and now may be shared within; ``None``: nothing.

        It differs for each call of the root, and for each backward outside of one (which runs
        checkpointed parts of a call again), in this thread.
        """
        if self._thread == _get_ident():
            # As in _runs(), without the call: this is asked thousands of times a second.
            try:
                self._clear()
            except RuntimeError:
                return self.calls
        task = _graph_task()
        return None if task == -1 else ("backward", task)

    def _runs(self) -> bool:
        # torch calls no hook after a KeyboardInterrupt, so a call may end without `leave`. But
        # Python knows: it does not clear a frame that is being executed, and says so.
        try:
            self._clear()
        except RuntimeError:
            return True
        return False


def _is_running() -> None:
    """Stands in for the ``clear`` of a frame, for an owner that certainly calls ``leave``."""
    raise RuntimeError


# In place of a call: a weight is good until the next step.
STEP = "step"

# A weight, its version, within what it may be shared, all that it was computed from, and g and v,
# which are held so that no other tensor can have their id.
Entry: TypeAlias = "tuple[Tensor, int, Hashable, tuple[object, ...], Tensor, Tensor]"


class Slot(NotCopied):
    """The weight of one parameter of one module, while it may be shared.

    ``grad`` is for reads that build a graph. ``plain`` is for the others: it has no graph.
    """

    __slots__ = (
        "_g_shape", "_group", "_hooks", "_norm", "_options", "_parameters",
        "_parametrizations", "_scope", "_seen", "alone", "grad", "name", "plain", "spec",
    )  # fmt: skip

    def __init__(self, group: AnyGroup, plist: WeightNormList, spec: Spec, name: str = "") -> None:
        # Weak, so that a model that is dropped is freed at once and not by the collector.
        self._group: ReferenceType[AnyGroup] = ref(group)
        self._scope = group.scope
        # The dictionaries themselves: what is in them may be other objects at each forward.
        self._parameters = plist._parameters
        self._parametrizations = plist._modules
        self._hooks = module_hooks_of(plist)
        self.alone: Evaluator | None = None  # what computes this weight by itself
        self._seen: tuple[Tensor, Tensor, object, object] | None = None
        self._g_shape = g_shape(spec.shape, spec.norm.dim)
        self._norm = cast(WeightNorm, plist[0])
        self._options = tuple(spec.norm)
        self.spec, self.name = spec, name
        self.forget()

    def forget(self) -> None:
        """Drop both values."""
        self.grad: Entry | None = None
        self.plain: Entry | None = None

    def forget_plain(self) -> None:
        """Drop the value without a graph."""
        self.plain = None

    def weight(self) -> Tensor | None:
        """The weight, computed with its whole group where it is not there yet.

        ``None`` where it must be computed as if nothing were fused.
        """
        builds = _is_grad_enabled() and not _is_inference()
        lasts = self.lasts(builds)
        extent = self.extent(lasts)
        if extent is None:
            return None
        # No need to ask for an active transform: a transformed g or v is another object.
        entry = self.grad if builds else self.plain
        if lasts and not self._scope.reuse.happened:
            self._scope.note_reuse()
        alone = entry is not None and entry[2] == extent
        # Hooks on what computes the weight wait for the next time that it is computed.
        if (
            entry is not None
            and alone
            and entry[0]._version == entry[1]
            and self.state(not lasts) == entry[3]
        ):
            return entry[0]
        group = self._group()
        return None if group is None else group.compute(self, extent, alone)

    def extent(self, lasts: bool) -> Hashable:
        """What a value that is computed now may be shared within; ``None``: nothing."""
        return STEP if lasts else self._scope.here()

    def lasts(self, builds: bool) -> bool:
        """Whether a value that is computed now may be shared until the next optimizer step.

        Without a graph no backward would notice that it is old. In eval mode none is expected.
        """
        return self._scope.steps and builds and self._norm.training

    def out_dtype(self) -> torch.dtype | None:
        """The dtype of the weight; ``None``: that of v."""
        return None

    def state(self, hooks: bool = True) -> tuple[object, ...] | None:
        """All that the weight depends on; equal twice if it is the same weight.

        ``None`` if g and v are missing, or are not all that computes it: there may be ``hooks``.
        """
        parameters, parametrizations, norm = self._parameters, self._parametrizations, self._norm
        g, v = parameters.get("original0"), parameters.get("original1")
        if (
            g is None
            or v is None
            or parametrizations.get("0") is not norm
            or len(parametrizations) != 1
            or (hooks and any(self._hooks))
        ):
            return None
        return (
            id(g), id(v), g._version, v._version, g.requires_grad, v.requires_grad,
            g.data_ptr(), v.data_ptr(), norm.dim, norm.eps, norm.norm_dtype,
        )  # fmt: skip

    def put(
        self, weight: Tensor, extent: Hashable, state: tuple[object, ...], g: Tensor, v: Tensor
    ) -> None:
        """Keep what was just computed from ``g`` and ``v`` in that state."""
        entry = (weight, weight._version, extent, state, g, v)
        if _is_grad_enabled() and not _is_inference():
            self.grad = entry
        else:
            self.plain = entry

    def tensors(
        self, state: tuple[object, ...] | None, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """The g and v of ``state``, the current one; ``None`` if the group does not fit them."""
        if state is None or state[8:] != self._options:
            return None
        g = cast(Tensor, self._parameters["original0"])
        v = cast(Tensor, self._parameters["original1"])
        # What is the same object at the same address is of the same dtype and device.
        seen = self._seen
        if seen is None or seen[0] is not g or seen[1] is not v or seen[2:] != state[6:8]:
            if any(
                tensor.dtype is not dtype
                or tensor.device != device
                or type(tensor) not in PLAIN_TYPES
                or tensor.is_inference()
                for tensor in (g, v)
            ):
                return None
            self._seen = g, v, state[6], state[7]
        # Apart from what has been seen: a new shape may come at the old address.
        return (g, v) if g.shape == self._g_shape and v.shape == self.spec.shape else None


class CudaSlot(Slot):
    """A slot whose weight is good for one stream, and for one dtype of autocast."""

    __slots__ = ("_castable", "_index")

    def __init__(
        self, group: AnyGroup, plist: WeightNormList, spec: Spec, name: str, castable: bool
    ) -> None:
        super().__init__(group, plist, spec, name)
        self._index = group.device.index or 0
        self._castable = castable

    def extent(self, lasts: bool) -> Hashable:
        """As in the base class, on the current stream and for the current dtype of autocast."""
        here = super().extent(lasts)
        if here is None:
            return None
        # torch's public function makes an object each time.
        return here, torch._C._cuda_getCurrentRawStream(self._index), self.out_dtype()

    def out_dtype(self) -> torch.dtype | None:
        """What autocast would convert the weight to."""
        cast = self._castable and torch.is_autocast_enabled("cuda")
        return torch.get_autocast_dtype("cuda") if cast else None


def gradient_hooks(g: Tensor, v: Tensor) -> bool:
    """Whether hooks wait for the gradients of a g and v.

    A node's backward calls the hooks of all its inputs, with ``None`` for those without a
    gradient. So a weight with hooks must not share a node with weights that a forward may skip.
    """
    return bool(
        g._backward_hooks
        or v._backward_hooks
        or g._post_accumulate_grad_hooks
        or v._post_accumulate_grad_hooks
    )


def module_hooks_of(plist: WeightNormList) -> tuple[object, ...]:
    """Whatever may hold hooks that run when the weight is computed: empty where there are none."""
    first, every = plist[0], module_hooks
    return (
        every._global_forward_hooks, every._global_forward_pre_hooks,
        every._global_backward_hooks, every._global_backward_pre_hooks,
        plist._forward_hooks, plist._forward_pre_hooks,
        plist._backward_hooks, plist._backward_pre_hooks,
        first._forward_hooks, first._forward_pre_hooks,
        first._backward_hooks, first._backward_pre_hooks,
    )  # fmt: skip


def infrastructure_mode() -> bool:
    """Whether tensors are fake, proxies or functional: their values must not be kept."""
    return _modes() > 0 and any(map(torch._C._get_dispatch_mode, _INFRASTRUCTURE))
