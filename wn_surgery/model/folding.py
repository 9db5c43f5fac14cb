"""Weights computed once and read many times: the context ``folded``."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError
from wn_surgery.model import layouts
from wn_surgery.model.exact import shown
from wn_surgery.model.gathering import FSDP2, gather, release
from wn_surgery.model.sites import NormedSite, whole
from wn_surgery.norm.cuts import is_dtensor
from wn_surgery.norm.modes import builds_graph
from wn_surgery.norm.module_class import (
    FOLDED,
    FOLDED_LOCK,
    base_class,
    class_for,
    computed_names,
    forget,
    is_managed,
)
from wn_surgery.norm.slots import NEAR, Near, NotCopied

__all__ = ["folded"]

_is_compiling = torch.compiler.is_dynamo_compiling


@contextmanager
def folded(model: nn.Module) -> Generator[None]:
    """Inside, every weight of ``model`` is computed once, and each read gives that tensor.

    Use it for validation, generation, or a recurrent loop. With grad enabled on entry the weights
    have a graph, and one backward inside reaches g and v through all uses of the weight.

    Weights are those of entry: a change of g or v inside (an optimizer step, ``load_state_dict``)
    is seen only after the context. State dicts, pickles and copies made inside are those of the
    live model. A fold belongs to its thread; another thread computes its weights as usual, or
    has a fold of its own. (But call a compiled model and fold it in one thread.)

    Under FSDP2 the units of the weights are gathered on entry and stay so until the end, so that no
    forward gathers them again: each rank has v and the weight whole meanwhile. Every rank enters.

    Args:
        model: any module tree, any layouts. Contexts may be nested and may overlap.

    Raises:
        ModelError: a folded weight was assigned or deleted: at once, or for the hook of
            ``torch.nn.utils.weight_norm`` on exit. Nothing has changed then. Also for surgery
            inside; for that hook's layout where another thread folds or calls the layer; and under
            FSDP2 with grad enabled, or where a rank has no memory for it.

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8))
        >>> with torch.no_grad(), wn.folded(layer):
        ...     layer.weight is layer.weight
        True
    """
    found: list[NormedSite] = []
    entered: list[tuple[str, _Fold]] = []
    replaced: list[str] = []
    units: list[nn.Module] = []
    try:
        # One step for all threads: the last to leave must not tear down what another enters.
        with FOLDED_LOCK:
            found = whole(model)
            cut = [site.held for site in found if _is_cut(site)]
            with shown(held.compute for held in cut):
                units = gather((held.g, held.v) for held in cut)
                for site in found:
                    fold = _fold_of(site)
                    fold.enter()
                    entered.append((site.name, fold))
            layouts.refresh_all(site.module for site in found)
        yield
    finally:
        with FOLDED_LOCK:
            replaced = [name for name, fold in reversed(entered) if not fold.leave()]
            release(units)
            layouts.refresh_all(site.module for site in found)
    if replaced:
        raise ModelError(
            f"{', '.join(reversed(replaced))} was assigned or deleted inside folded(), where it is "
            "only read, and is as it was before; write to it inside writable(), or outside",
            kind="folded",
        )


def _is_cut(site: NormedSite) -> bool:
    """Whether FSDP2 holds the parts of the weight."""
    if site.node.wrapped != FSDP2:
        return False
    if builds_graph() and (site.held.g.requires_grad or site.held.v.requires_grad):
        raise ModelError(
            f"{site.name} is held by {FSDP2}, which takes gradients only of what it gathers for "
            "one forward; fold it inside torch.no_grad()",
            kind="folded",
            site=site.name,
        )
    return True


def _fold_of(site: NormedSite) -> _Fold:
    fold: object = FOLDED.get(site.module, {}).get(site.param)
    if isinstance(fold, _Fold):
        return fold
    if fold is not None:
        raise ModelError(
            f"{site.name} was given weight norm inside writable(); leave that context first",
            kind="folded",
        )
    return (_HookFold if site.layout == "legacy" else _Fold)(site)


class _Fold(NotCopied):
    """One weight that is held as a plain tensor while at least one context wants it.

    The property of a parametrized weight asks it before it computes. Each thread has values of its
    own, since it may want a graph where another wants none.
    """

    traced: Tensor | None = None

    def __init__(self, site: NormedSite) -> None:
        self._name, self._module = site.name, site.module
        self._param, self._held = site.param, site.held
        self._values: dict[int, list[Tensor]] = {}

    def weight(self) -> Tensor | None:
        """The value of this thread; ``None`` in one that folds nothing."""
        mine = self._values.get(get_ident())
        return mine[-1] if mine else None

    def enter(self) -> None:
        """Compute the weight for this thread and hold it."""
        value, held = self.weight(), self._held
        wants_graph = builds_graph() and (held.g.requires_grad or held.v.requires_grad)
        # Under no_grad a value with a graph serves too; the other way round it would
        # cut g and v off from their gradients.
        if value is None or (wants_graph and not value.requires_grad):
            value = held.compute()
        if not self._values:
            self._begin()
            FOLDED.setdefault(self._module, {})[self._param] = self
        self._values.setdefault(get_ident(), []).append(value)
        self._show(get_ident(), value)

    def leave(self) -> bool:
        """Drop this context's value and say whether it was in its place; the last one restores."""
        mine = self._values[get_ident()]
        in_place = self._is_shown(mine.pop())
        if not mine:
            del self._values[get_ident()]
        if self._values:
            self._show(*self._last())
        else:
            forget(self._module, self._param)
            self._end()
        return in_place

    def _begin(self) -> None:
        """Make the module read the value."""
        module = self._module
        self._list = cast(nn.ModuleDict, module._modules["parametrizations"])[self._param]
        self._list.__dict__["hold"] = self
        self._class, self._names = type(module), layouts.parametrized_names(module)
        below = self._class
        if not (is_managed(below) and self._param in computed_names(below)):
            # torch's property asks nobody. Its class may lie under ours; every class down to the
            # one that computes the parameter is left, and the new one computes what they did.
            while self._param in vars(below) or is_managed(below):
                below = cast("type[nn.Module]", below.__bases__[0])
            live = {
                name for name in self._names if not isinstance(getattr(below, name, None), property)
            }
            object.__setattr__(module, "__class__", class_for(below, live))

    def _last(self) -> tuple[int, Tensor]:
        """A thread with values, this one if it has any, and its last."""
        thread = get_ident()
        thread = thread if thread in self._values else next(iter(self._values))
        return thread, self._values[thread][-1]

    def _show(self, thread: int, value: Tensor) -> None:
        """Exchange the value."""
        self.traced = value
        near = self._module.__dict__.setdefault(NEAR, {})
        # The parts of a DTensor may be shown in its place: norm/local_reads.py.
        if is_dtensor(value):
            near.pop(self._param, None)
        else:
            near[self._param] = Near(thread, value)

    def _is_shown(self, value: Tensor) -> bool:  # noqa: ARG002 - the other fold needs it
        """Whether nobody has put something else in its place."""
        return True  # the module's class refuses to exchange it

    def _end(self) -> None:
        """Make the module compute its weight again."""
        near = self._module.__dict__.get(NEAR, {})
        near.pop(self._param, None)
        if not near:
            self._module.__dict__.pop(NEAR, None)
        self._list.__dict__.pop("hold", None)
        # Where parametrizations have come or gone since, the old class would have properties too
        # few or too many.
        cls, now = self._class, layouts.parametrized_names(self._module)
        if now != self._names:
            cls = base_class(self._module)
            cls = class_for(cls, now) if now else cls
        object.__setattr__(self._module, "__class__", cls)


