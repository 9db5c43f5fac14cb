"""Keep optimizers true across surgery: what replaces a parameter takes its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from wn_surgery.norm.naming import keys_for

__all__ = ["OptimizerChange", "OptimizerEdit", "Replacement", "all_unwrapped", "unwrapped"]


class Replacement(NamedTuple):
    """Parameters ``old`` of the site ``name`` are replaced by ``new``."""

    name: str
    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    stays: bool = False  # another site goes on using `old`, as when a tie ends


@dataclass
class OptimizerChange:
    """What changed in one optimizer.

    Attributes:
        optimizer: its class name.
        groups: for each changed group, how many parameters left and how many came.
        reset: the sites whose state (momentum and the like) was dropped.
    """

    optimizer: str
    groups: dict[int, tuple[int, int]] = field(default_factory=dict)
    reset: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The change as plain JSON data."""
        groups = [{"group": i, "out": out, "in": came} for i, (out, came) in self.groups.items()]
        return {"optimizer": self.optimizer, "groups": groups, "reset": list(self.reset)}

    def __repr__(self) -> str:
        moved = ", ".join(f"{out} -> {came} in group {i}" for i, (out, came) in self.groups.items())
        return f"<OptimizerChange {self.optimizer}: {moved or 'nothing'}; {len(self.reset)} reset>"

    def __str__(self) -> str:
        moved = ", ".join(
            f"{out} parameter{'' if out == 1 else 's'} -> {came} in group {i}"
            for i, (out, came) in self.groups.items()
        )
        reset = f"state reset for {', '.join(self.reset)}" if self.reset else "nothing to reset"
        return f"{self.optimizer}: {moved or 'holds none of them'}; {reset}"


class OptimizerEdit:
    """One all-or-nothing change of several optimizers; see :func:`all_unwrapped`."""

    def __init__(self, optimizers: Any) -> None:
        self._optimizers = all_unwrapped(optimizers)
        self._before: list[tuple[Any, list[dict[str, Any]], dict[Any, Any], Any]] = []

    def replace(self, replacements: Sequence[Replacement]) -> list[OptimizerChange]:
        """Put the new parameters in the place of the old ones.

        Groups keep their hyperparameters and their order; the state of other parameters is
        not touched. Where g and v are in different groups, the weight goes to v's.
        """
        for optimizer in self._optimizers:
            groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
            numel = getattr(optimizer, "_numel_cache", None)
            self._before.append((optimizer, groups, dict(optimizer.state), numel))
        return [_replace(optimizer, replacements) for optimizer in self._optimizers]

    def rollback(self) -> None:
        """Put the optimizers back as they were before :meth:`replace`."""
        for optimizer, groups, state, numel in self._before:
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group["params"][:] = before["params"]
                group.update({key: value for key, value in before.items() if key != "params"})
            optimizer.state.clear()
            optimizer.state.update(state)
            if hasattr(optimizer, "_numel_cache"):
                optimizer._numel_cache = numel


def all_unwrapped(optimizers: Any) -> list[Any]:
    """The torch optimizers inside one optimizer, or several; a TypeError for anything else."""
    if hasattr(optimizers, "param_groups") or hasattr(optimizers, "optimizer"):
        optimizers = [optimizers]
    if isinstance(optimizers, str | Mapping) or not isinstance(optimizers, Iterable):
        raise TypeError(
            f"optimizers is a {type(optimizers).__name__}; expected the optimizers that hold "
            "the model's parameters, as in optimizers=[optimizer]"
        )
    return [unwrapped(optimizer) for optimizer in optimizers]


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside wrappers that keep one under ``.optimizer`` (Lightning's do)."""
    if isinstance(optimizer, LRScheduler):
        raise TypeError(
            f"optimizers holds a {type(optimizer).__name__}, which is a learning-rate scheduler; "
            "expected its optimizer"
        )
    inner = optimizer
    while not isinstance(getattr(inner, "param_groups", None), list) or hasattr(inner, "optimizer"):
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"optimizers holds a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
            )
        inner = inner.optimizer
    return inner


def _replace(optimizer: Any, replacements: Sequence[Replacement]) -> OptimizerChange:
    change = OptimizerChange(type(optimizer).__name__)
    home = {id(p) for group in optimizer.param_groups for p in group["params"]}
    leaving = set[int]()  # old parameters, by id
    incoming: dict[int, list[Replacement]] = {}  # what comes after an old one, or in its place
    came = set[int]()  # of ends tied by memory, each is replaced by the same g and v
    for replacement in replacements:
        held = [parameter for parameter in replacement.old if id(parameter) in home]
        if not held or id(held[0]) in leaving:
            continue  # not in this optimizer, or the other end of a tie
        if id(replacement.new[-1]) not in came:
            # The last is v (or the weight itself), whose hyperparameters the weight inherits.
            incoming.setdefault(id(held[-1]), []).append(replacement)
            came.add(id(replacement.new[-1]))
        if not replacement.stays:
            leaving.update(map(id, held))
            if any(parameter in optimizer.state for parameter in held):
                change.reset.append(replacement.name)
    if not incoming:
        return change
    for number, group in enumerate(optimizer.param_groups):
        if moved := _replace_in_group(group, leaving, incoming):
            change.groups[number] = moved
    if hasattr(optimizer, "_numel_cache"):
        # L-BFGS keeps one flat state for all of its parameters, under the first.
        optimizer.state.clear()
        optimizer._numel_cache = None
        change.reset = ["all parameters"]
    for parameter in [p for p in optimizer.state if id(p) in leaving]:
        del optimizer.state[parameter]
    return change


def _replace_in_group(
    group: dict[str, Any], leaving: set[int], incoming: dict[int, list[Replacement]]
) -> tuple[int, int] | None:
    """How many parameters left the group and how many came, if any did."""
    old: list[nn.Parameter] = group["params"]
    params: list[nn.Parameter] = []
    names: list[str] = []
    for parameter, name in zip(old, group.get("param_names") or [""] * len(old), strict=True):
        if id(parameter) not in leaving:
            params.append(parameter)
            names.append(name)
        for replacement in incoming.get(id(parameter), ()):
            params += replacement.new
            # As named_parameters() now gives them.
            site = replacement.name
            names += [site] if len(replacement.new) == 1 else keys_for(site, "parametrized")
    out = sum(id(parameter) in leaving for parameter in old)
    came = len(params) - (len(old) - out)
    if not (out or came):
        return None
    old[:] = params  # in place: L-BFGS and closures hold on to the list itself
    if group.get("param_names"):
        group["param_names"] = names
    return out, came
