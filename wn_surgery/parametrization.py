"""The WeightNorm parametrization, and the module class that computes the weight.

From outside this is torch's layout: ``module.parametrizations.weight.original0`` is g and
``original1`` is v, and torch's own ``is_parametrized``, ``type_before_parametrizations``
and ``remove_parametrizations`` work. Inside, torch makes a class for each module, deletes
properties from it on removal and refuses to pickle it. Here one class is shared by all
modules of a base class that carry the same parameters, and never changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .errors import ZeroNormError
from .norm import Dim, magnitude, weight_norm, zero_slices

__all__ = [
    "WeightNorm",
    "WeightNormList",
    "base_class",
    "class_for",
    "computed_names",
    "is_managed",
]

FOLDED: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""The modules inside ``folded`` or ``writable`` now, and their parameters held as tensors."""


class WeightNorm(nn.Module):
    """The parametrization (g, v) → g · v / max(‖v‖, eps).

    Args:
        dim: the axes of the weight that keep a norm of their own, ``None`` for the
            whole tensor.
        eps: lower clamp of the norm, in the units of the weight.
        norm_dtype: the dtype the norm and product are computed in; ``None``: the weight's.

    Example:
        >>> import torch
        >>> from wn_surgery.parametrization import WeightNorm
        >>> norm = WeightNorm(dim=0)
        >>> g, v = norm.right_inverse(torch.randn(4, 3))
        >>> g.shape, norm(g, v).shape
        (torch.Size([4, 1]), torch.Size([4, 3]))
    """

    def __init__(
        self, dim: Dim = 0, eps: float = 0.0, norm_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.norm_dtype = norm_dtype

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight; see :func:`wn_surgery.norm.weight_norm`."""
        return weight_norm(v, g, self.dim, self.eps, self.norm_dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The g and v that give ``weight``; v is a copy, never an alias.

        Raises:
            ZeroNormError: a slice of ``weight`` has no direction and ``eps`` is 0.
        """
        if self.eps == 0.0 and not weight.is_meta and (bad := zero_slices(weight, self.dim)):
            raise ZeroNormError(
                f"the new weight has {bad} slice(s) of zero or non-finite norm along "
                f"dim={self.dim}; write a weight without them, or apply weight norm with eps > 0"
            )
        g = magnitude(weight, self.dim, self.eps, self.norm_dtype)
        return g, weight.detach().clone(memory_format=torch.preserve_format)

    @classmethod
    @functools.cache
    def options(
        cls, dim: Dim = 0, eps: float = 0.0, norm_dtype: torch.dtype | None = None
    ) -> WeightNorm:
        """A shared instance that only stands for its options; modules get their own."""
        return cls(dim, eps, norm_dtype)

    def same_as(self, other: WeightNorm) -> bool:
        """Whether both compute the same function."""
        return (self.dim, self.eps, self.norm_dtype) == (other.dim, other.eps, other.norm_dtype)

    def extra_repr(self) -> str:
        """The options that differ from torch's defaults, and ``dim``."""
        parts = [f"dim={self.dim}"]
        if self.eps != 0.0:
            parts.append(f"eps={self.eps}")
        if self.norm_dtype is not None:
            parts.append(f"norm_dtype={self.norm_dtype}")
        return ", ".join(parts)


class WeightNormList(ParametrizationList):
    """What stands at ``module.parametrizations.<name>``: g, v and the parametrization.

    Unlike its base it takes g and v as they are, so that Parameters keep their identity,
    and it copies into them on assignment instead of aliasing the assigned tensor.

    Args:
        norm: the options; the list makes a parametrization of its own from them.
        g: the magnitude, registered as ``original0``.
        v: the direction, registered as ``original1``.
        order: the names in the module's ``_parameters`` before surgery, so that removal
            can put the weight back in its place.
    """

    def __init__(
        self, norm: WeightNorm, g: nn.Parameter, v: nn.Parameter, order: Iterable[str] = ()
    ) -> None:
        nn.ModuleList.__init__(self, [WeightNorm(norm.dim, norm.eps, norm.norm_dtype)])
        self.unsafe = True
        self.is_tensor = False
        self.ntensors = 2
        self.order = tuple(order)
        self.original0 = g
        self.original1 = v

    def forward(self) -> Tensor:
        """The weight; later parametrizations that torch stacked on it are applied too."""
        if len(self) > 1:
            return super().forward()
        norm = cast(WeightNorm, self[0])
        return weight_norm(self.original1, self.original0, norm.dim, norm.eps, norm.norm_dtype)

    def right_inverse(self, value: Tensor) -> None:
        """Set g and v, in place, so that the weight becomes ``value``.

        Raises:
            ValueError: ``value`` has another shape than the weight.
            ZeroNormError: see :meth:`WeightNorm.right_inverse`.
        """
        if len(self) > 1:
            super().right_inverse(value)
            return
        if value.shape != self.original1.shape:
            raise ValueError(
                f"expected a weight of shape {tuple(self.original1.shape)}, "
                f"got {tuple(value.shape)}; remove weight norm first to change the shape"
            )
        with torch.no_grad():
            value = value.detach().to(self.original1)
            g, v = cast(WeightNorm, self[0]).right_inverse(value)
            self.original0.copy_(g)
            self.original1.copy_(v)


def is_managed(cls: type) -> bool:
    """Whether ``cls`` is one of the classes that :func:`class_for` makes."""
    # Not by the metaclass, which FSDP2's subclass of a shared class inherits.
    return "_weight_norm_names" in vars(cls)


def computed_names(cls: type) -> tuple[str, ...]:
    """The parameters that a class made by :func:`class_for` computes, itself."""
    return tuple(name for name, value in vars(cls).items() if isinstance(value, _Computed))


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class beneath every parametrized class, torch's or ours."""
    cls = type(module)
    while is_managed(cls) or _is_torch_parametrized(cls):
        cls = cls.__bases__[0]
    return cls


def class_for(base: type[nn.Module], names: Iterable[str]) -> type[nn.Module]:
    """The class of modules of class ``base`` whose parameters ``names`` are computed.

    One object for each (base, names), made at first use and kept while in use.

    Args:
        base: any module class; it stands first in the result's ``__bases__``, where
            torch's ``type_before_parametrizations`` looks for it.
        names: parameter names. Empty gives a class that computes nothing, which
            ``folded`` uses.

    Returns:
        A subclass of ``base`` named like torch's, ``Parametrized<base>``.
    """
    key = (base, tuple(sorted(set(names))))
    cls = _CLASSES.get(key)
    if cls is None:
        cls = _CLASSES[key] = _make_class(*key)
    return cls


_CLASSES: WeakValueDictionary[tuple[type, tuple[str, ...]], type[nn.Module]] = WeakValueDictionary()


class _SharedMeta(type):
    """Keeps the shared classes as they are, whatever torch's functions do to them.

    ``remove_parametrizations`` deletes the property from the class and
    ``register_parametrization`` adds one; either would reach every module of the class.
    """

    def __delattr__(cls, name: str) -> None:
        if not isinstance(cls.__dict__.get(name), _Computed):
            super().__delattr__(name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if isinstance(value, property) and not isinstance(value, _Computed):
            value = _computed(name)
        super().__setattr__(name, value)


class _Computed(property):
    """A parameter that the instance's parametrization computes, if it has one."""


def _computed(name: str) -> _Computed:
    def get(self: Any) -> Tensor:
        if _carries(self, name):
            return cast(Tensor, self.parametrizations[name]())
        # Torch may have given the shared class this name for another of its modules: here it
        # is then a plain attribute, or a Parameter, which nn.Module.__getattr__ finds.
        if name in self.__dict__:
            return cast(Tensor, self.__dict__[name])
        raise AttributeError(name)

    def put(self: Any, value: object) -> None:
        if not _carries(self, name):
            self.__dict__[name] = value
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is weight-normed; expected a tensor, got {type(value)}")
        self.parametrizations[name].right_inverse(value)

    return _Computed(get, put)


def _carries(module: nn.Module, name: str) -> bool:
    held = module.__dict__["_modules"].get("parametrizations")
    return held is not None and name in held


def _make_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    managed = frozenset(names)

    # Defined here and not in a mixin: the base must come first in __bases__ and would win.
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        # nn.Module refuses a Parameter where a property stands; tie_weights assigns one.
        if name in managed and isinstance(value, Tensor) and _carries(self, name):
            cast(Any, self.parametrizations)[name].right_inverse(value)
        else:
            base.__setattr__(self, name, value)

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:  # noqa: N807
        return _reduce(self, base, protocol)

    def _load_from_state_dict(
        self: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        _adopt_layouts(self, state_dict, prefix, local_metadata, error_msgs)
        base._load_from_state_dict(
            self,
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    namespace: dict[str, Any] = {
        "_weight_norm_names": names,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__setattr__": __setattr__,
        "__reduce_ex__": __reduce_ex__,
        "_load_from_state_dict": _load_from_state_dict,
        **{name: _computed(name) for name in names},
    }
    return cast(
        type[nn.Module],
        _meta_for(type(base))(f"Parametrized{base.__name__}", (base,), namespace),
    )


def _meta_for(metaclass: type) -> Callable[..., type]:
    """The metaclass, joined with the base's own where that is not plain ``type``."""
    if issubclass(_SharedMeta, metaclass):
        return _SharedMeta
    if metaclass not in _METACLASSES:
        _METACLASSES[metaclass] = type("_SharedMeta", (_SharedMeta, metaclass), {})
    return _METACLASSES[metaclass]


_METACLASSES: dict[type, type] = {}


def _is_torch_parametrized(cls: type) -> bool:
    # torch marks its classes by nothing but what it puts in them.
    return (
        cls.__name__.startswith("Parametrized")
        and getattr(cls.__dict__.get("__getstate__"), "__module__", "")
        == "torch.nn.utils.parametrize"
    )


# Pickle and deepcopy ----------------------------------------------------------------


def _reduce(module: nn.Module, base: type[nn.Module], protocol: int) -> tuple[Any, ...]:
    with torch.no_grad():
        reduced = cast("tuple[Any, ...]", base.__reduce_ex__(module, max(protocol, 2)))
    constructor, args, state, *rest = reduced
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if key not in FOLDED.get(module, ())}
        if "_flat_weights" in state:
            # What an RNN read from its properties; with a graph it could not be copied.
            state["_flat_weights"] = [
                w if w is None else w.detach() for w in state["_flat_weights"]
            ]
    names = tuple(module.__dict__["_modules"]["parametrizations"])
    # The shared class cannot be pickled by name; the base stands in for it.
    constructor = base if constructor is type(module) else constructor
    args = tuple(base if arg is type(module) else arg for arg in args)
    return (_rebuild, (base, names, constructor, args), state, *rest)


def _rebuild(
    base: type[nn.Module],
    names: tuple[str, ...],
    constructor: Callable[..., nn.Module],
    args: tuple[Any, ...],
) -> nn.Module:
    module = constructor(*args)
    module.__class__ = class_for(base, names)
    return module


# State dicts of other layouts ---------------------------------------------------------


def _is_weight_norm(plist: Any) -> TypeGuard[WeightNormList]:
    return isinstance(plist, WeightNormList) and len(plist) == 1


def _adopt_layouts(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    error_msgs: list[str],
) -> None:
    """Rewrite a plain ``weight`` or a legacy ``weight_g``, ``weight_v`` as g and v here."""
    for name, plist in module.__dict__["_modules"].get("parametrizations", {}).items():
        if not _is_weight_norm(plist):
            continue
        g_key = f"{prefix}parametrizations.{name}.original0"
        v_key = f"{prefix}parametrizations.{name}.original1"
        plain, legacy = prefix + name, (f"{prefix}{name}_g", f"{prefix}{name}_v")
        if all(key in state_dict for key in legacy):
            state_dict[g_key] = state_dict.pop(legacy[0])
            state_dict[v_key] = state_dict.pop(legacy[1])
        elif plain in state_dict and not {g_key, v_key} & state_dict.keys():
            weight = state_dict.pop(plain)
            assign = bool(local_metadata.get("assign_to_params_buffers"))
            g, v, error = _split(weight, plist, assign)
            state_dict[g_key], state_dict[v_key] = g, v
            if error:
                error_msgs.append(f"{plain}: {error}")


def _split(weight: Any, plist: WeightNormList, assign: bool) -> tuple[Any, Any, str]:
    """The g and v of a plain ``weight`` from a state dict; those of now, where it has none."""
    now = plist.original0.detach(), plist.original1.detach()
    if not isinstance(weight, Tensor) or weight.shape != now[1].shape:
        # torch reports the type or the shape as that of original1; g must not look missing too.
        return now[0], weight, ""
    if weight.is_meta and not (assign or now[1].is_meta):
        return *now, "the checkpoint's tensor is on the meta device and has no values to load"
    if not (assign or now[1].is_meta):
        # g must be the norm of the values that v will hold, not of wider ones.
        weight = weight.to(dtype=now[1].dtype, device=now[1].device)
    if not (weight.is_floating_point() or weight.is_complex()):
        return *now, f"expected a floating-point tensor to assign, got {weight.dtype}"
    try:
        return cast(WeightNorm, plist[0]).right_inverse(weight)[0], weight, ""
    except ZeroNormError as error:
        return *now, str(error)
