"""Which path each weight takes, and why; and how weights are cut into groups."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from wn_surgery.fused.evaluator import Spec
from wn_surgery.fused.sharing import gradient_hooks, module_hooks_of
from wn_surgery.model.sites import NormedSite
from wn_surgery.norm.math import KERNEL_DTYPES, PLAIN_TYPES
from wn_surgery.norm.module_class import is_managed
from wn_surgery.norm.options import dtype_name
from wn_surgery.norm.parametrization import WeightNormList

__all__ = ["Choice", "Mode", "Path", "choose", "cut"]

Mode: TypeAlias = Literal["auto", "triton", "cpu", "native"]
Path: TypeAlias = Literal["triton", "cpu", "native", "off"]

# DDP's buckets: a larger group would hold back the gradients of a whole one.
_CUDA_BYTES = 25 * 2**20
# On the CPU a weight is best computed shortly before it is read, while it is in the cache.
_CPU_BYTES = 2**20
# Layers whose weight is read only where autocast converts it.
_CASTABLE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(eq=False)
class Choice:
    """What happens to one weight-normed parameter; the words are those of a Member."""

    site: NormedSite
    path: Path
    why: str = ""
    group: int | None = None

    @property
    def spec(self) -> Spec:
        """What its evaluator needs to know."""
        return Spec(tuple(self.site.tensor.shape), self.site.norm)

    @cached_property
    def plist(self) -> WeightNormList:
        """What holds g and v."""
        lists = cast(nn.ModuleDict, self.site.module._modules["parametrizations"])
        return cast(WeightNormList, lists[self.site.param])

    @property
    def castable(self) -> bool:
        """Whether autocast converts this weight wherever it is read."""
        base = self.site.node.base
        return (
            self.path == "triton"
            and self.site.param == "weight"
            and self.site.tensor.dtype == torch.float32
            and any(
                issubclass(base, kind)
                and base.forward is kind.forward
                and getattr(base, "_conv_forward", None) is getattr(kind, "_conv_forward", None)
                for kind in _CASTABLE
            )
        )


def choose(site: NormedSite, mode: Mode) -> Choice:
    """The path of one weight-normed parameter."""
    if why := _why_off(site):
        return Choice(site, "off", why)
    tensor = site.tensor
    if mode == "triton":
        triton = importlib.import_module("wn_surgery.fused.triton.evaluator")
        why = triton.why_not(tensor.device, tensor.dtype, Choice(site, "triton").spec)
        return Choice(site, "off", why) if why else Choice(site, "triton")
    if mode == "native":
        if tensor.device.type != "cpu":
            return Choice(site, "off", f"no compiled path on {tensor.device.type}")
        # fuse() has asked, but not here, if this is a copy that was unpickled.
        why = importlib.import_module("wn_surgery.fused.native.building").why_not()
        return Choice(site, "cpu", why) if why else Choice(site, "native")
    # "auto" does not take Triton's kernels on CUDA before a result in benchmarks/results shows
    # that they have run on a GPU.
    if mode == "auto" and tensor.device.type not in ("cpu", "cuda"):
        return Choice(site, "off", f"no fused path on {tensor.device.type}")
    return Choice(site, "cpu")


def _why_off(site: NormedSite) -> str:
    if site.node.wrapped not in (None, "DistributedDataParallel"):
        return f"its parameters are sharded by {site.node.wrapped}"
    if site.held.layout == "legacy":
        return "legacy layout: call wn_surgery.migrate(model) first"
    if not site.ours or not is_managed(type(site.module)):
        return f"its class is made by {site.held.maker}: call wn_surgery.migrate(model) first"
    if why := _why_not_tensors(site.held.g, site.held.v):
        return why
    plist = Choice(site, "off").plist
    if plist.__dict__.get("slot") is not None:
        return "another fused module above or below has it already"
    return "hooks run when its weight is computed" if any(module_hooks_of(plist)) else ""


def _why_not_tensors(g: Tensor, v: Tensor) -> str:
    for tensor in (g, v):
        if type(tensor) not in PLAIN_TYPES:
            return f"its parameters are of class {type(tensor).__name__}"
        if tensor.is_meta:
            return "its parameters are on the meta device"
        if tensor.is_inference():
            return "its parameters were made under torch.inference_mode()"
    if v.dtype not in KERNEL_DTYPES:
        return f"no fused path for {dtype_name(v.dtype)}"
    if g.dtype != v.dtype or g.device != v.device:
        return "g and v differ in dtype or device"
    return "" if v.numel() else "it has no elements"


def cut(choices: Sequence[Choice]) -> Iterator[list[Choice]]:
    """Groups: neighbours of one path, dtype, device and castability, up to a size.

    A weight with gradient hooks is a group by itself: see :func:`gradient_hooks`.
    """
    group: list[Choice] = []
    size = 0
    for choice in choices:
        if choice.path == "off":
            continue
        if gradient_hooks(choice.site.held.g, choice.site.held.v):
            yield [choice]
            continue
        weight = choice.site.tensor.nbytes
        limit = _CPU_BYTES if choice.site.tensor.device.type == "cpu" else _CUDA_BYTES
        if group and (_kind(group[0]) != _kind(choice) or size + weight > limit):
            yield group
            group, size = [], 0
        group.append(choice)
        size += weight
    if group:
        yield group


def _kind(choice: Choice) -> tuple[object, ...]:
    tensor = choice.site.tensor
    return choice.path, tensor.dtype, tensor.device, choice.castable
