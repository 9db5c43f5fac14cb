"""A fused model: its groups, and the hooks that tell when a forward begins and ends."""

from __future__ import annotations

import functools
import importlib
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from wn_surgery.fused.choice import (
    Choice,
    Mode,
    Path,
    choose,
    cut,
    is_castable,
)
from wn_surgery.fused.cpu import CpuEvaluator
from wn_surgery.fused.evaluator import Evaluator
from wn_surgery.fused.group import (
    CudaSlot,
    Group,
    Slot,
    infrastructure_mode,
)
from wn_surgery.fused.scope import Scope
from wn_surgery.model.sites import normed
from wn_surgery.norm.math import traced, transformed
from wn_surgery.norm.parametrization import WeightNormList
from wn_surgery.norm.slots import RootHook, changes
from wn_surgery.tables import render

_is_compiling = torch.compiler.is_dynamo_compiling

__all__ = ["Enter", "Fusion", "Leave", "Member", "hook", "unhook"]


@dataclass(frozen=True)
class Member:
    """One weight-normed parameter of a fused model.

    Attributes:
        name: its dotted name.
        path: ``triton``, ``cpu``, or ``off``: computed as if nothing were fused.
        why: the reason for ``off``.
        group: the number of its group, from 0; ``None`` where it is in none.
    """

    name: str
    path: Path
    why: str
    group: int | None


class Fusion:
    """What :func:`wn_surgery.fuse` returns: ``print`` it to see which path each weight takes.

    It lives in the forward hooks of the root module. Copies and pickles of the model have
    one of their own, which builds its groups at the copy's first forward.

    Attributes:
        mode: ``auto``, ``triton`` or ``cpu``.
    """

    def __init__(self, mode: Mode, *_: object) -> None:  # 0.1.0 pickled a second argument
        self.mode: Mode = mode
        self.members: list[Member] = []
        self._scope = Scope()
        self._root: ReferenceType[nn.Module] | None = None
        self._groups: list[Group] = []
        self._placed: list[tuple[ReferenceType[WeightNormList], Slot]] = []
        self._seen = -1
        _watch_optimizers()
        _FUSIONS.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is unbuilt: its groups are those of the model it is copied with."""
        return Fusion, (self.mode,)

    def __str__(self) -> str:
        rows = [
            (m.name, m.path, "" if m.group is None else str(m.group), m.why) for m in self.members
        ]
        count = sum(member.group is not None for member in self.members)
        return (
            f"{render(('weight', 'path', 'group', 'why'), rows)}\n"
            f"{count} of {len(rows)} weights in {len(self._groups)} groups"
        )

    def __repr__(self) -> str:
        paths = [member.path for member in self.members]
        counts = {path: paths.count(path) for path in sorted(set(paths))}
        return f"Fusion(mode={self.mode!r}, {counts})"

    def build(self, root: nn.Module) -> None:
        """Look at the model as it is now, and cut it into groups."""
        self.release()
        self._root = ref(root)
        self._seen = changes.count
        self._scope.stale = False
        choices = [choose(site, self.mode) for site in normed(root)]
        numbers: dict[int, int] = {}
        for number, chosen in enumerate(cut(choices)):
            self._groups.append(self._group(chosen))
            numbers.update((id(choice), number) for choice in chosen)
        self.members = [
            Member(choice.site.name, choice.path, choice.why, numbers.get(id(choice)))
            for choice in choices
        ]

    def _group(self, members: Sequence[Choice]) -> Group:
        first = members[0]
        device, dtype = first.tensor.device, first.tensor.dtype
        # On CUDA one launch computes them all, and the allocator keeps their memory at hand.
        group = Group(self._scope, dtype, device, _evaluator(members), device.type != "cpu")
        for choice in members:
            slot = (
                CudaSlot(group, choice.plist, choice.spec, device.index or 0, is_castable(choice))
                if device.type == "cuda"
                else Slot(group, choice.plist, choice.spec)
            )
            group.slots.append(slot)
            choice.plist.__dict__["slot"] = slot
            self._placed.append((ref(choice.plist), slot))
        return group

    def release(self) -> None:
        """Take all slots out of the model."""
        self.forget()
        for held, slot in self._placed:
            plist = held()
            if plist is not None and plist.__dict__.get("slot") is slot:
                del plist.__dict__["slot"]
        self._placed.clear()
        self._groups.clear()
        self.members.clear()

    def forget(self) -> None:
        """Drop every value; the next read computes it again."""
        self._scope.forget()

    def enter(self, root: nn.Module | None, owner: object) -> None:
        """A call of the root begins.

        Args:
            root: what is called; ``None`` where it will be called several times.
            owner: as for :meth:`wn_surgery.fused.scope.Scope.enter`.
        """
        if root is not None and "_is_replica" in root.__dict__:  # DataParallel's
            return
        held = self._root() if self._root is not None else None
        root = root if root is not None else held
        if root is None or traced() or transformed() or infrastructure_mode():
            return
        if not self._scope.enter(owner):
            return
        if held is not root or self._scope.stale or self._seen != changes.count:
            self.build(root)
            if not self.members:
                self._scope.leave(owner)
                unhook(root)

    def leave(self, owner: object) -> None:
        """The call of ``owner`` ends."""
        self._scope.leave(owner)


def _evaluator(members: Sequence[Choice]) -> Evaluator:
    specs = [choice.spec for choice in members]
    if members[0].path == "cpu":
        return CpuEvaluator(specs)
    triton = importlib.import_module("wn_surgery.fused.triton.evaluator")
    tensor = members[0].tensor
    evaluator: Evaluator = triton.TritonEvaluator(specs, tensor.dtype, tensor.device)
    return evaluator


# Not a number, as register_forward_hook would take: torch counts them anew in each process, and
# a later hook would take the place of one that was unpickled.
_KEY = cast(int, "wn_surgery.fused")


def hook(root: nn.Module, fusion: Fusion) -> None:
    """Let ``fusion`` know of the calls of ``root``: before every other hook, after the forward."""
    before = cast("OrderedDict[int, Any]", root._forward_pre_hooks)
    before[_KEY] = Enter(fusion)
    before.move_to_end(_KEY, last=False)
    root._forward_hooks[_KEY] = Leave(fusion)
    root._forward_hooks_always_called[_KEY] = True


def unhook(root: nn.Module) -> Fusion | None:
    """Take the hooks off ``root``; the fusion they belonged to."""
    found: Fusion | None = None
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, Enter | Leave):
                found = hook.fusion
                del hooks[key]
                root._forward_hooks_always_called.pop(key, None)
    return found


class Enter(RootHook):
    """The forward pre-hook of a fused root."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        """Begin a call."""
        if not _is_compiling():
            self.fusion.enter(module, sys._getframe(1))

    def settle(self, root: nn.Module) -> None:
        """See :class:`wn_surgery.norm.slots.RootHook`."""
        self.fusion.build(root)
        if not self.fusion.members:
            unhook(root)


class Leave:
    """The forward hook of a fused root; called also where the forward raises an Exception."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion

    def __call__(self, _module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        """End a call."""
        if not _is_compiling():
            self.fusion.leave(sys._getframe(1))


_FUSIONS: WeakSet[Fusion] = WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Ask torch to tell of every optimizer's step; once, at the first fused model."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(*_: Any) -> None:
    # Fused optimizers write without raising the version of what they write.
    for fusion in list(_FUSIONS):
        fusion.forget()
