"""The class of a module whose weight is computed: it reads, writes, loads and pickles it.

torch's own ``is_parametrized``, ``type_before_parametrizations`` and ``remove_parametrizations``
work on it. But torch makes a class for each module and refuses to pickle it. Here one class is
shared by all modules of a base class that carry the same parameters, and never changes.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable
from importlib import import_module
from threading import get_ident
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError, ZeroNormError
from wn_surgery.norm.drafts import following
from wn_surgery.norm.naming import NormedLayout, keys_for
from wn_surgery.norm.options import NormOptions
from wn_surgery.norm.parametrization import WeightNorm, is_weight_norm, parts_of
from wn_surgery.norm.slots import NEAR
from wn_surgery.norm.writers import follow_writes, is_writer

__all__ = [
    "FOLDED",
    "FOLDED_LOCK",
    "adopt",
    "base_class",
    "beneath",
    "class_for",
    "computed_names",
    "forget",
    "is_managed",
]

_is_compiling = torch.compiler.is_dynamo_compiling
_modules = sys.modules

FOLDED: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""The modules inside ``folded`` or ``writable`` now, and their parameters held as tensors."""
FOLDED_LOCK = threading.RLock()
"""Held by a thread that enters or leaves one of the two."""


def forget(module: nn.Module, param: str) -> None:
    """Neither context holds the parameter any more."""
    held = FOLDED.get(module, {})
    held.pop(param, None)
    if not held:
        FOLDED.pop(module, None)


def is_managed(cls: type) -> bool:
    """Whether ``cls`` is one of the classes that :func:`class_for` makes."""
    # Not by the metaclass, which FSDP2's subclass of a shared class inherits.
    return "_weight_norm_names" in vars(cls)


def computed_names(cls: type) -> tuple[str, ...]:
    """The parameters that a class made by :func:`class_for` computes, itself."""
    return tuple(name for name, value in vars(cls).items() if _computes(value))


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class beneath every parametrized class, torch's or ours."""
    return beneath(type(module))


def beneath(cls: type[nn.Module]) -> type[nn.Module]:
    """A class without the parametrized classes that are made of it, torch's or ours."""
    while is_managed(cls) or _is_torch_parametrized(cls):
        cls = cls.__bases__[0]
    return cls


def class_for(base: type[nn.Module], names: Iterable[str]) -> type[nn.Module]:
    """The class of modules of class ``base`` whose parameters ``names`` are computed.

    One for each (base, names), while in use; named like torch's, ``Parametrized<base>``. ``base``
    is first in its ``__bases__``, where torch's ``type_before_parametrizations`` looks for it.
    """
    key = (base, tuple(sorted(set(names))))
    cls = _CLASSES.get(key)
    if cls is None:
        cls = _CLASSES[key] = _make_class(*key)
    return cls


_CLASSES: WeakValueDictionary[tuple[type, tuple[str, ...]], type[nn.Module]] = WeakValueDictionary()