class _HookFold(_Fold):
    """A legacy weight: an attribute of the module, and the hook that would write it is quiet."""

    def enter(self) -> None:
        """As in the base class; but only one thread at a time, since there is one attribute."""
        if self._values.keys() - {get_ident()}:
            raise ModelError(_of_another_thread(self._name), kind="folded")
        super().enter()

    def _begin(self) -> None:
        held, hooks = self._module.__dict__, self._module._forward_pre_hooks
        self._stale = {self._param: held[self._param]} if self._param in held else {}
        self._hooks = {
            key: hook
            for key, hook in hooks.items()
            if getattr(hook, "name", None) == self._param and hasattr(hook, "compute_weight")
        }
        hooks.update({key: _QuietHook(hook, self._name) for key, hook in self._hooks.items()})

    def _show(self, thread: int, value: Tensor) -> None:  # noqa: ARG002 - there is one attribute
        self._module.__dict__[self._param] = value

    def _is_shown(self, value: Tensor) -> bool:
        # The module's class lets an assignment pass; a Parameter goes here.
        stray = self._module._parameters.pop(self._param, None)
        return stray is None and self._module.__dict__.get(self._param) is value

    def _end(self) -> None:
        hooks = self._module._forward_pre_hooks
        hooks.update({key: hook for key, hook in self._hooks.items() if key in hooks})
        if not self._stale:
            self._module.__dict__.pop(self._param, None)
        self._module.__dict__.update(self._stale)  # in its place among the attributes


def _of_another_thread(name: str) -> str:
    return (
        f"{name} is in torch's legacy layout and folded in another thread, whose weight this one "
        "would read; call wn_surgery.migrate(model) first, after which each thread has its own"
    )


class _QuietHook:
    """Replaces a legacy hook while its weight is folded; copies are copies of the hook."""

    def __init__(self, hook: Any, name: str) -> None:
        self.folds = hook  # known to layouts.carried()
        self._name = name
        self._thread = get_ident()

    def __call__(self, _module: nn.Module, _inputs: Any) -> None:
        """Leave the weight as it is."""
        if not _is_compiling() and get_ident() != self._thread:
            raise ModelError(_of_another_thread(self._name), kind="folded")

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.folds,)


def _itself(hook: Any) -> Any:
    return hook
