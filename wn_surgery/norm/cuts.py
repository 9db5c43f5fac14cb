"""How a DTensor is cut over the ranks of a mesh, and what that means for its norms.

Where only kept axes are cut, each rank has all of its slices, and nothing is sent. Where a normed
axis is cut, each rank has a part of every slice, and one sum over the ranks finishes the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

from wn_surgery.norm.options import Dim, kept_axes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "Cut",
    "gathered",
    "is_dtensor",
    "on_any_rank",
    "own_part",
    "spread",
    "why_uncut",
    "write",
]


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. By name: importing the class costs most programs for nothing."""
    return type(tensor).__name__ == "DTensor"


class Cut:
    """How v is cut, as its norms see it.

    ``placements`` are those of g: cut as v along kept axes, the same everywhere else. ``total``
    sums over the ranks that share slices, in place; ``None`` where there are none.
    """

    def __init__(self, v: DTensor, dim: Dim) -> None:
        from torch.distributed.tensor import Replicate

        self.mesh, self.v_placements = v.device_mesh, v.placements
        kept = kept_axes(dim)
        placements: list[Any] = []
        self._groups: list[Any] = []  # of ranks that share slices
        self._others: list[Any] = []  # of ranks that have other slices
        for number, placement in enumerate(v.placements):
            axis = _axis(placement)
            placements.append(placement if axis is not None and axis in kept else Replicate())
            if axis is not None:
                groups = self._others if axis in kept else self._groups
                groups.append(self.mesh.get_group(number))
        self.placements = tuple(placements)
        self.total: Callable[[Tensor], Tensor] | None = self._total if self._groups else None

    def _total(self, sums: Tensor) -> Tensor:
        sums = sums.contiguous()
        for group in self._groups:
            dist.all_reduce(sums, group=group)
        return sums

    def count(self, slices: int, v: DTensor) -> int:
        """How many slices all ranks have together, of which this one has ``slices``."""
        return _sum_of(slices, self._others, v)

    def parts(self, v: DTensor, g: DTensor) -> tuple[Tensor, Tensor]:
        """This rank's parts of v and g, without a graph."""
        with torch.no_grad():
            return v.to_local(), _placed(g, self.placements).to_local()

    def part_of(self, weight: Tensor) -> Tensor:
        """This rank's part of a tensor of v's shape, which may come placed in another way."""
        return _placed(cast("DTensor", weight), self.v_placements).to_local()

    def weight(self, part: Tensor, v: DTensor) -> DTensor:
        """The whole of which ``part`` is this rank's part, placed as v."""
        return _whole(part, self.mesh, self.v_placements, v.shape)

    def magnitude(self, part: Tensor, shape: Sequence[int]) -> DTensor:
        """The same for g, of the given shape."""
        return _whole(part, self.mesh, self.placements, shape)


def _axis(placement: Any) -> int | None:
    """The axis that a placement cuts; ``None`` for one that has the whole on every rank."""
    if placement.is_partial():
        raise ValueError("a DTensor that is a partial sum has no norm; redistribute it first")
    return getattr(placement, "dim", None)  # Shard, and the strided one, which is not a Shard


def _placed(tensor: DTensor, placements: Sequence[Any]) -> DTensor:
    if tuple(tensor.placements) == tuple(placements):
        return tensor
    return tensor.redistribute(placements=placements)


def _whole(part: Tensor, mesh: Any, placements: Any, shape: Sequence[int]) -> DTensor:
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    if not part.is_contiguous() and part.ndim in (4, 5):
        last = torch.channels_last if part.ndim == 4 else torch.channels_last_3d
        stride = torch.empty(size, device="meta", memory_format=last).stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=size, stride=stride)


def why_uncut(tensor: Tensor) -> str:
    """Why a DTensor's slices have no norm, as the end of a sentence; empty where they have."""
    if not is_dtensor(tensor):
        return ""
    known = ("Shard", "_StridedShard", "Replicate")
    wrong = [each for each in tensor.placements if type(each).__name__ not in known]
    if not wrong:
        return ""
    return (
        f"is a DTensor placed as {wrong[0]}; expected each mesh dimension to cut it along one "
        "axis (Shard) or to have all of it (Replicate); redistribute it first"
    )


def gathered(tensor: Tensor) -> Tensor:
    """The tensor, or the whole of a DTensor, which every rank of its mesh has to ask for."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The tensor, or this rank's part of a DTensor, without a graph."""
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor


def spread(value: Tensor, like: DTensor | Cut) -> DTensor:
    """``value``, which every rank has whole, placed as ``like``, or as the g of a cut."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.mesh if isinstance(like, Cut) else like.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    whole = DTensor.from_local(value, mesh, everywhere, run_check=False)
    return _placed(whole, like.placements)


def write(tensor: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``tensor``, which for a DTensor has to be placed alike."""
    if is_dtensor(tensor):
        value = value.to(tensor.dtype)
        value = _placed(value, tensor.placements) if is_dtensor(value) else spread(value, tensor)
    tensor.copy_(value)


def on_any_rank(flag: bool, tensor: Tensor) -> bool:
    """Whether ``flag`` holds on a rank that has a part of ``tensor``; on this one, if it is whole.

    Every rank of a DTensor's mesh has to ask.
    """
    if not is_dtensor(tensor):
        return flag
    groups = [
        tensor.device_mesh.get_group(number)
        for number, placement in enumerate(tensor.placements)
        if _axis(placement) is not None
    ]
    return _sum_of(int(flag), groups, tensor) > 0


def _sum_of(count: int, groups: Sequence[Any], tensor: DTensor) -> int:
    if not groups:
        return count
    counted = torch.tensor([count], device=tensor.to_local().device)
    for group in groups:
        dist.all_reduce(counted, group=group)
    return int(counted.item())
