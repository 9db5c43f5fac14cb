"""Weights as plain tensors for a while: ``folded`` to read them, ``writable`` to write them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import layouts
from .errors import FoldedModelError, ZeroNormError
from .layouts import Held, carried
from .parametrization import FOLDED, class_for, is_managed
from .sites import Site, is_folded, sites_of, walk
from .undo import Snapshot

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

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8))
        >>> with torch.no_grad(), wn.folded(layer):
        ...     layer.weight is layer.weight
        True
        >>> layer.weight is layer.weight
        False
    """
    found = [site for node in walk(model) for site in sites_of(node) if site.normed]
    entered: list[_Fold] = []
    try:
        # One step for all threads: the last to leave must not tear down what another enters.
        with _LOCK:
            for site in found:
                fold = _fold_of(site)
                fold.enter()
                entered.append(fold)
            _refresh(found)
        yield
    finally:
        with _LOCK:
            for fold in reversed(entered):
                fold.leave()
            _refresh(found)


def _refresh(found: list[Site]) -> None:
    for module in {id(site.module): site.module for site in found}.values():
        layouts.refresh(module)


def _fold_of(site: Site) -> _Fold:
    folds: dict[str, _Fold] = FOLDED.setdefault(site.module, {})
    if site.param not in folds:
        assert site.held is not None
        folds[site.param] = _Fold(site.module, site.param, site.held)
    return folds[site.param]


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
            self._unfold = fold(self._module, self._param)
        self._values.append(value)
        self._module.__dict__[self._param] = value

    def leave(self) -> None:
        """Drop this context's value; the last one to leave restores the layout."""
        self._values.pop()
        if self._values:
            self._module.__dict__[self._param] = self._values[-1]
            return
        del FOLDED[self._module][self._param]
        if not FOLDED[self._module]:
            del FOLDED[self._module]
        self._module.__dict__.pop(self._param, None)
        if self._unfold is not None:
            self._unfold()
            self._unfold = None

    def _wants_graph(self) -> bool:
        g, v = self._held.g, self._held.v
        assert g is not None and v is not None
        return torch.is_grad_enabled() and (g.requires_grad or v.requires_grad)


def _fold_class(module: nn.Module, param: str) -> Callable[[], None]:
    """Give the module a class without the property, which would hide the tensor."""
    before = type(module)
    below = before
    live: set[str] = set()
    # torch's class may lie under ours; every class down to the one that computes the
    # parameter is left, and the others' parameters are computed by the new one.
    while param in vars(below) or is_managed(below):
        live |= vars(below).keys() & carried(module).keys()
        below = cast("type[nn.Module]", below.__bases__[0])
    object.__setattr__(module, "__class__", class_for(below, live - {param}))
    return lambda: object.__setattr__(module, "__class__", before)


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


def _fold_hook(module: nn.Module, param: str) -> Callable[[], None]:
    hooks = module._forward_pre_hooks
    replaced = {
        key: hook
        for key, hook in hooks.items()
        if getattr(hook, "name", None) == param and hasattr(hook, "compute_weight")
    }
    stale = module.__dict__.get(param)
    hooks.update({key: _FoldedHook(hook) for key, hook in replaced.items()})

    def unfold() -> None:
        for key, hook in replaced.items():
            if key in hooks:
                hooks[key] = hook
        if stale is not None:
            module.__dict__[param] = stale

    return unfold