class _SharedMeta(type):
    """Keeps the shared classes as they are, though torch's functions edit a module's class."""

    def __delattr__(cls, name: str) -> None:
        if _computes(cls.__dict__.get(name)):
            return
        # What torch had parametrized before is computed by torch's class, further down.
        owner = next((base for base in cls.__mro__ if name in vars(base)), cls)
        if owner is not cls and _is_torch_parametrized(owner):
            delattr(owner, name)
        else:
            super().__delattr__(name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if isinstance(value, property) and not _computes(value):
            value = _computed(name)
        super().__setattr__(name, value)


def _computes(value: object) -> bool:
    """Whether an attribute of a class is a property that :func:`_computed` has made."""
    # By a mark: the compiler of torch 2.6 follows no subclass of property.
    return isinstance(value, property) and hasattr(value.fget, "computes")


def _computed(name: str) -> property:
    """A parameter that the instance's parametrization computes, if it has one."""

    def get(self: Any) -> Tensor:
        # torch.compile must look neither at the slot nor at the thread.
        compiling = _is_compiling()
        if (
            not compiling
            and (near := self.__dict__.get(NEAR)) is not None
            and (mine := near.get(name)) is not None
            and mine.thread == get_ident()
            and not ("peft" in _modules and is_writer(sys._getframe(1)))
        ):
            return cast(Tensor, mine.weight)
        lists = self.__dict__["_modules"].get("parametrizations")
        plist = None if lists is None else lists._modules.get(name)
        if plist is not None:
            if compiling:
                hold = getattr(plist, "hold", None)
                traced: Tensor | None = None if hold is None else hold.traced
                return cast(Tensor, plist()) if traced is None else traced
            weight: Tensor | None = None
            # Read past nn.Module's own lookup: this is asked at each access.
            held = plist.__dict__
            if (hold := held.get("hold")) is not None:
                weight = hold.weight()
            if weight is None and (slot := held.get("slot")) is not None:
                weight = slot.weight()
            weight = cast(Tensor, plist()) if weight is None else weight
            # The frame that reads the weight: a property has no other between.
            if "peft" in _modules and is_writer(sys._getframe(1)):
                return follow_writes(weight, self, name)
            return weight
        return _held(self, name)

    def put(self: Any, value: object) -> None:
        if not _carries(self, name):
            self.__dict__[name] = value
            return
        _refuse_if_held(self, name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is weight-normed; expected a tensor, got {type(value)}")
        self.parametrizations[name].right_inverse(value)

    cast(Any, get).computes = True
    return property(get, put, lambda self: _drop(self, name))


def _held(module: nn.Module, name: str) -> Tensor:
    # torch may have given the shared class this name for another of its modules: here it is then a
    # plain attribute or a Parameter. nn.Module.__getattr__ would find the latter as well, but
    # torch.compile does not ask it after a property has raised.
    for held in (module.__dict__, module.__dict__["_parameters"]):
        if name in held:
            return cast(Tensor, held[name])
    raise AttributeError(name)


def _drop(module: nn.Module, name: str) -> None:
    """Delete a name that is not computed here: what FSDP1 puts in the place of a Parameter."""
    if _carries(module, name):
        raise AttributeError(f"property {name!r} of {type(module).__name__!r} has no deleter")
    if name not in module.__dict__:
        raise AttributeError(name)
    del module.__dict__[name]


def _carries(module: nn.Module, name: str) -> bool:
    held = module.__dict__["_modules"].get("parametrizations")
    return held is not None and name in held


def _make_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    managed = frozenset(names)

    # Defined here and not in a mixin: the base must come first in __bases__ and would win.
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        if name in managed and isinstance(value, Tensor) and _carries(self, name):
            # nn.Module refuses a Parameter where a property is; tie_weights assigns one.
            object.__setattr__(self, name, value)
        else:
            base.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:  # noqa: N807
        if name in managed and _carries(self, name):
            _refuse_if_held(self, name)
        base.__delattr__(self, name)

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:  # noqa: N807
        return _reduce(self, base, protocol)

    def _load_from_state_dict(
        self: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        _adopt_layouts(self, state_dict, prefix, local_metadata, errors)
        base._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )

    # What writes into the weight that it reads from here takes effect, as on a plain layer.
    def apply(self: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
        with following(self):
            return base.apply(self, fn)

    namespace: dict[str, Any] = {
        "_weight_norm_names": names,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
        "__reduce_ex__": __reduce_ex__,
        "_load_from_state_dict": _load_from_state_dict,
        "apply": apply,
        **{name: _computed(name) for name in names},
    }
    for initializer in ("reset_parameters", "_reset_parameters"):
        if hasattr(base, initializer):
            namespace[initializer] = _resetting(base, initializer)
    name, metaclass = f"Parametrized{base.__name__}", _meta_for(cast(Any, type(base)))
    # In two steps, since ``__init_subclass__`` of the user's class is meant for classes that people
    # write: it may want arguments, or put the class into a registry.
    made = metaclass(name, (nn.Module,), namespace)
    try:
        made.__bases__ = (base,)
    except TypeError:  # it has slots, or another layout in memory than nn.Module
        made = metaclass(name, (base,), namespace)
    return cast("type[nn.Module]", made)


def _resetting(base: type[nn.Module], initializer: str) -> Callable[..., Any]:
    """The module's own initializer, with the effect that it has on a plain layer."""

    def reset(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # In a room above, which an unpickled model has not imported.
        with import_module("wn_surgery.model.writing").writable(self):
            return getattr(base, initializer)(self, *args, **kwargs)

    return reset


def _refuse_if_held(module: nn.Module, name: str) -> None:
    # The first question is for torch.compile, which cannot follow the second.
    if getattr(cast(Any, module.parametrizations)[name], "hold", None) is not None and (
        name in FOLDED.get(module, ())
    ):
        raise ModelError(
            f"{base_class(module).__name__}.{name} is inside folded() now, where it is only read; "
            "write to it inside writable(), or leave the context first",
            kind="folded",
        )


@functools.cache
def _meta_for(metaclass: type) -> Callable[..., type]:
    """The metaclass, joined with the base's own where that is not plain ``type``."""
    if issubclass(_SharedMeta, metaclass):
        return _SharedMeta
    return type("_SharedMeta", (_SharedMeta, metaclass), {})


def _is_torch_parametrized(cls: type) -> bool:
    # torch marks its classes by nothing but what it puts in them.
    refuses = getattr(vars(cls).get("__getstate__"), "__module__", "")
    return cls.__name__.startswith("Parametrized") and refuses == "torch.nn.utils.parametrize"


# Pickle and deepcopy ----------------------------------------------------------------


def _reduce(module: nn.Module, base: type[nn.Module], protocol: int) -> tuple[Any, ...]:
    with torch.no_grad():
        reduced = cast("tuple[Any, ...]", base.__reduce_ex__(module, max(protocol, 2)))
    constructor, args, state, *rest = reduced
    if isinstance(state, dict):
        left_out = {*FOLDED.get(module, ()), NEAR}
        state = {k: value for k, value in state.items() if k not in left_out}
        if "_flat_weights" in state:
            # What an RNN read from its properties; with a graph it could not be copied.
            read = state["_flat_weights"]
            state["_flat_weights"] = [w if w is None else w.detach() for w in read]
    # None where somebody has called the class of another layer, as PEFT does for its convolutions.
    names = tuple(module.__dict__["_modules"].get("parametrizations", ()))
    # The shared class cannot be pickled by name; the base takes its place.
    constructor = base if constructor is type(module) else constructor
    args = tuple(base if arg is type(module) else arg for arg in args)
    return (_rebuild, (base, names, constructor, args), state, *rest)


def _rebuild(
    base: type[nn.Module], names: tuple[str, ...], constructor: Callable[..., nn.Module], args: Any
) -> nn.Module:
    module = constructor(*args)
    if names:
        module.__class__ = class_for(base, names)
    return module


# State dicts of other layouts ---------------------------------------------------------


def _adopt_layouts(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, errors: list[str]
) -> None:
    """Rewrite plain and legacy keys as those of g and v here."""
    for name, plist in module.__dict__["_modules"].get("parametrizations", {}).items():
        if is_weight_norm(plist):
            now = plist.original0.detach(), plist.original1.detach()
            norm = cast(WeightNorm, plist[0]).options
            adopt(state_dict, prefix + name, "parametrized", now, norm, metadata, errors)


def adopt(
    state_dict: dict[str, Any],
    weight: str,
    layout: NormedLayout,
    now: tuple[Tensor, Tensor],
    norm: NormOptions,
    metadata: Any,
    errors: list[str],
) -> None:
    """Rewrite a plain ``weight``, or g and v of the other layout, as g and v of this one.

    ``weight`` is the plain key, and ``now`` are the g and v that the module has.
    """
    here = keys_for(weight, layout)
    there = keys_for(weight, "legacy" if layout == "parametrized" else "parametrized")
    if all(key in state_dict for key in there):
        for key, other in zip(here, there, strict=True):
            state_dict[key] = state_dict.pop(other)
    elif weight in state_dict and not set(here) & state_dict.keys():
        assign = bool(metadata.get("assign_to_params_buffers"))
        *parts, error = _split(state_dict.pop(weight), now, norm, assign)
        state_dict.update(zip(here, parts, strict=True))
        if error:
            errors.append(f"{weight}: {error}")


def _split(
    weight: Any, now: tuple[Tensor, Tensor], norm: NormOptions, assign: bool
) -> tuple[Any, Any, str]:
    """The g and v of a plain ``weight`` from a state dict; those of now, where it has none."""
    if not isinstance(weight, Tensor) or weight.shape != now[1].shape:
        # torch reports the type or the shape as that of original1; g must not look missing too.
        return now[0], weight, ""
    if weight.is_meta and not (assign or now[1].is_meta):
        return *now, "the checkpoint's tensor is on the meta device and has no values to load"
    if weight.is_complex() and not now[1].is_complex():
        return *now, f"expected a real tensor, got one of dtype {weight.dtype}"
    if not (assign or now[1].is_meta):
        # g must be the norm of the values that v will hold, not of wider ones.
        weight = weight.to(dtype=now[1].dtype, device=now[1].device)
    if not (weight.is_floating_point() or weight.is_complex()):
        return *now, f"expected a floating-point tensor to assign, got {weight.dtype}"
    try:
        return parts_of(weight, norm)[0], weight, ""
    except (ModelError, ZeroNormError) as error:
        return *now, str(error)
