"""Weights as plain Parameters for a while, which g and v then follow: the context ``writable``."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError, ZeroNormError
from wn_surgery.model import layouts
from wn_surgery.model.sites import NormedSite, is_folded, whole
from wn_surgery.model.undo import Snapshot
from wn_surgery.norm.cuts import is_dtensor, on_any_rank, own_part, write
from wn_surgery.norm.math import real_dtype
from wn_surgery.norm.module_class import FOLDED, FOLDED_LOCK, forget
from wn_surgery.norm.parametrization import parts_of

__all__ = ["writable"]


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
        with FOLDED_LOCK:
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
            layouts.refresh_all(site.module for site in found)
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
        with FOLDED_LOCK:
            for weight in weights:
                forget(weight.site.module, weight.site.param)
            for module in opened.values():
                module.close()
            with torch.no_grad():
                # None is written unless the body and every check went through.
                new = written or [weight.moved(weight.parameter) for weight in weights]
                exchanged: dict[int, nn.Parameter] = {}
                for weight, values in zip(weights, new, strict=True):
                    if values is not None:
                        weight.settle(values, exchanged)
            layouts.refresh_all(site.module for site in found)


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
        self._open = type(self.module), layouts.parametrized_names(self.module)
        for key in self._CONTAINERS:
            self._ours[key] = self._before.contents[key].keys() ^ self.module.__dict__[key].keys()

    def is_intact(self) -> bool:
        """Whether the body has left the open weights and the parametrizations in their places."""
        return (
            bool(self._ours)
            and (type(self.module), layouts.parametrized_names(self.module)) == self._open
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
