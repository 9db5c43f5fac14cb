"""Weights as plain tensors for a while: ``folded`` to read them, ``writable`` to write them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import layouts
from .errors import FoldedModelError
from .layouts import Held
from .module_class import FOLDED, class_for, is_managed
from .opened import Opened, Pair, Weight, forget, parametrized, restore_class
from .sites import Site, is_folded, sites_of, walk

__all__ = ["folded", "writable"]

_LOCK = threading.RLock()


@contextmanager
def folded(model: nn.Module) -> Generator[None]:
    """Inside, every weight of ``model`` is computed once and is a plain tensor attribute.

    Reading it costs what reading any attribute costs. Use it for validation, generation,
    or a recurrent loop. With grad enabled on entry the weights have a graph, and one
    backward inside the context reaches g and v through all uses of the weight.

    Weights are those of entry: a change of g or v inside (an optimizer step,
    ``load_state_dict``) is seen after the context only. State dicts, pickles and copies
    made inside are those of the live model.

    Args:
        model: any module tree; all layouts are folded. Contexts may be nested and may
            overlap, on one model or on several, in any thread.

    Raises:
        FoldedModelError: a folded weight was assigned or deleted: at once, or for the hook
            of ``torch.nn.utils.weight_norm`` on exit. Nothing has changed then. Also for
            surgery inside.

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8))
        >>> with torch.no_grad(), wn.folded(layer):
        ...     layer.weight is layer.weight
        True
        >>> layer.weight is layer.weight
        False
    """
    found: list[Site] = []
    entered: list[tuple[Site, _Fold]] = []
    replaced: list[str] = []
    try:
        # One step for all threads: the last to leave must not tear down what another enters.
        with _LOCK:
            found = _normed(model)
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
        raise FoldedModelError(
            f"{', '.join(reversed(replaced))} was assigned or deleted inside folded(), where it is "
            "only read, and is as it was before; write to it inside writable(), or outside"
        )


def _normed(model: nn.Module) -> list[Site]:
    return [site for node in walk(model) for site in sites_of(node) if site.normed]


def _refresh(found: list[Site]) -> None:
    for module in {id(site.module): site.module for site in found}.values():
        layouts.refresh(module)


def _fold_of(site: Site) -> _Fold:
    fold: object = FOLDED.get(site.module, {}).get(site.param)
    if isinstance(fold, _Fold):
        return fold
    if fold is not None:
        raise FoldedModelError(
            f"{site.name} was given weight norm inside writable(); leave that context first"
        )
    assert site.held is not None
    return _Fold(site.module, site.param, site.held)


class _Fold:
    """One weight that is held as a plain tensor while at least one context wants it."""

    def __init__(self, module: nn.Module, param: str, held: Held) -> None:
        self._module = module
        self._param = param
        self._held = held
        self._values: list[Tensor] = []
        self._unfold: Callable[[], None] | None = None

    def enter(self) -> None:
        """Compute the weight and put it in place of the property or the hook."""
        assert self._held.compute is not None
        current = self._values[-1] if self._values else None
        # Under no_grad a value with a graph serves too; the other way round it would
        # cut g and v off from their gradients.
        usable = current is not None and (current.requires_grad or not self._wants_graph())
        value = current if usable and current is not None else self._held.compute()
        if self._unfold is None:
            fold = _fold_hook if self._held.layout == "legacy" else _fold_class
            self._unfold = fold(self._module, self._param, value)
            FOLDED.setdefault(self._module, {})[self._param] = self
        self._values.append(value)
        self._module.__dict__[self._param] = value

    def leave(self) -> bool:
        """Drop this context's value; the last one to leave restores the layout.

        Returns:
            Whether the weight was still in its place.
        """
        value = self._values.pop()
        # A legacy module's class lets an assignment pass; a Parameter goes here.
        stray = self._module._parameters.pop(self._param, None)
        in_place = stray is None and self._module.__dict__.get(self._param) is value
        if self._values:
            self._module.__dict__[self._param] = self._values[-1]
            return in_place
        forget(self._module, self._param)
        if self._unfold is not None:
            self._unfold()
            self._unfold = None
        return in_place

    def _wants_graph(self) -> bool:
        g, v = self._held.g, self._held.v
        assert g is not None and v is not None
        return torch.is_grad_enabled() and (g.requires_grad or v.requires_grad)


def _fold_class(module: nn.Module, param: str, value: Tensor) -> Callable[[], None]:
    """Give the module a class without the property, which would hide the tensor."""
    before, names = type(module), parametrized(module)
    below = before
    # torch's class may lie under ours; every class down to the one that computes the
    # parameter is left, and the others' parameters are computed by the new one.
    while param in vars(below) or is_managed(below):
        below = cast("type[nn.Module]", below.__bases__[0])
    live = {name for name in names if not isinstance(getattr(below, name, None), property)}
    cls = class_for(below, live - {param})
    # In this order, another thread that reads the weight finds one at any time.
    module.__dict__[param] = value
    object.__setattr__(module, "__class__", cls)

    def unfold() -> None:
        restore_class(module, before, names)
        module.__dict__.pop(param, None)

    return unfold


class _FoldedHook:
    """Stands for a legacy hook while its weight is folded; copies are copies of the hook."""

    def __init__(self, hook: Any) -> None:
        self.folds = hook  # known to layouts.carried()

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Leave the weight as it is."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_itself, (self.folds,))


def _itself(hook: Any) -> Any:
    return hook


def _fold_hook(module: nn.Module, param: str, value: Tensor) -> Callable[[], None]:
    hooks = module._forward_pre_hooks
    replaced = {
        key: hook
        for key, hook in hooks.items()
        if getattr(hook, "name", None) == param and hasattr(hook, "compute_weight")
    }
    stale = module.__dict__.get(param)
    module.__dict__[param] = value
    hooks.update({key: _FoldedHook(hook) for key, hook in replaced.items()})

    def unfold() -> None:
        for key, hook in replaced.items():
            if key in hooks:
                hooks[key] = hook
        if stale is None:
            module.__dict__.pop(param, None)
        else:
            module.__dict__[param] = stale

    return unfold


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
        FoldedModelError: the model is inside ``folded``. (Inside another ``writable`` its
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
    found: list[Site] = []
    opened: dict[int, Opened] = {}
    weights: list[Weight] = []
    written: list[Pair | None] | None = None
    try:
        with _LOCK:
            found = _normed(model)
            for site in found:
                if is_folded(site.node):
                    raise FoldedModelError(
                        f"{site.name} is inside folded() or writable() now; "
                        "leave that context first"
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
