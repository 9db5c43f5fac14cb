"""What ``writable`` opens: weights that g and v follow, and modules that are closed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError, ZeroNormError
from wn_surgery.model import layouts
from wn_surgery.model.sites import NormedSite
from wn_surgery.model.undo import Snapshot
from wn_surgery.norm.module_class import FOLDED, base_class, class_for
from wn_surgery.norm.parametrization import parts_of

__all__ = ["Opened", "Pair", "Weight", "forget", "parametrized", "restore_class"]

Pair: TypeAlias = tuple[Tensor, Tensor]
"""The values of g and v."""


def parametrized(module: nn.Module) -> frozenset[str]:
    """The parameters that the module's class computes."""
    lists = module._modules.get("parametrizations")
    return frozenset(lists) if isinstance(lists, nn.ModuleDict) else frozenset[str]()


def restore_class(module: nn.Module, before: type[nn.Module], names: frozenset[str]) -> None:
    """Give the module the class it had ``before``, when its class computed ``names``.

    Where parametrizations have come or gone since, that class would have properties too few
    or too many, and one of ours takes its place.
    """
    now = parametrized(module)
    cls = before
    if now != names:
        cls = base_class(module)
        cls = class_for(cls, now) if now else cls
    object.__setattr__(module, "__class__", cls)


def forget(module: nn.Module, param: str) -> None:
    """The parameter is held by no context any more."""
    held = FOLDED.get(module, {})
    held.pop(param, None)
    if not held:
        FOLDED.pop(module, None)


class Weight:
    """One weight that is a plain Parameter for a while, and the g and v that follow it.

    Args:
        site: where it is.
        made: the Parameters by the id of v, so that tied ends get the same one.
    """

    def __init__(self, site: NormedSite, made: dict[int, nn.Parameter]) -> None:
        self.site = site
        self._g, self._v = site.held.g, site.held.v
        self.parameter = made.setdefault(id(self._v), site.held.weight())
        self._before = self.parameter.detach().clone()

    def read_back(self) -> Pair | None:
        """What g and v are to be; ``None`` where they stay as they are."""
        name = self.site.name
        now = self.site.module._parameters.get(self.site.param)
        if now is None:
            raise ModelError(
                f"{name} is no Parameter any more: it was deleted or parametrized inside "
                "writable(); write into it or assign a Parameter, or remove weight norm first",
                kind="folded",
            )
        weight = now.detach()
        # Integers and 8-bit floats have no norm, and sparse tensors none along an axis.
        dense = weight.layout is torch.strided and not weight.is_quantized
        if (
            not dense
            or not (weight.is_floating_point() or weight.is_complex())
            or (weight.element_size() == 1)
        ):
            raise ValueError(
                f"{name} was replaced by a tensor of dtype {weight.dtype} and layout "
                f"{weight.layout}; expected a dense floating-point one of 16 bits or more; remove "
                "weight norm first to store it otherwise"
            )
        if weight.shape != self._before.shape:
            raise ValueError(
                f"{name} was replaced by a tensor of shape {tuple(weight.shape)}; expected "
                f"{tuple(self._before.shape)}; remove weight norm first to change the shape"
            )
        if self._is_unwritten(weight):
            return self.moved(weight)
        try:
            weight = weight if self._has_moved(weight) else weight.to(self._v)
            return parts_of(weight, self.site.norm)
        except ZeroNormError as error:
            raise ZeroNormError(f"{name}: {error}") from error

    def _is_unwritten(self, weight: Tensor) -> bool:
        if weight.is_meta or self._before.is_meta:
            return weight.is_meta
        # Unlike torch.equal, this takes the NaNs of a diverged model as unchanged.
        before = self._before.to(weight)
        return torch.allclose(weight, before, rtol=0.0, atol=0.0, equal_nan=True)

    def _has_moved(self, weight: Tensor) -> bool:
        # Not as compared with v: a weight may be computed in another dtype than v has.
        return _differ(weight, self._before)

    def moved(self, weight: Tensor) -> Pair | None:
        """Their values in the dtype and on the device of ``weight``; ``None`` if they are there."""
        if not self._has_moved(weight):
            return None
        real = weight.dtype.to_real() if weight.dtype.is_complex else weight.dtype
        return self._g.detach().to(weight.device, real), self._v.detach().to(weight)

    def settle(self, pair: Pair, exchanged: dict[int, nn.Parameter]) -> None:
        """Make ``pair`` the values of g and v, which move if the weight has moved.

        Args:
            pair: the values.
            exchanged: the Parameters that took the place of others, by the id of those.
        """
        moves = _differ(pair[1], self._v)
        for parameter, value in zip((self._g, self._v), pair, strict=True):
            if not moves:
                parameter.copy_(value)
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
        module, held = self.site.module, self.site.held
        owner = module
        if held.layout == "parametrized":
            owner = cast(nn.ModuleDict, module._modules["parametrizations"])[self.site.param]
        for key, parameter in owner._parameters.items():
            if parameter is old:
                owner._parameters[key] = new


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.dtype != other.dtype or one.device != other.device


class Opened:
    """Puts back what opening a module took out, and leaves alone what the body changed."""

    _CONTAINERS = ("_parameters", "_modules", "_forward_pre_hooks", "_load_state_dict_pre_hooks")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._whole = Snapshot(module)
        self._lists = module._modules.get("parametrizations")
        self._whole_lists = None if self._lists is None else Snapshot(self._lists)
        self._class, self._names = type(module), parametrized(module)
        self._before = {key: dict(entries) for key, entries in self._containers()}
        self._weights = {k: v for k, v in module.__dict__.items() if isinstance(v, Tensor)}
        self._ours: dict[str, set[str]] = {}
        self._params: set[str] = set()

    def _containers(self) -> Iterator[tuple[str, dict[Any, Any]]]:
        lists = self.module._modules.get("parametrizations")
        yield "parametrizations", lists._modules if isinstance(lists, nn.ModuleDict) else {}
        for key in self._CONTAINERS:
            yield key, self.module.__dict__[key]

    def note(self, params: set[str]) -> None:
        """The module's ``params`` are open: what differs from before is ours to put back."""
        self._params = params
        for key, entries in self._containers():
            self._ours[key] = self._before[key].keys() ^ entries.keys()
        if self._lists is not None:  # also where the body takes the last one out of it
            self._ours["_modules"].add("parametrizations")

    def close(self) -> None:
        """Put the layout back."""
        # Half open, or no more what was opened: there is nothing to put in its place.
        if not self._ours or any(self.module._parameters.get(p) is None for p in self._params):
            if self._whole_lists is not None:
                self._whole_lists.restore()
            self._whole.restore()
            return
        for key, now in self._containers():
            into = now
            if key == "parametrizations" and self._lists is not None:
                into = cast("dict[Any, Any]", self._lists._modules)
            merged = _merge(now, self._before[key], self._ours[key])
            into.clear()
            into.update(merged)
        for name, weight in self._weights.items():
            self.module.__dict__.setdefault(name, weight)
        restore_class(self.module, self._class, self._names)


def _merge(now: Mapping[Any, Any], before: Mapping[Any, Any], ours: set[str]) -> dict[Any, Any]:
    """What is there ``now``, with ``ours`` as they were ``before`` and in their old places."""
    kept = {key: value for key, value in now.items() if key not in ours}
    old = {key: kept.get(key, value) for key, value in before.items() if key in ours or key in kept}
    return old | kept
