"""The three ways a weight-normed parameter is stored: reading them, and moving between them.

Each edit here changes one parameter of one module and may stop half-way; callers take a
:class:`wn_surgery.model.undo.Snapshot` first.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm as TorchParametrization
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

from wn_surgery.norm.module_class import adopt, base_class, class_for, computed_names, is_managed
from wn_surgery.norm.naming import Layout, NormedLayout, keys_for
from wn_surgery.norm.options import NormOptions
from wn_surgery.norm.parametrization import WeightNorm, WeightNormList
from wn_surgery.norm.slots import note_change

__all__ = [
    "Foreign",
    "Normed",
    "SiteLayout",
    "carried",
    "clear",
    "leftovers",
    "parametrized_names",
    "put_plain",
    "refresh_all",
]

_Order: TypeAlias = Sequence[str]
SiteLayout: TypeAlias = Layout | Literal["other"]


@dataclass(frozen=True, eq=False)
class Normed:
    """How a weight-normed parameter is stored.

    ``maker`` is what computes the weight: ``torch``, ``wn_surgery``, or a dotted class name;
    ``compute`` returns the weight as its maker computes it; ``g_init`` is what a rule has filled
    g with, where that is known, and ``renormalize`` what a rule wants v put back to.
    """

    layout: NormedLayout
    maker: str
    g: nn.Parameter
    v: nn.Parameter
    norm: NormOptions
    compute: Callable[[], Tensor]
    g_init: float | None = None
    renormalize: float | str | None = None

    def computed(self) -> Tensor:
        """The weight: same bits as the last forward's, laid out like v."""
        with torch.no_grad():
            w = self.compute()
            if w.stride() != self.v.stride():
                w = torch.empty_like(self.v).copy_(w)
        return w.detach()

    def parameter(self, weight: Tensor) -> nn.Parameter:
        """The Parameter that takes the place of g and v."""
        made = nn.Parameter(weight, self.g.requires_grad or self.v.requires_grad)
        hand_over(self.v, made)
        return made

    def weight(self) -> nn.Parameter:
        """The weight as that Parameter."""
        return self.parameter(self.computed())


@dataclass(frozen=True, eq=False)
class Foreign:
    """A parameter that something else computes, with dotted class names, joined by `` + ``."""

    layout: ClassVar[Literal["other"]] = "other"

    maker: str


def hand_over(source: Tensor, target: Tensor) -> None:
    """Give ``target`` the attributes that users and frameworks have set on ``source``."""
    for name, value in vars(source).items():
        setattr(target, name, value)


# Reading --------------------------------------------------------------------------------


def carried(module: nn.Module) -> dict[str, Normed | Foreign]:
    """The parameters of ``module`` itself that are computed from others, by name."""
    held: dict[str, Normed | Foreign] = {}
    lists = module.__dict__["_modules"].get("parametrizations")
    if isinstance(lists, nn.ModuleDict):
        held = {name: _read_parametrized(plist) for name, plist in lists.items()}
    for entry in module.__dict__["_forward_pre_hooks"].values():
        hook = getattr(entry, "folds", entry)  # what replaces a hook inside folded()
        # Pruning keeps the name in _tensor_name; every other torch hook in name.
        name: Any = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if not isinstance(name, str):
            continue
        if found := _read_legacy(module, hook, name):
            held[name] = found
        elif f"{name}_orig" in module._parameters:
            held[name] = Foreign(_dotted(type(hook)))
    return held


def _read_parametrized(plist: Any) -> Normed | Foreign:
    first = plist[0]
    parameters = plist._parameters
    if len(plist) == 1 and {"original0", "original1"} <= parameters.keys():
        g, v = parameters["original0"], parameters["original1"]
        if isinstance(first, WeightNorm):
            return Normed(
                "parametrized", "wn_surgery", g, v, first.options, plist, *_of_training(plist)
            )
        if type(first).__name__.endswith("WeightNorm") and hasattr(first, "dim"):
            maker = "torch" if type(first) is TorchParametrization else _dotted(type(first))
            return Normed("parametrized", maker, g, v, _options(first.dim, v), plist)
    stacked = (child for key, child in plist._modules.items() if key.isdigit())
    return Foreign(" + ".join(_dotted(type(child)) for child in stacked))


def _read_legacy(module: nn.Module, hook: Any, name: str) -> Normed | None:
    g, v = (module._parameters.get(key) for key in keys_for(name, "legacy"))
    if g is None or v is None or not (hasattr(hook, "compute_weight") and hasattr(hook, "dim")):
        return None
    maker = "torch" if type(hook) is LegacyHook else _dotted(type(hook))

    def compute() -> Tensor:
        return cast(Tensor, hook.compute_weight(module))

    return Normed("legacy", maker, g, v, _options(hook.dim, v), compute, *_of_training(hook))


def _of_training(holder: Any) -> tuple[float | None, float | str | None]:
    """What a rule has said about g and v, on the list or the hook: see :func:`note`."""
    return getattr(holder, "g_init", None), getattr(holder, "renormalize", None)


