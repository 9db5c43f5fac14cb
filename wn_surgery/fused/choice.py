"""Which path each weight takes, and why; and how weights are cut into groups."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from wn_surgery.fused.evaluator import Spec
from wn_surgery.fused.group import gradient_hooks, module_hooks_of
from wn_surgery.model.layouts import Normed
from wn_surgery.model.sites import Site
from wn_surgery.norm.math import KERNEL_DTYPES
from wn_surgery.norm.module_class import is_managed
from wn_surgery.norm.parametrization import WeightNormList

__all__ = ["Choice", "Mode", "Path", "choose", "cut", "is_castable"]

Mode: TypeAlias = Literal["auto", "triton", "cpu"]
Path: TypeAlias = Literal["triton", "cpu", "off"]

_PLAIN_TYPES = frozenset({torch.Tensor, nn.Parameter})
# DDP's buckets: a larger group would hold back the gradients of a whole one.
_CUDA_BYTES = 25 * 2**20
# On the CPU a weight is best computed shortly before it is read, while it is in the cache.
_CPU_BYTES = 2**20
# What autocast converts the weight of, and nothing else reads it.
_CASTABLE = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(eq=False)
class Choice:
    """What happens to one weight-normed parameter.

    Attributes:
        site: the parameter.
        path: ``triton``, ``cpu``, or ``off``: computed as if nothing were fused.
        why: the reason for ``off``.
    """

    site: Site
    path: Path
    why: str = ""

    @property
    def spec(self) -> Spec:
        """What its evaluator needs to know."""
        norm, tensor = self.site.norm, self.site.tensor
        assert norm is not None and tensor is not None  # a choice is about a normed site
        return Spec(tuple(tensor.shape), *norm)

    @property
    def tensor(self) -> Tensor:
        """V."""
        assert self.site.tensor is not None  # a choice is about a normed site
        return self.site.tensor

    @property
    def plist(self) -> WeightNormList:
        """What holds g and v."""
        lists = self.site.module._modules["parametrizations"]
        assert isinstance(lists, nn.ModuleDict)
        plist = lists[self.site.param]
        assert isinstance(plist, WeightNormList)
        return plist


def choose(site: Site, mode: Mode) -> Choice:
    """The path of one weight-normed parameter.

    Args:
        site: a site with ``normed`` true.
        mode: ``auto``: Triton on CUDA, the CPU path on the CPU; otherwise that path.
    """
    if why := _why_off(site):
        return Choice(site, "off", why)
    choice = Choice(site, "cpu")
    device = choice.tensor.device
    if mode == "cpu" or (mode == "auto" and device.type == "cpu"):
        return choice
    if mode == "auto" and device.type != "cuda":
        return Choice(site, "off", f"no fused path on {device.type}")
    triton = importlib.import_module("wn_surgery.fused.triton")
    why = triton.why_not(device, choice.tensor.dtype, choice.spec)
    return Choice(site, "off", why) if why else Choice(site, "triton")


def _why_off(site: Site) -> str:
    held, module = site.held, site.module
    assert isinstance(held, Normed)  # a choice is about a normed site
    if site.node.wrapped not in (None, "DistributedDataParallel"):
        return f"its parameters are sharded by {site.node.wrapped}"
    if held.layout == "legacy":
        return "legacy layout: call wn_surgery.migrate(model) first"
    if held.maker != "wn_surgery" or not is_managed(type(module)):
        return f"its class is made by {held.maker}: call wn_surgery.migrate(model) first"
    if why := _why_not_tensors(held.g, held.v):
        return why
    plist = Choice(site, "off").plist
    if plist.__dict__.get("slot") is not None:
        return "another fused module above or below has it already"
    return "hooks run when its weight is computed" if any(module_hooks_of(plist)) else ""


def _why_not_tensors(g: Tensor, v: Tensor) -> str:
    for tensor in (g, v):
        if type(tensor) not in _PLAIN_TYPES:
            return f"its parameters are of class {type(tensor).__name__}"
        if tensor.is_meta:
            return "its parameters are on the meta device"
        if tensor.is_inference():
            return "its parameters were made under torch.inference_mode()"
    if g.dtype != v.dtype or g.device != v.device:
        return "g and v differ in dtype or device"
    if v.dtype not in KERNEL_DTYPES:
        return f"no fused path for {str(v.dtype).removeprefix('torch.')}"
    if v.numel() == 0:
        return "it has no elements"
    return ""


def cut(choices: Sequence[Choice]) -> Iterator[list[Choice]]:
    """Groups: neighbours of one path, dtype, device and castability, up to a size.

    Whoever has gradient hooks is a group by itself: see :func:`gradient_hooks`.
    """
    group: list[Choice] = []
    size = 0
    for choice in choices:
        if choice.path == "off":
            continue
        weight = choice.tensor.nbytes
        if _has_gradient_hooks(choice):
            yield [choice]
            continue
        limit = _CPU_BYTES if choice.tensor.device.type == "cpu" else _CUDA_BYTES
        if group and (_kind(group[0]) != _kind(choice) or size + weight > limit):
            yield group
            group, size = [], 0
        group.append(choice)
        size += weight
    if group:
        yield group


def _has_gradient_hooks(choice: Choice) -> bool:
    plist = choice.plist
    return gradient_hooks((plist.original0, plist.original1))


def _kind(choice: Choice) -> tuple[object, ...]:
    tensor = choice.tensor
    return choice.path, tensor.dtype, tensor.device, is_castable(choice)


def is_castable(choice: Choice) -> bool:
    """Whether autocast converts this weight wherever it is read."""
    base, tensor = choice.site.node.base, choice.tensor
    return (
        choice.path == "triton"
        and choice.site.param == "weight"
        and tensor.dtype == torch.float32
        and any(
            issubclass(base, kind)
            and base.forward is kind.forward
            and getattr(base, "_conv_forward", None) is getattr(kind, "_conv_forward", None)
            for kind in _CASTABLE
        )
    )
