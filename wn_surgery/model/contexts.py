"""Weights as plain tensors for a while: ``folded`` to read them, ``writable`` to write them."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError, ZeroNormError
from wn_surgery.model import layouts
from wn_surgery.model.gathering import FSDP2, gather, release
from wn_surgery.model.sites import NormedSite, is_folded, whole
from wn_surgery.model.undo import Snapshot
from wn_surgery.norm.cuts import is_dtensor, on_any_rank, own_part, write
from wn_surgery.norm.math import builds_graph, real_dtype
from wn_surgery.norm.module_class import (
    FOLDED,
    base_class,
    class_for,
    computed_names,
    is_managed,
)
from wn_surgery.norm.parametrization import parts_of
from wn_surgery.norm.slots import NotCopied

__all__ = ["folded", "writable"]

_LOCK = threading.RLock()
_is_compiling = torch.compiler.is_dynamo_compiling


def _parametrized(module: nn.Module) -> frozenset[str]:
    lists = module._modules.get("parametrizations")
    return frozenset(lists if isinstance(lists, nn.ModuleDict) else ())


def _forget(module: nn.Module, param: str) -> None:
    """No context holds the parameter any more."""
    held = FOLDED.get(module, {})
    held.pop(param, None)
    if not held:
        FOLDED.pop(module, None)


def _refresh(found: list[NormedSite]) -> None:
    for module in dict.fromkeys(site.module for site in found):
        layouts.refresh(module)


# Reading --------------------------------------------------------------------------------


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
        with _LOCK:
            found = whole(model)
            units = gather((site.held.g, site.held.v) for site in found if _is_cut(site))
            for site in found:
                fold = _fold_of(site)
                fold.enter()
                entered.append((site.name, fold))
            _refresh(found)
        yield
    finally:
        with _LOCK:
            replaced = [name for name, fold in reversed(entered) if not fold.leave()]
            release(units)
            _refresh(found)
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
        self._show(value)

    def leave(self) -> bool:
        """Drop this context's value and say whether it was in its place; the last one restores."""
        mine = self._values[get_ident()]
        in_place = self._is_shown(mine.pop())
        if not mine:
            del self._values[get_ident()]
        if self._values:
            self._show((mine or next(iter(self._values.values())))[-1])
        else:
            _forget(self._module, self._param)
            self._end()
        return in_place

    def _begin(self) -> None:
        """Make the module read the value."""
        module = self._module
        self._list = cast(nn.ModuleDict, module._modules["parametrizations"])[self._param]
        self._list.__dict__["hold"] = self
        self._class, self._names = type(module), _parametrized(module)
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
        """Exchange the value."""
        self.traced = value

    def _is_shown(self, value: Tensor) -> bool:  # noqa: ARG002 - the other fold needs it
        """Whether nobody has put something else in its place."""
        return True  # the module's class refuses to exchange it

    def _end(self) -> None:
        """Make the module compute its weight again."""
        self._list.__dict__.pop("hold", None)
        # Where parametrizations have come or gone since, the old class would have properties too
        # few or too many.
        cls, now = self._class, _parametrized(self._module)
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


# Writing --------------------------------------------------------------------------------