@contextmanager
def writable(model: nn.Module) -> Generator[None]:
    """Inside, every weight of ``model`` is a plain Parameter; on exit g and v follow it.

    So ``nn.init``, ``copy_``, ``.data``, ``reset_parameters`` and a model's own
    ``_init_weights`` take effect, which torch's weight norm drops in silence. A weight
    that was not written keeps its g and v bit for bit. g and v stay the same Parameters.

    Args:
        model: any module tree; all layouts become writable.

    Raises:
        FoldedModelError: the model is inside ``folded``. (Inside another ``writable`` its
            weights are writable already, and this one does nothing.)
        ZeroNormError: on exit, a written weight has no direction and eps is 0. g and v are
            then as they were on entry, as they are when the body raises.

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8))
        >>> with wn.writable(layer):
        ...     _ = torch.nn.init.ones_(layer.weight)
        >>> layer.parametrizations.weight.original0.flatten()[:2].tolist()
        [2.0, 2.0]
    """
    found = [site for node in walk(model) for site in sites_of(node) if site.normed]
    for site in found:
        if is_folded(site.node):
            raise FoldedModelError(f"{site.name} is inside folded() now; leave that context first")
    opened = {id(site.module): _Opened(site.module) for site in found}
    before: list[Tensor] = []
    written: list[tuple[Tensor, Tensor] | None] = []
    made: dict[int, nn.Parameter] = {}
    try:
        for site in found:
            module, held = site.module, site.held
            assert held is not None and held.v is not None
            FOLDED[module] = {}
            weight = made.setdefault(id(held.v), held.weight())
            before.append(weight.detach().clone())
            layouts.put_plain(module, site.param, weight, layouts.clear(module, site.param))
        _refresh(found)
        for layout in opened.values():
            layout.note()
        yield
        written = [_read_back(site, old) for site, old in zip(found, before, strict=True)]
    finally:
        for site in found:
            FOLDED.pop(site.module, None)
        for layout in opened.values():
            layout.close()
        with torch.no_grad():
            # Empty unless the body and every check went through.
            for site, new in zip(found, written, strict=False):
                held = site.held
                if new is not None and held is not None and held.g is not None:
                    held.g.copy_(new[0])
                    held.v.copy_(new[1])  # type: ignore[union-attr]
        _refresh(found)


def _read_back(site: Site, before: Tensor) -> tuple[Tensor, Tensor] | None:
    """The g and v of a weight that was written; ``None`` where it is as it was."""
    weight = getattr(site.module, site.param).detach()
    norm = site.norm
    assert norm is not None and site.tensor is not None
    if weight.shape != before.shape:
        raise ValueError(
            f"{site.name} was replaced by a tensor of shape {tuple(weight.shape)}; expected "
            f"{tuple(before.shape)}; remove weight norm first to change the shape"
        )
    # Unlike torch.equal, this takes the NaNs of a diverged model as unchanged.
    if weight.is_meta or torch.allclose(weight, before, rtol=0.0, atol=0.0, equal_nan=True):
        return None
    try:
        return norm.right_inverse(weight.to(site.tensor))
    except ZeroNormError as error:
        raise ZeroNormError(f"{site.name}: {error}") from error


class _Opened:
    """Puts back what opening a module took out, and leaves alone what the body changed."""

    _CONTAINERS = ("_parameters", "_modules", "_forward_pre_hooks", "_load_state_dict_pre_hooks")

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._whole = Snapshot(module)
        lists = module._modules.get("parametrizations")
        self._lists = None if lists is None else Snapshot(lists)
        self._class = type(module)
        self._before = {key: dict(module.__dict__[key]) for key in self._CONTAINERS}
        self._weights = {k: v for k, v in module.__dict__.items() if isinstance(v, Tensor)}
        self._ours: dict[str, set[str]] = {}

    def note(self) -> None:
        """The module is open: what differs from before is ours to put back."""
        for key, before in self._before.items():
            self._ours[key] = before.keys() ^ self._module.__dict__[key].keys()

    def close(self) -> None:
        """Put the layout back."""
        if self._lists is not None:
            self._lists.restore()
        if not self._ours:  # opening failed half-way; the body has not run
            self._whole.restore()
            return
        attributes = self._module.__dict__
        for key, ours in self._ours.items():
            now, before = attributes[key], self._before[key]
            kept = {k: v for k, v in now.items() if k not in ours}
            entries = {k: kept.get(k, v) for k, v in before.items() if k in ours or k in kept}
            now.clear()
            now.update(entries | kept)
        for name, weight in self._weights.items():
            attributes.setdefault(name, weight)
        object.__setattr__(self._module, "__class__", self._class)
