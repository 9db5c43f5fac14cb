"""Walk a module tree: every parameter that carries, or could carry, weight norm."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError
from wn_surgery.model.gathering import FSDP2, held_by_fsdp
from wn_surgery.model.holders import FSDP1, ZERO3, axes, holder, in_parts, whole_shape
from wn_surgery.model.layouts import Foreign, Normed, SiteLayout, carried
from wn_surgery.norm.math import PLAIN_TYPES
from wn_surgery.norm.module_class import FOLDED, beneath
from wn_surgery.norm.naming import keys_for
from wn_surgery.norm.options import Dim, NormOptions

__all__ = [
    "Node",
    "NormedSite",
    "Site",
    "as_module",
    "normed",
    "sites",
    "sites_of",
    "walk",
    "whole",
]

_T = TypeVar("_T")

# The attribute under which a wrapper keeps what it wraps, by the wrapper's dotted name, which is
# compared along the MRO: so nothing needs to be imported to know it.
_FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
_DEEPSPEED = "deepspeed.runtime.engine.DeepSpeedEngine"
_CHECKPOINT = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper"
_TRANSPARENT = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    _FSDP: "_fsdp_wrapped_module",
    _DEEPSPEED: "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    _CHECKPOINT: "_checkpoint_wrapped_module",
}
# Wrappers that hold references to the parameters they were given.
_HOLDERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "DistributedDataParallel",
    _FSDP: FSDP1,
    _DEEPSPEED: "DeepSpeed",
    "torch.distributed.fsdp.FSDPModule": FSDP2,
}
# Modules that read the parameters of these children without calling them, so that no hook on the
# children runs. (The fast path of nn.TransformerEncoderLayer does too, but not where a hook is.)
_QKV = ("q_proj", "k_proj", "v_proj")
_READERS = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torch.ao.nn.quantizable.modules.activation.MultiheadAttention": (),
    "transformers.models.wavlm.modeling_wavlm.WavLMAttention": (*_QKV, "out_proj"),
    "diffusers.models.embeddings.HunyuanDiTAttentionPool": (*_QKV, "c_proj"),
}


@dataclass(eq=False, slots=True)
class Node:
    """One module of the tree.

    ``paths`` are all dotted paths to it, without the segments of wrappers, the first as in
    ``named_modules``; ``base`` is its class beneath any parametrized class; ``wrapped`` names the
    data-parallel wrapper that holds its parameters; ``uncalled`` says that a parent reads its
    parameters without calling it, so that hooks never run.
    """

    module: nn.Module
    paths: list[str]
    base: type[nn.Module]
    wrapped: str | None
    uncalled: bool = False


@dataclass(eq=False, slots=True)  # not frozen, which makes it twice as slow to build
class Site:
    """One parameter of one module: a place where weight norm is, or could be.

    Attributes:
        node: the module and its paths.
        param: the parameter's name in its module.
        held: how g and v are stored; a ``Foreign`` for what something other than weight norm
            alone computes; ``None`` for a plain parameter.
        tensor: the plain weight, or v; ``None`` for a ``Foreign``.
    """

    node: Node
    param: str
    held: Normed | Foreign | None
    tensor: Tensor | None = field(repr=False)

    @property
    def module(self) -> nn.Module:
        """The module that owns the parameter."""
        return self.node.module

    @property
    def names(self) -> tuple[str, ...]:
        """Every dotted name of the parameter, e.g. ``('encoder.0.weight',)``."""
        return tuple(map(self._name, self.node.paths))

    @property
    def name(self) -> str:
        """The first of :attr:`names`."""
        return self._name(self.node.paths[0])

    def _name(self, path: str) -> str:
        return f"{path}.{self.param}" if path else self.param

    @property
    def layout(self) -> SiteLayout:
        """``plain``, ``legacy``, ``parametrized``, or ``other`` (not weight norm alone)."""
        return "plain" if self.held is None else self.held.layout

    @property
    def normed(self) -> bool:
        """Whether the parameter carries weight norm that can be removed."""
        return isinstance(self.held, Normed)

    @property
    def ours(self) -> bool:
        """Whether this library put the weight norm on."""
        return isinstance(self.held, Normed) and self.held.maker == "wn_surgery"

    @property
    def norm(self) -> NormOptions | None:
        """dim, eps and norm_dtype of the weight norm it carries."""
        return self.held.norm if isinstance(self.held, Normed) else None

    @property
    def dim(self) -> Dim:
        """The axes with a norm of their own; ``None`` for one norm, and for plain sites."""
        return None if self.norm is None else self.norm.dim

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape; empty where it is unknown."""
        if self.tensor is None or nn.parameter.is_lazy(self.tensor) or self.tensor.is_nested:
            return ()
        return whole_shape(self.tensor)

    @property
    def holder(self) -> str | None:
        """What keeps references to its parameters, so that they cannot be exchanged."""
        # The mark first: it knows more than the class of a wrapper.
        return holder(self.tensor) or self.node.wrapped

    def to_dict(self) -> dict[str, Any]:
        """The site as plain JSON data."""
        norm = self.norm
        return {
            "names": list(self.names),
            "type": self.node.base.__name__,
            "layout": self.layout,
            "shape": list(self.shape),
            "dtype": None if self.tensor is None else str(self.tensor.dtype).split(".")[-1],
            "maker": None if self.held is None else self.held.maker,
            "dim": None if norm is None else norm.dim,
            "eps": None if norm is None else norm.eps,
        }