@contextmanager
def writable(model: nn.Module) -> Generator[None]:
    """Inside, every weight of ``model`` is a plain Parameter; on exit g and v follow it.

    So ``nn.init``, ``copy_``, ``.data``, ``reset_parameters`` and a model's own ``_init_weights``
    take effect, which torch's weight norm drops without a word. A weight that was not written
    keeps its g and v bit for bit. g and v stay the same Parameters, and ``model.to`` moves them.

    Args:
        model: any module tree, any layouts. Inside another ``writable`` this does nothing.

    Raises:
        ModelError: the model is inside ``folded``; or, on exit, the body has deleted a weight, or
            added or removed a parametrization. Also for surgery inside.
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
    opened: dict[int, _Opened] = {}
    weights: list[_Weight] = []
    written: list[_Values | None] | None = None
    try:
        with _LOCK:
            found = whole(model, written=True)
            for site in found:
                if is_folded(site.node):
                    where = f"{site.name} is inside folded() or writable() now"
                    raise ModelError(f"{where}; leave that context first", kind="folded")
            opened = {id(site.module): _Opened(site.module) for site in found}
            made: dict[int, nn.Parameter] = {}
            for site in found:
                weight = _Weight(site, made)
                weights.append(weight)
                FOLDED.setdefault(site.module, {})[site.param] = weight
                order = layouts.clear(site.module, site.param)
                layouts.put_plain(site.module, site.param, weight.parameter, order)
            _refresh(found)
            for module in opened.values():
                module.is_open({site.param for site in found if site.module is module.module})
        yield
        read = [weight.read_back() for weight in weights]
        for site in found:
            if not opened[id(site.module)].is_intact():
                raise ModelError(
                    f"parametrizations of {site.node.paths[0] or type(model).__name__} were added "
                    "or removed inside writable(), where its weights are plain; the module is as "
                    "it was on entry; do that before or after the context",
                    kind="folded",
                )
        written = read
    finally:
        with _LOCK:
            for weight in weights:
                _forget(weight.site.module, weight.site.param)
            for module in opened.values():
                module.close()
            with torch.no_grad():
                # None is written unless the body and every check went through.
                new = written or [weight.moved(weight.parameter) for weight in weights]
                exchanged: dict[int, nn.Parameter] = {}
                for weight, values in zip(weights, new, strict=True):
                    if values is not None:
                        weight.settle(values, exchanged)
            _refresh(found)


_Values: TypeAlias = tuple[Tensor, Tensor]
"""The values of g and v."""


class _Weight:
    """One weight that is a plain Parameter for a while; tied ends share the one in ``made``."""

    def __init__(self, site: NormedSite, made: dict[int, nn.Parameter]) -> None:
        self.site = site
        self._g, self._v = site.held.g, site.held.v
        self.parameter = made.setdefault(id(self._v), site.held.weight())
        self._before = self.parameter.detach().clone()

    def read_back(self) -> _Values | None:
        """What g and v are to be; ``None`` where they stay as they are."""
        name = self.site.name
        now = self.site.module._parameters.get(self.site.param)
        if now is None:
            raise ModelError(
                f"{name} is not a Parameter any more: it was deleted or parametrized inside "
                "writable(); write into it or assign a Parameter, or remove weight norm first",
                kind="folded",
            )
        weight = now.detach()
        # Integers and 8-bit floats have no norm, and sparse tensors none along an axis.
        dense = weight.layout is torch.strided and not weight.is_quantized
        floating = weight.is_floating_point() or weight.is_complex()
        if not dense or not floating or weight.element_size() == 1:
            raise ValueError(
                f"{name} has dtype {weight.dtype} and layout {weight.layout} now; expected a dense "
                "floating-point one of 16 bits or more; remove weight norm first to store it so"
            )
        if is_dtensor(weight) != is_dtensor(self._before):
            raise ValueError(
                f"{name} is a {type(weight).__name__} now; expected a {type(self._before).__name__}"
                "; write into it, or assign one of its kind"
            )
        if weight.shape != self._before.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)} now; expected "
                f"{tuple(self._before.shape)}; remove weight norm first to change the shape"
            )
        if self._is_unwritten(weight):
            return self.moved(weight)
        try:
            weight = weight if _differ(weight, self._before) else weight.to(self._v)
            return parts_of(weight, self.site.norm)
        except ZeroNormError as error:
            raise ZeroNormError(f"{name}: {error}") from error

    def _is_unwritten(self, weight: Tensor) -> bool:
        if weight.is_meta or self._before.is_meta:
            return weight.is_meta
        part, before = own_part(weight), own_part(self._before)
        # Unlike torch.equal, this takes the NaNs of a diverged model as unchanged.
        same = torch.allclose(part, before.to(part), rtol=0.0, atol=0.0, equal_nan=True)
        return not on_any_rank(not same, weight)

    def moved(self, weight: Tensor) -> _Values | None:
        """Both in the dtype and on the device of ``weight``; ``None`` if they are there."""
        # Not as compared with v: a weight may be computed in another dtype than v has.
        if not _differ(weight, self._before):
            return None
        g = self._g.detach().to(weight.device, real_dtype(weight.dtype))
        return g, self._v.detach().to(weight)

    def settle(self, values: _Values, exchanged: dict[int, nn.Parameter]) -> None:
        """Write the values; ``exchanged`` has new Parameters by the ids of those they replace."""
        moves = _differ(values[1], self._v)
        for parameter, value in zip((self._g, self._v), values, strict=True):
            if not moves:
                write(parameter, value)
            elif parameter.is_meta != value.is_meta:  # no assignment leads out of meta
                new = exchanged.setdefault(id(parameter), nn.Parameter(value, False))
                self._exchange(parameter, new)
            else:
                parameter.data = value
                if parameter.grad is not None:
                    parameter.grad.data = parameter.grad.to(value)

    def _exchange(self, old: nn.Parameter, new: nn.Parameter) -> None:
        new.requires_grad_(old.requires_grad)
        layouts.hand_over(old, new)
        owner = self.site.module
        if self.site.layout == "parametrized":
            owner = cast(nn.ModuleDict, owner._modules["parametrizations"])[self.site.param]
        for key, parameter in owner._parameters.items():
            if parameter is old:
                owner._parameters[key] = new


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.dtype != other.dtype or one.device != other.device


def _properties(cls: type) -> dict[str, property]:
    return {name: value for name, value in vars(cls).items() if isinstance(value, property)}


class _Opened:
    """A module whose weights are open: puts back what opening took out, keeps what the body did."""

    _CONTAINERS = ("_parameters", "_modules", "_forward_pre_hooks", "_load_state_dict_pre_hooks")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._before = Snapshot(module)
        self._lists = module._modules.get("parametrizations")
        self._lists_before = None if self._lists is None else Snapshot(self._lists)
        # torch's functions write into the tensor that they parametrize, and edit its class.
        inner = () if self._lists is None else self._lists.parameters()
        own = [p for p in (*module._parameters.values(), *inner) if p is not None]
        self._data = [(parameter, parameter.data) for parameter in own]
        self._properties = _properties(type(module))
        self._ours: dict[str, set[str]] = {}

    def is_open(self, params: set[str]) -> None:
        """The module's ``params`` are open now: what differs from before is to be put back."""
        self._params = params
        self._open = type(self.module), _parametrized(self.module)
        for key in self._CONTAINERS:
            self._ours[key] = self._before.contents[key].keys() ^ self.module.__dict__[key].keys()

    def is_intact(self) -> bool:
        """Whether the body has left the open weights and the parametrizations in their places."""
        return (
            bool(self._ours)
            and (type(self.module), _parametrized(self.module)) == self._open
            and all(self.module._parameters.get(param) is not None for param in self._params)
        )

    def close(self) -> None:
        """Put the layout back; where the module is half open or not intact, all of it."""
        if not self.is_intact():
            self._restore_all()
            return
        for key, ours in self._ours.items():
            now, before = self.module.__dict__[key], self._before.contents[key]
            kept = {name: value for name, value in now.items() if name not in ours}
            old = {n: kept.get(n, value) for n, value in before.items() if n in ours or n in kept}
            now.clear()
            now.update(old | kept)
        if self._lists is not None and self._lists_before is not None:
            self._lists._modules.clear()
            self._lists._modules.update(self._lists_before.contents["_modules"])
        for name, value in self._before.attributes.items():
            if isinstance(value, Tensor):
                self.module.__dict__.setdefault(name, value)
        object.__setattr__(self.module, "__class__", self._before.cls)

    def _restore_all(self) -> None:
        if self._lists_before is not None:
            self._lists_before.restore()
        self._before.restore()
        for parameter, data in self._data:
            if not _differ(parameter, data):
                parameter.data = data
        cls, properties = self._before.cls, self._properties
        for name in _properties(cls).keys() - properties.keys():
            delattr(cls, name)
        for name in properties.keys() - vars(cls).keys():
            setattr(cls, name, properties[name])
