"""Norms of the originals under FSDP2's mixed precision, which gathers g and v rounded.

Before a unit is gathered, each rank takes the norms of its own float32 parts. They are sent to all
ranks with the float32 g, which has as few elements, and the weight is computed of them and of the
rounded v. torch's extensions of the gather (``fsdp_pre_all_gather``) could send the same, but only
for parameters of a tensor subclass of their own, which every optimizer and checkpoint would meet.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError
from wn_surgery.model.gathering import FSDP2
from wn_surgery.norm.cuts import Cut, is_dtensor
from wn_surgery.norm.math import computed_norms
from wn_surgery.norm.nodes import weight_of_known
from wn_surgery.norm.parametrization import WeightNorm, WeightNormList, is_weight_norm
from wn_surgery.norm.slots import NotCopied

__all__ = ["exact_norms", "shown"]


def exact_norms(model: nn.Module) -> tuple[str, ...]:
    """Compute norms of the float32 originals, where FSDP2 gathers g and v in a narrower dtype.

    Call it after the last ``fully_shard``. From then on every forward, and ``folded``, computes
    the weights whose rule has a ``norm_dtype`` with the norms and the g of the cut parameters;
    only v is rounded. Each takes one more all-gather a forward, of twice g's size (and one
    all-reduce of g's size, where ranks have parts of a slice). What trains, and what is saved,
    stays as it is. Elsewhere, what you gather by ``unshard()`` is computed of rounded parts.

    Args:
        model: a module tree with units of FSDP2. Every rank calls it.

    Returns:
        The names of the weights.

    Raises:
        ModelError: there is no such weight; or one is not cut, is cut by tensor parallelism too,
            or is offloaded to the CPU. Nothing has changed then.

    Example:
        >>> import torch, torch.distributed as dist, wn_surgery as wn
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> _ = wn.apply(model, {"types": "Linear", "norm_dtype": "float32"})
        >>> policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        >>> _ = fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        >>> wn.exact_norms(model)
        ('0.weight',)
        >>> dist.destroy_process_group()
    """
    from torch.distributed.fsdp import FSDPModule

    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    units: dict[Any, list[_Exact]] = {
        unit: [_Exact(names[plist], plist) for plist in _own_lists(unit)]
        for unit in names
        if isinstance(unit, FSDPModule)
    }
    weights = [exact for own in units.values() for exact in own]
    if not weights:
        raise ModelError(
            f"no weight that {FSDP2} has cut has a norm_dtype; give its rule norm_dtype: float32, "
            "and call exact_norms after the last fully_shard",
            kind="missing",
        )
    for unit, own in units.items():
        for hooks in (unit._forward_pre_hooks, unit._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Hook):
                    del hooks[key]
                    unit._forward_hooks_always_called.pop(key, None)
        for exact in own:
            exact.plist.__dict__["exact"] = exact
        # In front of FSDP2's own hook, which gathers.
        unit.register_forward_pre_hook(_Show(own), prepend=True)
        unit.register_forward_hook(_Hide(own), always_call=True)
    return tuple(exact.name for exact in weights)


def _own_lists(module: Any) -> Iterator[WeightNormList]:
    """The lists with a ``norm_dtype`` that are of this unit, and not of one below it."""
    from torch.distributed.fsdp import FSDPModule

    if is_weight_norm(module) and cast(WeightNorm, module[0]).norm_dtype is not None:
        yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_lists(child)


class _Exact(NotCopied):
    """One weight, with its cut parameters, and the whole of g and of its norms."""

    def __init__(self, path: str, plist: WeightNormList) -> None:
        owner, _, param = path.rpartition("parametrizations.")
        self.name, self.plist = owner + param, plist
        self._options = cast(WeightNorm, plist[0]).options
        self._cut: tuple[Any, Any] = (plist.original0, plist.original1)
        self._known: tuple[Tensor, Tensor] | None = None
        self._shows = 0
        if said := _why_not(plist.original1):
            raise ModelError(f"{self.name} {said}", kind="wrapped", site=self.name)

    def show(self) -> None:
        """Compute the norms, and give the weight of them until :meth:`hide`."""
        if is_dtensor(self.plist.original1):  # otherwise it is gathered, of what was cut before
            self._cut = self.plist.original0, self.plist.original1
        g, v = self._cut
        dim, eps, norm_dtype = self._options
        cut = Cut(v, dim)
        with torch.no_grad():
            _, own = cut.parts(v, g)
            norms = computed_norms(v, dim, eps, norm_dtype).clamp_min(eps)
            both = torch.stack([own.to(norms.dtype), norms.view(own.shape)], dim=-1)
            whole = cut.magnitude(both, (*g.shape, 2)).full_tensor()
        self._known = whole[..., 0], whole[..., 1]
        self._shows += 1

    def hide(self) -> None:
        """Leave the weight to the list again."""
        self._shows = max(0, self._shows - 1)  # a hook in front may have raised

    def weight(self, g: Tensor, v: Tensor) -> Tensor | None:
        """The weight of what is gathered; ``None`` where it is cut, or not shown."""
        if is_dtensor(v) or self._known is None:
            return None
        # In a backward, a checkpointed block is computed again; its hooks do not run.
        if not self._shows and torch._C._current_graph_task_id() == -1:
            return None
        return weight_of_known(v, g, self._known, self._options)


def _why_not(v: Tensor) -> str:
    """Why the norms of a weight are not known before it is gathered; empty where they are."""
    if not is_dtensor(v):
        return "is gathered now; call model.reshard() first, on every rank"
    *others, last = v.placements
    if not (last.is_shard() and all(each.is_replicate() for each in others)):
        return "is cut by tensor parallelism too, for which exact_norms does not work"
    if v.to_local().device.type != v.device_mesh.device_type:
        return "is offloaded to the CPU, for which exact_norms does not work"
    return ""


class _Hook:
    """Of one unit."""

    def __init__(self, weights: list[_Exact]) -> None:
        self._weights = weights


class _Show(_Hook):
    """In front of a forward."""

    def __call__(self, _module: nn.Module, _inputs: Any) -> None:
        for exact in self._weights:
            exact.show()


class _Hide(_Hook):
    """After it, also when it has raised."""

    def __call__(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        for exact in self._weights:
            exact.hide()


@contextmanager
def shown(lists: Iterable[Any]) -> Generator[None]:
    """Inside, the weights of these lists are exact, where :func:`exact_norms` was asked for it."""
    with ExitStack() as stack:
        for plist in lists:
            if (exact := getattr(plist, "exact", None)) is not None:
                exact.show()
                stack.callback(exact.hide)
        yield