@dataclass(eq=False, slots=True)
class NormedSite(Site):
    """A site that carries weight norm: what may be ``None`` in a site is there."""

    # Nobody assigns to them, which is what pyright fears.
    held: Normed  # pyright: ignore[reportIncompatibleVariableOverride]
    tensor: Tensor = field(repr=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def norm(self) -> NormOptions:
        """dim, eps and norm_dtype."""
        return self.held.norm


def normed(model: nn.Module) -> list[NormedSite]:
    """The weight-normed parameters in any layout, in the order of ``model.named_modules()``."""
    return [site for node in walk(model) for site in sites_of(node) if isinstance(site, NormedSite)]


def whole(model: nn.Module, *, written: bool = False) -> list[NormedSite]:
    """As :func:`normed`, for who needs the values of g and v, or also writes them.

    A ``WrappedModuleError`` where an engine has cut them so that no rank can use its part.
    """
    found: list[NormedSite] = []
    for node in walk(model):
        for site in sites_of(node):
            if how := _why_not_whole(site, written):
                raise ModelError(
                    f"{site.name} is held by {site.holder}, {how}", kind="wrapped", site=site.name
                )
            if isinstance(site, NormedSite):
                found.append(site)
    return found


def _why_not_whole(site: Site, written: bool) -> str:
    """Why g and v have no values that can be used, as the end of a sentence."""
    by = site.holder
    if isinstance(site, NormedSite):
        if written and by is not None and "DeepSpeed" in by:
            return (
                "which has copies of g and v and writes them over yours at its next step; do this "
                "before deepspeed.initialize, outside zero.Init"
            )
        if not in_parts(site.tensor):
            return ""
    # What is left of our weight norm where g and v are no Parameters (use_orig_params=False).
    elif by != FSDP1 or not (isinstance(site.held, Foreign) and "WeightNorm" in site.held.maker):
        return ""
    inside = (
        "deepspeed.zero.GatheredParameters(list(model.parameters()))"
        if by == ZERO3
        else "FullyShardedDataParallel.summon_full_params(model)"
    )
    return (
        "which has cut g and v, so that this rank has no whole slices; do this before it takes the "
        f"model, or, without a forward, on every rank inside {inside}"
    )


def sites(model: nn.Module) -> list[Site]:
    """What carries, or could carry, weight norm.

    Args:
        model: any module tree.

    Returns:
        The weight-normed parameters in any layout and the plain floating ones with at least two
        dimensions, in the order of ``model.named_modules()``; a shared module once.

    Example:
        >>> import wn_surgery as wn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> [(site.name, site.layout) for site in wn.sites(model)]
        [('0.weight', 'plain')]
    """
    return [site for node in walk(model) for site in sites_of(node) if site.normed or could(site)]


def could(site: Site) -> bool:
    """Whether a plain site may carry weight norm without being asked for by name."""
    tensor = site.tensor
    if site.held is not None or tensor is None:
        return False
    if nn.parameter.is_lazy(tensor):
        return True
    return axes(tensor) >= 2 and (tensor.is_floating_point() or tensor.is_complex())


def sites_of(node: Node, wanted: Callable[[str], object] = bool) -> list[Site]:
    """The parameters of one module of a ``wanted`` name: plain ones, then computed ones."""
    module = node.module
    found = [
        Site(node, name, None, parameter)
        for name, parameter in module._parameters.items()
        if parameter is not None and wanted(name)
    ]
    # A model has many modules, and most compute no parameter.
    if "parametrizations" not in module._modules and not module._forward_pre_hooks:
        return found
    held = carried(module)
    legacy = [name for name, how in held.items() if how.layout == "legacy"]
    parts = {key for name in legacy for key in keys_for(name, "legacy")}
    found = [site for site in found if site.param not in parts]
    for name, how in held.items():
        if not wanted(name):
            continue
        if isinstance(how, Normed):
            found.append(NormedSite(node, name, how, how.v))
        else:
            found.append(Site(node, name, how, None))
    return found


def as_module(model: object) -> nn.Module:
    """The model; a ``TypeError`` if it is not one, but for example a class, a list or ``None``."""
    if isinstance(model, nn.Module):
        return model
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    advice = "; make an object of it" if isinstance(model, type) else ""
    raise TypeError(f"expected a model, which is an nn.Module; got {got}{advice}")


def walk(model: nn.Module) -> list[Node]:
    """Every module of the tree once, in the order of ``named_modules``, with all its paths.

    Modules inside ``parametrizations`` are left out: they are storage, not layers.
    """
    found = _Walk()
    found.visit(as_module(model), "", None)
    nodes = list(found.nodes.values())
    _mark_sharded(nodes)
    return nodes


def _mark_sharded(nodes: list[Node]) -> None:
    """Mark what FSDP2 holds where the model is only a part of what ``fully_shard`` was given."""
    held = held_by_fsdp()
    for node in nodes if held else ():
        lists = node.module._modules.get("parametrizations")
        own = [*node.module._parameters.values(), *(lists.parameters() if lists else ())]
        if node.wrapped is None and any(id(parameter) in held for parameter in own):
            node.wrapped = FSDP2


class _Walk:
    # Not a function in a function: one that calls itself is a cycle, by which the model it
    # saw would outlive its last user until the collector comes by.
    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self._active: set[int] = set()
        # A model has many modules of few classes.
        self._kinds: dict[type[nn.Module], _Kind] = {}

    def visit(
        self, module: nn.Module, path: str, wrapped: str | None, uncalled: bool = False
    ) -> None:
        """Add ``module``, which is at ``path``, and what is below it."""
        identity, cls = id(module), type(module)
        kind = self._kinds.get(cls)
        if kind is None:
            kind = self._kinds[cls] = _Kind.of(cls)
        if kind.scripted or identity in self._active:
            return
        wrapped = kind.holder or wrapped
        node = self.nodes.get(identity)
        if node is None:
            self.nodes[identity] = Node(module, [path], kind.base, wrapped, uncalled)
        else:
            node.uncalled |= uncalled
            if path not in node.paths:
                node.paths.append(path)
        children = module._modules
        if not children:
            return
        self._active.add(identity)
        prefix = f"{path}." if path else ""
        for name, child in children.items():
            if child is None or (name == "parametrizations" and isinstance(child, nn.ModuleDict)):
                continue
            below = path if name == kind.transparent else prefix + name
            self.visit(child, below, wrapped, name in kind.read)
        self._active.discard(identity)


class _Kind(NamedTuple):
    """What the walk has to know of a class."""

    base: type[nn.Module]
    transparent: str | None
    holder: str | None
    read: tuple[str, ...]
    scripted: bool

    @classmethod
    def of(cls, kind: type[nn.Module]) -> _Kind:
        return cls(
            beneath(kind),
            _find(kind, _TRANSPARENT),
            _find(kind, _HOLDERS),
            _find(kind, _READERS) or (),
            issubclass(kind, torch.jit.ScriptModule),
        )


def identity(tensor: Tensor) -> Hashable:
    """Equal for what is one tensor while it lives: the same object, or the same memory."""
    if not has_address(tensor) or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def has_address(tensor: Tensor) -> bool:
    """Whether it is of torch's own classes, and dense."""
    return type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided


def is_folded(node: Node) -> bool:
    """Whether the module is inside ``folded`` or ``writable`` now."""
    return bool(FOLDED) and node.module in FOLDED  # mostly empty, which is quicker to ask


def _find(cls: type, table: Mapping[str, _T]) -> _T | None:
    for base in cls.__mro__:
        found = table.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found
    return None
