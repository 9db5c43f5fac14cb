"""Fusing a model: its groups, and the hooks that tell when a forward begins and ends."""

from __future__ import annotations

import functools
import importlib
import sys
from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, get_args
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from wn_surgery.errors import ModelError
from wn_surgery.fused.choice import Choice, Mode, Path, choose, cut
from wn_surgery.fused.evaluator import Evaluator, Stacks
from wn_surgery.fused.groups import EvaluatedGroup, Group
from wn_surgery.fused.sharing import AnySlot, Scope, infrastructure_mode
from wn_surgery.model.sites import NormedSite, as_module, is_folded, normed, walk
from wn_surgery.norm.modes import traced, transformed
from wn_surgery.norm.parametrization import WeightNormList
from wn_surgery.norm.slots import RootHook, changes
from wn_surgery.surgery.execution import execute
from wn_surgery.surgery.optimizers import all_unwrapped
from wn_surgery.surgery.planning import build_migration
from wn_surgery.tables import render

_is_compiling = torch.compiler.is_dynamo_compiling

__all__ = ["Enter", "Fusion", "Leave", "Member", "fuse", "is_fused", "shared", "unfuse"]


def fuse(
    model: nn.Module, mode: Mode = "auto", *, optimizers: Optimizer | Iterable[Any] = ()
) -> Fusion:
    """Compute the weights of ``model`` in groups, each once a forward, with one autograd node.

    A group is computed when the first of its weights is read inside ``model(...)``, and kept until
    that call returns. Elsewhere, and under ``torch.compile``, ``torch.export``, ``torch.jit``,
    ``torch.func`` and forward-mode AD, a weight is computed as if nothing were fused. Values,
    parameters, names, state dicts and optimizers stay as they are. Copies and pickles of the
    model are fused too.

    Modules whose weight norm is ``torch.nn.utils.parametrizations.weight_norm`` become this
    library's first, as by :func:`wn_surgery.migrate`. Those with the legacy hook are left out.

    With ``optimizers``, training computes each weight once a step instead of once a forward, and
    every forward until the next step reads the same tensor, whatever part of the model is called:
    micro-batches, time steps, both halves of a GAN. See docs/fused.md for why it is not stale.

    Args:
        model: the module that is called: weights are shared within one call of it. Fuse the
            generator and the discriminator, not the module that holds both.
        mode: ``auto``: torch's operators on the CPU and on CUDA; weights that cannot be fused
            are left out, and the result says why. ``triton`` (kernels for CUDA), ``cpu``
            (torch's operators, on any device), ``native`` (the CPU, in C++ that your compiler
            builds on first use): that path for every weight, or an error.
        optimizers: if given, those that train the model: one, or several that together hold each
            g and v that trains. They stay as they are.

    Returns:
        The groups; print it to see which path each weight takes, and why.

    Raises:
        ModelError: nothing in the model is weight-normed, ``mode`` names a path that a weight
            cannot take or that cannot be built here, ``optimizers`` lack a g or v that trains, or
            one of them is not torch's and tells nobody of its steps (``kind="fusion"``); the model
            is inside ``folded`` or ``writable`` (``kind="folded"``).

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> _ = wn.apply(model, {"types": "Linear"})
        >>> print(wn.fuse(model))
        weight    path  group
        --------  ----  -----
        0.weight  cpu   0
        1.weight  cpu   0
        2 of 2 weights in 1 groups
    """
    if mode not in get_args(Mode):
        known = ", ".join(repr(name) for name in get_args(Mode))
        raise ValueError(f"fuse(mode={mode!r}): expected one of {known}; to end it, use unfuse()")
    for node in walk(model):
        if is_folded(node):
            where = node.paths[0] or type(model).__name__
            why = f"{where} is inside folded() or writable(); leave it first"
            raise ModelError(why, kind="folded")
    found = normed(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no weight-normed parameter to fuse; "
            "call wn_surgery.apply(model, rules) first",
            kind="fusion",
        )
    held = all_unwrapped(optimizers)
    _check_held(found, held)
    if mode == "native":  # which may fail, before anything is changed
        importlib.import_module("wn_surgery.fused.native.building").load()
    if any(site.layout == "parametrized" for site in found):
        execute(build_migration(model, "parametrized", {"parametrized"}))
    unfuse(model)
    fusion = Fusion(mode)
    fusion.scope.steps = bool(held)
    fusion.build(model)
    refused = [member for member in fusion.members if member.path == "off"]
    if mode != "auto" and refused:
        fusion.release()
        first = refused[0]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ModelError(
            f"{first.name}{more} cannot take the path {mode!r}: {first.why}; "
            "with mode='auto' it is left out",
            kind="fusion",
            site=first.name,
        )
    _hook(model, fusion)
    return fusion


