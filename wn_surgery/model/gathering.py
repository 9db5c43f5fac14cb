"""What FSDP2 holds, and keeping it gathered for a while.

``fully_shard`` leaves no note on what it takes but in torch's table of states, which is private.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from wn_surgery.errors import ModelError
from wn_surgery.norm.cuts import on_any_rank

__all__ = ["FSDP2", "gather", "held_by_fsdp", "release"]

FSDP2 = "fully_shard (FSDP2)"
"""How messages name it, and ``Node.wrapped``."""


def _states() -> Iterator[tuple[Any, Any]]:
    """Every module that ``fully_shard`` was given, and its state; grouped modules once."""
    table = sys.modules.get("torch.distributed._composable_state")
    if "torch.distributed.fsdp" not in sys.modules or table is None:
        return
    seen = set[int]()
    for module, found in list(table._module_state_mapping.items()):
        state = found()
        if _groups(state) is not None and id(state) not in seen:
            seen.add(id(state))
            yield module, state


def _groups(state: Any) -> list[Any] | None:
    """The groups of a state; ``None`` if it is not one of FSDP2."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    if hasattr(state, "_fsdp_param_group"):  # torch 2.6 knows one group or none
        return [group for group in (state._fsdp_param_group,) if group is not None]
    return None


def _ids(state: Any) -> set[int]:
    """The ids of its parameters, cut and whole: a module has one or the other."""
    return {
        id(tensor)
        for group in _groups(state) or ()
        for parameter in group.fsdp_params
        for tensor in (parameter.sharded_param, getattr(parameter, "_unsharded_param", None))
        if tensor is not None
    }


def held_by_fsdp() -> set[int]:
    """The ids of the parameters that FSDP2 has cut, in any model."""
    return set().union(*(_ids(state) for _, state in _states()))


class _Unit:
    """A module that ``fully_shard`` was given, while contexts want its parameters whole."""

    def __init__(self, module: Any, state: Any) -> None:
        self.users = 0
        self._module, self._state = ref(module), state
        # What torch decides at the root's first forward; older versions have decided by then.
        automatic = getattr(state, "_auto_reshard_after_forward", None)
        self._before = automatic, [g.post_forward_mesh_info for g in _groups(state) or ()]
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()

    def cut(self) -> None:
        """Reshard, now and after each forward, as before."""
        automatic, meshes = self._before
        if automatic is not None:
            self._state._auto_reshard_after_forward = automatic
        if self._state._is_root and automatic:
            meshes = [None] * len(meshes)  # as torch leaves it at the root's first forward
        for group, mesh in zip(_groups(self._state) or (), meshes, strict=True):
            group.post_forward_mesh_info = mesh
        if (module := self._module()) is not None:
            module.reshard()


_GATHERED: WeakKeyDictionary[nn.Module, _Unit] = WeakKeyDictionary()


def gather(parts: Iterable[tuple[Tensor, ...]]) -> list[nn.Module]:
    """Gather the units that hold these parameters, once for all forwards until :func:`release`.

    ``parts`` has g and v of each weight, as they are now. Every rank has to ask.
    """
    wanted = {id(tensor): tensor for pair in parts for tensor in pair}
    found = [(module, state) for module, state in _states() if _ids(state) & wanted.keys()]
    new = [state for module, state in found if module not in _GATHERED]
    _check_memory([wanted[i] for state in new for i in _ids(state) & wanted.keys()])
    gathered: list[nn.Module] = []
    try:
        for module, state in found:
            unit = _GATHERED.get(module) or _Unit(module, state)
            _GATHERED[module] = unit
            unit.users += 1
            gathered.append(module)
    except BaseException:
        release(gathered)
        raise
    return gathered


def release(modules: Iterable[nn.Module]) -> None:
    """Cut the parameters again that no other context wants whole."""
    for module in modules:
        unit = _GATHERED[module]
        unit.users -= 1
        if not unit.users:
            del _GATHERED[module]
            unit.cut()


def free_bytes(device: torch.device) -> int | None:
    """The memory that a device has left; ``None`` where nobody can tell."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _check_memory(tensors: list[Tensor]) -> None:
    """Raise on every rank where one has no place for v and the weight, both whole."""
    needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for tensor in tensors[:1]:
        free = free_bytes(tensor.device)
        if on_any_rank(free is not None and free < needed, tensor):
            raise ModelError(
                f"folded() keeps gathered what {FSDP2} has cut, which takes {needed:,} bytes on "
                "each rank, and one has less; evaluate without it (the Lightning callback: "
                "fold_on_eval=False)",
                kind="folded",
            )