def _options(dim: int | None, v: Tensor) -> NormOptions:
    """The options for torch's ``dim``: -1 is the whole tensor, while -2 is an axis."""
    if dim is None or dim == -1:
        return NormOptions(None)
    return NormOptions(dim + v.ndim if dim < 0 else dim)


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# Editing --------------------------------------------------------------------------------


def clear(module: nn.Module, name: str) -> tuple[str, ...]:
    """Take parameter ``name`` out of any layout; the order of all where it is plain again."""
    drop_load_hooks(module, name)
    if name in module._parameters:
        order = tuple(module._parameters)
        del module._parameters[name]
        return order
    if name in module.__dict__["_modules"].get("parametrizations", ()):
        return _clear_parametrized(module, name)
    return _clear_legacy(module, name)


def _clear_parametrized(module: nn.Module, name: str) -> tuple[str, ...]:
    note_change()
    lists = cast(nn.ModuleDict, module._modules["parametrizations"])
    order = plain_order(module, name, module._parameters)
    remaining = [other for other in lists if other != name]
    cls: type[nn.Module]
    if not remaining:
        cls = base_class(module)
    elif is_managed(type(module)) and name in computed_names(type(module)):
        below = cast("type[nn.Module]", type(module).__bases__[0])
        ours = [other for other in remaining if other in computed_names(type(module))]
        cls = class_for(below, ours) if ours else below
    else:
        cls = class_for(base_class(module), remaining)
    del lists[name]
    if not remaining:
        del module._modules["parametrizations"]
    object.__setattr__(module, "__class__", cls)
    return order


def _clear_legacy(module: nn.Module, name: str) -> tuple[str, ...]:
    order = plain_order(module, name, module._parameters)
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "name", None) == name and _read_legacy(module, hook, name):
            del module._forward_pre_hooks[key]
    for part in keys_for(name, "legacy"):
        del module._parameters[part]
    module.__dict__.pop(name, None)
    return order


def plain_order(module: nn.Module, name: str, registered: Iterable[str]) -> tuple[str, ...]:
    """The order of the module's parameters once ``name`` joins the ``registered`` ones as plain."""
    lists = module.__dict__["_modules"].get("parametrizations", {})
    hooks: list[Any] = [getattr(each, "folds", each) for each in module._forward_pre_hooks.values()]
    named = [hook for hook in hooks if getattr(hook, "name", None) == name]
    makers = [lists[name]] if name in lists else named
    known = next((each.order for each in makers if getattr(each, "order", ())), ())
    return tuple(known) or _usual_order(module, name, registered)


def put_plain(module: nn.Module, name: str, weight: nn.Parameter, order: Iterable[str]) -> None:
    """Register ``weight`` as a plain parameter, in its place in ``order``."""
    module.register_parameter(name, weight)
    known, own = list(order), _own_order(module)
    for key in own:
        # Others had taken it out when the order was noted.
        if key in module._parameters and key not in known:
            after = own[own.index(key) + 1 :]
            known.insert(next((known.index(k) for k in after if k in known), len(known)), key)
    rank = {key: i for i, key in enumerate(known)}
    # Names unknown to the order were registered since; they come last, in their order.
    entries = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
    module._parameters.clear()
    module._parameters.update(entries)


def put_parametrized(
    module: nn.Module, name: str, norm: NormOptions, g: nn.Parameter, v: nn.Parameter, order: _Order
) -> None:
    """Register g and v under ``parametrizations`` and give the module a class that reads them."""
    note_change()
    if "parametrizations" not in module._modules:
        module.add_module("parametrizations", nn.ModuleDict().train(module.training))
    lists = cast(nn.ModuleDict, module._modules["parametrizations"])
    # With several parameters, only the first to leave saw the whole order.
    known: list[_Order] = [order, *(getattr(other, "order", ()) for other in lists.values())]
    longest: _Order = max(known, key=len)
    lists[name] = WeightNormList(norm, g, v, longest).train(module.training)
    cls = type(module)
    if is_managed(cls):
        ours = [other for other in computed_names(cls) if other in lists]
        cls = class_for(cast("type[nn.Module]", cls.__bases__[0]), [*ours, name])
    else:
        cls = class_for(cls, [name])
    object.__setattr__(module, "__class__", cls)


