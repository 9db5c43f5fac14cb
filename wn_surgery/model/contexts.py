"""Weights as plain tensors for a while: ``folded`` to read them, ``writable`` to write them."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError
from wn_surgery.model import layouts
from wn_surgery.model.opened import (
    Opened,
    Pair,
    Weight,
    forget,
    parametrized,
    restore_class,
)
from wn_surgery.model.sites import NormedSite, is_folded, normed
from wn_surgery.norm.math import builds_graph
from wn_surgery.norm.module_class import FOLDED, class_for, computed_names, is_managed, opener
from wn_surgery.norm.slots import NotCopied

__all__ = ["folded", "writable"]

_LOCK = threading.RLock()
_is_compiling = torch.compiler.is_dynamo_compiling


@contextmanager
def folded(model: nn.Module) -> Generator[None]:
    """Inside, every weight of ``model`` is computed once, and each read gives that tensor.

    Reading it costs less than reading a Parameter. Use it for validation, generation,
    or a recurrent loop. With grad enabled on entry the weights have a graph, and one
    backward inside the context reaches g and v through all uses of the weight.

    A fold belongs to its thread. Another thread, a training loop for example, computes its
    weights as ever, or has a fold of its own. (``torch.compile`` cannot tell threads apart: call
    a compiled model and fold it in one thread.)

    Weights are those of entry: a change of g or v inside (an optimizer step,
    ``load_state_dict``) is seen after the context only. State dicts, pickles and copies
    made inside are those of the live model.

    Args:
        model: any module tree; all layouts are folded. Contexts may be nested and may
            overlap, on one model or on several, in one thread or in several.

    Raises:
        ModelError: a folded weight was assigned or deleted: at once, or for the hook
            of ``torch.nn.utils.weight_norm`` on exit. Nothing has changed then. Also for
            surgery inside; and for that hook's layout, which has one weight for all
            threads, where another thread folds or calls the layer.

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8))
        >>> with torch.no_grad(), wn.folded(layer):
        ...     layer.weight is layer.weight
        True
        >>> layer.weight is layer.weight
        False
    """
    found: list[NormedSite] = []
    entered: list[tuple[NormedSite, _Fold]] = []
    replaced: list[str] = []
    try:
        # One step for all threads: the last to leave must not tear down what another enters.
        with _LOCK:
            found = normed(model)
            for site in found:
                fold = _fold_of(site)
                fold.enter()
                entered.append((site, fold))
            _refresh(found)
        yield
    finally:
        with _LOCK:
            for site, fold in reversed(entered):
                if not fold.leave():
                    replaced.append(site.name)
            _refresh(found)
    if replaced:
        raise ModelError(
            f"{', '.join(reversed(replaced))} was assigned or deleted inside folded(), where it is "
            "only read, and is as it was before; write to it inside writable(), or outside",
            kind="folded",
        )


def _refresh(found: list[NormedSite]) -> None:
    for module in {id(site.module): site.module for site in found}.values():
        layouts.refresh(module)


def _fold_of(site: NormedSite) -> _Fold:
    fold: object = FOLDED.get(site.module, {}).get(site.param)
    if isinstance(fold, _Fold):
        return fold
    if fold is not None:
        raise ModelError(
            f"{site.name} was given weight norm inside writable(); leave that context first",
            kind="folded",
        )
    return (_HookFold if site.layout == "legacy" else _ListFold)(site)


class _Fold:
    """One weight that is held as a plain tensor while at least one context wants it."""

    def __init__(self, site: NormedSite) -> None:
        self._name = site.name
        self._module = site.module
        self._param = site.param
        self._held = site.held
        self._values: dict[int, list[Tensor]] = {}

    def enter(self) -> None:
        """Compute the weight for this thread and hold it."""
        mine = self._values.get(get_ident())
        current = mine[-1] if mine else None
        # Under no_grad a value with a graph serves too; the other way round it would
        # cut g and v off from their gradients.
        usable = current is not None and (current.requires_grad or not self._wants_graph())
        value = current if usable and current is not None else self._held.compute()
        if not self._values:
            self._begin()
            FOLDED.setdefault(self._module, {})[self._param] = self
        self._values.setdefault(get_ident(), []).append(value)
        self._show(value)

    def leave(self) -> bool:
        """Drop this context's value; the last one to leave restores the layout.

        Returns:
            Whether the weight was still in its place.
        """
        mine = self._values[get_ident()]
        in_place = self._is_shown(mine.pop())
        if not mine:
            del self._values[get_ident()]
        if self._values:
            self._show((mine or next(iter(self._values.values())))[-1])
            return in_place
        forget(self._module, self._param)
        self._end()
        return in_place

    def _wants_graph(self) -> bool:
        g, v = self._held.g, self._held.v
        return builds_graph() and (g.requires_grad or v.requires_grad)

    def _begin(self) -> None:
        """Make the module read the value."""
        raise NotImplementedError

    def _show(self, value: Tensor) -> None:
        """It is this value now."""
        raise NotImplementedError

    def _is_shown(self, value: Tensor) -> bool:
        """Whether nobody has put something else in its place."""
        raise NotImplementedError

    def _end(self) -> None:
        """Make the module compute its weight again."""
        raise NotImplementedError


class _ListFold(_Fold, NotCopied):
    """A parametrized weight: the module's property asks this before it computes.

    Each thread has values of its own, for it may want a graph where another wants none.
    """

    traced: Tensor | None = None

    def weight(self) -> Tensor | None:
        """The value of this thread; one that folds nothing computes its weights as ever."""
        mine = self._values.get(get_ident())
        return mine[-1] if mine else None

    def _begin(self) -> None:
        module = self._module
        self._list = cast(nn.ModuleDict, module._modules["parametrizations"])[self._param]
        self._list.__dict__["hold"] = self
        self._class, self._names = type(module), parametrized(module)
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

    def _show(self, value: Tensor) -> None:
        self.traced = value

    def _is_shown(self, value: Tensor) -> bool:  # noqa: ARG002 - the other fold needs it
        return True  # the module's class refuses to exchange it

    def _end(self) -> None:
        self._list.__dict__.pop("hold", None)
        restore_class(self._module, self._class, self._names)


class _HookFold(_Fold):
    """A legacy weight: an attribute of the module, and the hook that would write it is quiet."""

    def enter(self) -> None:
        """As in the base class; one thread at a time, for there is one attribute.

        Raises:
            ModelError: another thread has folded it.
        """
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
        hooks.update(
            {key: _FoldedHook(hook, self._name, get_ident()) for key, hook in self._hooks.items()}
        )

    def _show(self, value: Tensor) -> None:
        self._module.__dict__[self._param] = value

    def _is_shown(self, value: Tensor) -> bool:
        # The module's class lets an assignment pass; a Parameter goes here.
        stray = self._module._parameters.pop(self._param, None)
        return stray is None and self._module.__dict__.get(self._param) is value

    def _end(self) -> None:
        hooks = self._module._forward_pre_hooks
        hooks.update({key: hook for key, hook in self._hooks.items() if key in hooks})
        self._module.__dict__.pop(self._param, None)
        self._module.__dict__.update(self._stale)


def _of_another_thread(name: str) -> str:
    return (
        f"{name} is in torch's legacy layout and folded in another thread, whose weight this one "
        "would read; call wn_surgery.migrate(model) first, after which each thread has its own"
    )


class _FoldedHook:
    """Stands for a legacy hook while its weight is folded; copies are copies of the hook."""

    def __init__(self, hook: Any, name: str, thread: int) -> None:
        self.folds = hook  # known to layouts.carried()
        self._name = name
        self._thread = thread

    def __call__(self, _module: nn.Module, _inputs: Any) -> None:
        """Leave the weight as it is."""
        if not _is_compiling() and get_ident() != self._thread:
            raise ModelError(_of_another_thread(self._name), kind="folded")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_itself, (self.folds,))


def _itself(hook: Any) -> Any:
    return hook


@contextmanager
def writable(model: nn.Module) -> Generator[None]:
    """Inside, every weight of ``model`` is a plain Parameter; on exit g and v follow it.

    So ``nn.init``, ``copy_``, ``.data``, ``reset_parameters`` and a model's own
    ``_init_weights`` take effect, which torch's weight norm drops in silence. A weight
    that was not written keeps its g and v bit for bit. g and v stay the same Parameters.
    They go where the weight goes: ``model.to`` a dtype or device inside moves them too.

    Args:
        model: any module tree; all layouts become writable.

    Raises:
        ModelError: the model is inside ``folded``. (Inside another ``writable`` its
            weights are writable already, and this one does nothing.) Or, on exit, a weight
            is no Parameter any more, since the body deleted or parametrized it; its module
            is then as it was on entry. Also for surgery inside.
        ZeroNormError: on exit, a written weight has no direction and eps is 0.
        ValueError: on exit, a weight has another shape. Whatever is raised, here or in the
            body, g and v have the values they had on entry.

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8))
        >>> with wn.writable(layer):
        ...     _ = torch.nn.init.ones_(layer.weight)
        >>> layer.parametrizations.weight.original0.flatten()[:2].tolist()
        [2.0, 2.0]
    """
    found: list[NormedSite] = []
    opened: dict[int, Opened] = {}
    weights: list[Weight] = []
    written: list[Pair | None] | None = None
    try:
        with _LOCK:
            found = normed(model)
            for site in found:
                if is_folded(site.node):
                    raise ModelError(
                        f"{site.name} is inside folded() or writable() now; "
                        "leave that context first",
                        kind="folded",
                    )
            opened = {id(site.module): Opened(site.module) for site in found}
            made: dict[int, nn.Parameter] = {}
            for site in found:
                weight = Weight(site, made)
                weights.append(weight)
                FOLDED.setdefault(site.module, {})[site.param] = weight
                order = layouts.clear(site.module, site.param)
                layouts.put_plain(site.module, site.param, weight.parameter, order)
            _refresh(found)
            for module in opened.values():
                module.note({site.param for site in found if site.module is module.module})
        yield
        written = [weight.read_back() for weight in weights]
    finally:
        with _LOCK:
            for weight in weights:
                forget(weight.site.module, weight.site.param)
            for module in opened.values():
                module.close()
            with torch.no_grad():
                # Not one is written unless the body and every check went through.
                new = written or [weight.moved(weight.parameter) for weight in weights]
                exchanged: dict[int, nn.Parameter] = {}
                for weight, pair in zip(weights, new, strict=True):
                    if pair is not None:
                        weight.settle(pair, exchanged)
            _refresh(found)


opener.open = writable