def _check_held(found: list[NormedSite], optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ModelError(
                f"optimizers holds a {type(optimizer).__name__}, which is no "
                "torch.optim.Optimizer: nothing tells when it steps; leave out optimizers=",
                kind="fusion",
            )
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for site in found if optimizers else ():
        for part, parameter in (("g", site.held.g), ("v", site.held.v)):
            if parameter.requires_grad and id(parameter) not in held:
                raise ModelError(
                    f"{site.name}: none of the optimizers holds its {part}; name every optimizer "
                    "that trains the model, as in optimizers=[muon, adamw], or freeze it by "
                    "requires_grad_(False)",
                    kind="fusion",
                    site=site.name,
                )


def unfuse(model: nn.Module) -> int:
    """End whole-model evaluation in ``model`` and every module below it.

    Returns:
        How many fused roots there were.

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.Linear(4, 8)
        >>> _ = wn.apply(layer, {"names": ""})
        >>> _ = wn.fuse(layer)
        >>> wn.unfuse(layer), wn.unfuse(layer)
        (1, 0)
    """
    released = [fusion for module in as_module(model).modules() if (fusion := _unhook(module))]
    for fusion in released:
        fusion.release()
    return len(released)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` itself, not only one below it, is a fused root.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.fused import is_fused
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> _ = wn.apply(model, {"types": "Linear"})
        >>> _ = wn.fuse(model)
        >>> is_fused(model), is_fused(model[0])
        (True, False)
    """
    return _fusion_of(module) is not None


@contextmanager
def shared(model: nn.Module) -> Generator[None]:
    """Inside, several calls of a fused model share one computation of its weights.

    For a discriminator that sees real and generated samples, or for gradient accumulation:
    the backwards may run together or one after another, also after the context. An optimizer's
    step inside is seen: what follows is computed from the new g and v. ``model`` is any module
    tree; the fused roots in it are found.

    Raises:
        ModelError: nothing in the model is fused (``kind="fusion"``).

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.fused import shared
        >>> layer = torch.nn.Linear(4, 8)
        >>> _ = wn.apply(layer, {"names": ""})
        >>> _ = wn.fuse(layer)
        >>> with shared(layer):
        ...     real, generated = layer(torch.ones(1, 4)), layer(torch.zeros(1, 4))
        >>> real.sum().backward(); generated.sum().backward()
    """
    found = [fusion for module in as_module(model).modules() if (fusion := _fusion_of(module))]
    if not found:
        why = f"{type(model).__name__} is not fused; call wn_surgery.fuse(model) first"
        raise ModelError(why, kind="fusion")
    owner = object()
    try:
        for fusion in found:
            fusion.enter(None, owner)
        yield
    finally:
        for fusion in found:
            fusion.scope.leave(owner)


@dataclass(frozen=True)
class Member:
    """One weight-normed parameter of a fused model.

    Attributes:
        name: its dotted name.
        path: ``triton``, ``cpu``, ``native``, or ``off``: computed as if nothing were fused.
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
        mode: ``auto``, ``triton``, ``cpu`` or ``native``.
        members: the weights, in the order of the model's modules.
        scope: the call that is under way.
    """

    def __init__(self, mode: Mode, *_: object) -> None:  # 0.1.0 pickled a second argument
        self.mode: Mode = mode
        self.members: list[Member] = []
        self.scope = Scope()
        self._root: ReferenceType[nn.Module] | None = None
        self._groups: list[Group] = []
        self._placed: list[tuple[ReferenceType[WeightNormList], AnySlot]] = []
        self._seen = -1
        self._trained: frozenset[int] = frozenset()
        _watch_optimizers()
        _FUSIONS.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is unbuilt: its groups are those of the model it is copied with.

        No optimizer trains it.
        """
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
        """Cut the model, as it is now, into groups; unhook it if it has no weight norm left."""
        self.release()
        self._root = ref(root)
        self._seen = changes.count
        self.scope.stale = False
        choices = [choose(site, self.mode) for site in normed(root)]
        self._trained = frozenset(
            id(part) for c in choices for part in (c.site.held.g, c.site.held.v)
        )
        for chosen in cut(choices):
            for choice in chosen:
                choice.group = len(self._groups)
            self._groups.append(self._group(chosen))
        self.members = [Member(c.site.name, c.path, c.why, c.group) for c in choices]
        if not choices:
            _unhook(root)

    def _group(self, members: Sequence[Choice]) -> Group:
        tensor, specs = members[0].site.tensor, [choice.spec for choice in members]
        where = self.scope, tensor.dtype, tensor.device
        group: Group
        if members[0].path == "native":
            group = importlib.import_module("wn_surgery.fused.native.group").NativeGroup(*where)
        elif members[0].path == "triton":
            triton = importlib.import_module("wn_surgery.fused.triton.evaluator")
            evaluator = triton.TritonEvaluator(specs, tensor.dtype, tensor.device)
            group = EvaluatedGroup(*where, evaluator)
        else:
            stacks = Stacks(specs, tensor.dtype.itemsize)
            group = EvaluatedGroup(*where, Evaluator(stacks.specs), stacks)
        for choice, spec in zip(members, specs, strict=True):
            slot = group.add(choice.plist, spec, choice.site.name, choice.castable)
            self._placed.append((ref(choice.plist), slot))
        return group

    def release(self) -> None:
        """Take all slots out of the model."""
        self.scope.forget(step=True)
        self.scope.rest()
        for held, slot in self._placed:
            plist = held()
            if plist is not None and plist.__dict__.get("slot") is slot:
                del plist.__dict__["slot"]
        self._placed.clear()
        self._groups.clear()
        self.members.clear()

    def trained_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds any g or v of the model."""
        return any(
            id(p) in self._trained for group in optimizer.param_groups for p in group["params"]
        )

    def enter(self, root: nn.Module | None, owner: object) -> None:
        """A call of ``root`` begins (``None``: several calls will); see :meth:`Scope.enter`."""
        if root is not None and "_is_replica" in root.__dict__:  # DataParallel's
            return
        held = self._root() if self._root is not None else None
        root = root if root is not None else held
        if root is None or traced() or transformed() or infrastructure_mode():
            return
        if not self.scope.enter(owner):
            return
        if held is not root or self.scope.stale or self._seen != changes.count:
            self.build(root)
            if not self.members:
                self.scope.leave(owner)


# Hooks ----------------------------------------------------------------------------------------

# Not a number, as register_forward_hook would take: torch counts them anew in each process, and
# a later hook would take the place of one that was unpickled.
_KEY = cast(int, "wn_surgery.fused")


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


class Leave:
    """The forward hook of a fused root; called also where the forward raises an Exception."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion

    def __call__(self, _module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        """End a call."""
        if not _is_compiling():
            self.fusion.scope.leave(sys._getframe(1))


def _hook(root: nn.Module, fusion: Fusion) -> None:
    """Let ``fusion`` know of the calls of ``root``: before every other hook, after the forward."""
    before = cast("OrderedDict[int, Any]", root._forward_pre_hooks)
    before[_KEY] = Enter(fusion)
    before.move_to_end(_KEY, last=False)
    root._forward_hooks[_KEY] = Leave(fusion)
    root._forward_hooks_always_called[_KEY] = True


def _unhook(root: nn.Module) -> Fusion | None:
    """Take the hooks off ``root``; the fusion they belonged to."""
    found: Fusion | None = None
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, Enter | Leave):
                found = hook.fusion
                del hooks[key]
                root._forward_hooks_always_called.pop(key, None)
    return found


def _fusion_of(module: nn.Module) -> Fusion | None:
    """The fusion whose root is ``module``."""
    hooks: list[object] = list(module._forward_pre_hooks.values())
    return next((hook.fusion for hook in hooks if isinstance(hook, Enter)), None)


_FUSIONS: WeakSet[Fusion] = WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Ask torch to tell of every optimizer's step; once, at the first fused model."""

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        # Fused optimizers write without raising the version of what they write.
        for fusion in list(_FUSIONS):
            fusion.scope.forget(step=fusion.scope.steps and fusion.trained_by(optimizer))

    register_optimizer_step_post_hook(after_step)