def put_legacy(
    module: nn.Module, name: str, norm: NormOptions, g: nn.Parameter, v: nn.Parameter, order: _Order
) -> None:
    """Register ``name_g``, ``name_v`` and the hook of ``torch.nn.utils.weight_norm``."""
    assert not isinstance(norm.dim, tuple)  # the plan has refused it
    for key, part in zip(keys_for(name, "legacy"), (g, v), strict=True):
        module.register_parameter(key, part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hook = LegacyHook(name, -1 if norm.dim is None else norm.dim)
    hook.order = tuple(order)  # type: ignore[attr-defined]
    with torch.no_grad():
        # As in torch, the attribute exists before the first forward. It has no graph, so that
        # the module can be deep-copied.
        module.__dict__[name] = hook.compute_weight(module)
    # Not by a number, as torch counts them anew in each process: a later hook would take the place
    # of one that was unpickled.
    module._forward_pre_hooks[cast(int, f"wn_surgery.{name}")] = hook


def note(module: nn.Module, name: str, held: Any) -> None:
    """Keep what a rule, or a site before it was moved, says about training g and v."""
    lists = module.__dict__["_modules"].get("parametrizations", {})
    hooks = cast("dict[Any, Any]", module._forward_pre_hooks)
    holder = lists[name] if name in lists else hooks[f"wn_surgery.{name}"]
    for key in ("g_init", "renormalize"):
        if (value := getattr(held, key)) is not None:
            setattr(holder, key, value)


def refresh(module: nn.Module) -> None:
    """Let modules that keep a list of their own weights (RNNs) read them again."""
    if not isinstance(module, nn.RNNBase):
        return
    # But not what others compute: in training spectral norm takes a step at each read.
    others = {name for name, how in carried(module).items() if isinstance(how, Foreign)}
    held: Any = module
    old = dict(zip(held._flat_weights_names, held._flat_weights, strict=False))
    with torch.no_grad():
        weights = [
            old[name] if name in others and name in old else getattr(module, name, None)
            for name in held._flat_weights_names
        ]
        # As in its _init_flat_weights().
        held._flat_weights = weights
        held._flat_weight_refs = [None if w is None else ref(w) for w in weights]
        module.flatten_parameters()


def refresh_all(modules: Iterable[nn.Module]) -> None:
    """The same for several modules, some of them named twice."""
    for module in dict.fromkeys(modules):
        refresh(module)


def parametrized_names(module: nn.Module) -> frozenset[str]:
    """The parameters that have a list of parametrizations, anybody's."""
    lists = module._modules.get("parametrizations")
    return frozenset(lists if isinstance(lists, nn.ModuleDict) else ())


def _own_order(module: nn.Module) -> tuple[str, ...]:
    """As torch's own layers register their parameters, where they have several; else empty."""
    if isinstance(module, nn.RNNBase):
        return tuple(module._flat_weights_names)
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    if isinstance(module, nn.MultiheadAttention):
        apart = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        rest = ("in_proj_bias", "bias_k", "bias_v")
        if module._qkv_same_embed_dim:
            return ("in_proj_weight", *apart, *rest)
        return (*apart, "in_proj_weight", *rest)
    return ()


def _usual_order(module: nn.Module, name: str, registered: Iterable[str]) -> tuple[str, ...]:
    """Where others took ``name`` out without leaving a note: as torch's own layers register it."""
    if own := _own_order(module):
        return own
    order = [key for key in registered if key not in keys_for(name, "legacy")]
    bias = name.replace("weight", "bias")
    order.insert(order.index(bias) if bias != name and bias in order else len(order), name)
    return tuple(order)


# Load hooks -----------------------------------------------------------------------------


def leftovers(module: nn.Module) -> list[str]:
    """The parameters whose weight norm is gone, and has left a load hook on the module."""
    hooks = module._load_state_dict_pre_hooks.values()
    names = dict.fromkeys(name for hook in hooks if (name := _loads(hook)) is not None)
    if not names:
        return []
    lists: Any = module._modules.get("parametrizations") or ()
    held = carried(module)
    return [name for name in names if name not in lists and name not in held]


class LoadHook:
    """Lets a parameter in the legacy layout load state dicts of the other layouts."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        _strict: bool,
        _missing: list[str],
        _unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Before the module reads its part of a state dict."""
        held = carried(module).get(self.name)
        if isinstance(held, Normed) and held.layout == "legacy":
            now = held.g.detach(), held.v.detach()
            adopt(state_dict, prefix + self.name, "legacy", now, held.norm, metadata, errors)


def put_load_hook(module: nn.Module, name: str) -> None:
    """Register a :class:`LoadHook`."""
    hooks = module._load_state_dict_pre_hooks
    handle = cast(Any, module).register_load_state_dict_pre_hook(LoadHook(name))
    hooks[cast(int, f"wn_surgery.{name}")] = hooks.pop(handle.id)  # not by a number: see put_legacy


def drop_load_hooks(module: nn.Module, name: str) -> None:
    """Remove the load hooks for ``name``: torch's, of which each call leaves one, and ours."""
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if _loads(hook) == name:
            del module._load_state_dict_pre_hooks[key]


def _loads(wrapped: Any) -> str | None:
    """The parameter for which a load hook is that of torch's weight_norm, or ours."""
    hook = getattr(wrapped, "hook", wrapped)
    if isinstance(hook, LoadHook):
        return hook.name
    if (
        getattr(hook, "__module__", None) != "torch.nn.utils.parametrizations"
        or getattr(hook, "__name__", None) != "_weight_norm_compat_hook"
    ):
        return None
    return cast("str | None", inspect.getclosurevars(hook).nonlocals.get("name"))
