"""State dicts in memory, from one layout to another."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from wn_surgery.checkpoints.containers import bound, converted_record, recorded, shapes_of
from wn_surgery.checkpoints.folding import compute, kind_of
from wn_surgery.checkpoints.optimizer_names import (
    is_numbered,
    new_names,
    renamed_lists,
    warn_of_forgotten,
)
from wn_surgery.checkpoints.pairs import Axes
from wn_surgery.checkpoints.plan import Line, Plan, plan, refuse_unused_rules
from wn_surgery.checkpoints.request import Also, Choice, Layout, Request
from wn_surgery.errors import CheckpointError
from wn_surgery.model.records import KEY, is_record
from wn_surgery.model.sites import identity, normed
from wn_surgery.norm.options import NormOptions
from wn_surgery.rules.sources import RulesLike

__all__ = ["convert", "converted", "uncomputed"]

Compute: TypeAlias = Callable[[Line, Callable[[str], Tensor], Request], Tensor]


def convert(
    state: Mapping[str, Any],
    to: Layout = "plain",
    *,
    rules: RulesLike | None = None,
    ranks: Iterable[int] | None = None,
    dim: Axes = "auto",
    also: Also | Iterable[Also] = (),
    orphans: Choice = "error",
    non_finite: Choice = "error",
) -> Any:
    """A state dict, or a container of some, in another layout.

    Args:
        state: tensors by key; dicts, lists and tuples in it are walked. It is not changed.
        to: ``"plain"``, ``"parametrized"`` or ``"legacy"``.
        rules: for plain tensors that get weight norm (docs/rules.md): names, params, dim, eps
            and norm_dtype. A checkpoint has no classes, so ``types`` are refused.
        ranks: how many axes those tensors may have; None for any number from two on.
        dim: the axes where g's shape fits several; ``"auto"`` takes those of its siblings, and
            raises if they do not tell.
        also: ``("spectral_norm",)`` strips torch's spectral norm too.
        orphans: ``"keep"`` carries a g without its v over, and a v without its g.
        non_finite: ``"keep"`` lets stripped weights be NaN or infinite, as where a slice of v has
            zero norm; a live model computes them so, too.

    Returns:
        A container of the same types, key order and ``_metadata``. What has nothing to do with
        weight norm is the same object; a pair that is there twice stays one tensor. Optimizer
        states by name are renamed; what they hold of g and v is left out of plain ones, with a
        warning. The record of the Lightning callback is brought up to date.

    Raises:
        CheckpointError: a pair does not fit or is ambiguous, or a key is taken.
        RuleError: a rule needs modules.
        UnmatchedRuleError: the rules match nothing.
        ZeroNormError: a weight would not be a finite number: a slice has zero or non-finite norm.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints import convert
        >>> state = {"weight_g": torch.tensor([[10.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> convert(state, "plain")
        {'weight': tensor([[6., 8.]])}
    """
    return converted(state, Request.of(to, rules, ranks, dim, also, orphans, non_finite))[0]


def converted(
    state: Any,
    asked: Request,
    hold: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    compute: Compute = compute,
) -> tuple[Any, list[Plan]]:
    """A container after what is asked, and the plan of each state dict in it.

    ``hold`` may put new tensors elsewhere; ``compute`` may compute none.
    """
    work = _Conversion(asked, hold, compute)
    with torch.no_grad():
        result = work.walk(state, dict(asked.known), 0)
    refuse_unused_rules(asked, work.plans)
    warn_of_forgotten(work.forgotten, stacklevel=3)
    if work.numbered and asked.to != "plain" and any(each.weights for each in work.plans):
        warnings.warn(
            "an optimizer's state by number is left as it is: it fits where the parameters of the "
            "converted model come in the same order, which torch does not check. In modules that "
            "have weight norm and children of their own they do not",
            stacklevel=3,
        )
    return result, work.plans


def uncomputed(line: Line, _read: Callable[[str], Tensor], _asked: Request) -> Tensor:
    """In the place of a tensor, one without values."""
    assert isinstance(line.kind, torch.dtype)  # what is computed has one
    return torch.empty(line.shape, dtype=line.kind, device="meta")


class _Conversion:
    """One conversion: its plans, and what is shared between the state dicts."""

    def __init__(self, asked: Request, hold: Callable[[Tensor], Tensor], compute: Compute) -> None:
        self.asked, self.hold, self.compute = asked, hold, compute
        self.plans: list[Plan] = []
        self.forgotten: list[str] = []
        self.numbered = False
        self._made: dict[tuple[object, ...], Tensor] = {}
        self._alive: list[Tensor] = []

    def walk(self, value: Any, known: Mapping[str, NormOptions], depth: int) -> Any:
        """The counterpart of a value."""
        bound(depth)
        if isinstance(value, Mapping):
            return self._mapping(value, known, depth)
        if isinstance(value, (list, tuple)):
            children = [self.walk(child, known, depth + 1) for child in value]
            changed = any(new is not old for new, old in zip(children, value, strict=True))
            return _like(value, children) if changed else value
        if isinstance(value, nn.Module) and normed(value):
            raise CheckpointError(
                f"the checkpoint holds a weight-normed {type(value).__name__} itself, not its "
                "state dict: load it, call wn_surgery.remove on it, and save it again"
            )
        return value

    def _mapping(
        self, state: Mapping[Any, Any], known: Mapping[str, NormOptions], depth: int
    ) -> Any:
        inner = known
        if is_record(record := state.get(KEY)):
            inner = {**known, **recorded(record["sites"], repr(KEY))}
            state = converted_record(state, self.asked.to)
        self.numbered |= is_numbered(state)
        shapes = shapes_of(state)
        kinds = {key: kind_of(state[key]) for key in shapes}
        names = new_names(state, self.asked.to)
        renames = {key: names[key] for key in names if isinstance(state.get(key), Mapping)}
        others = [renames.get(key, key) for key in state if key not in shapes]
        decided = plan(shapes, kinds, self.asked, known, [key for key in others if key is not None])
        self.plans.append(decided)
        result = _empty_like(state)
        for key, value in state.items():
            if key in shapes:
                for line in decided.lines[key]:
                    result[line.key] = self._made_once(line, state)
            elif key not in renames:
                result[key] = self.walk(value, inner, depth + 1)
            elif (new := renames[key]) is not None:
                result[new] = value
            else:
                self.forgotten.append(key)
        if names and "param_groups" in result:
            result["param_groups"] = renamed_lists(result["param_groups"], names)
        return result

    def _made_once(self, line: Line, state: Mapping[str, Tensor]) -> Tensor:
        """The tensor of a line, or what was made of the same memory before."""
        if line.do == "copy":
            return compute(line, state.__getitem__, self.asked)
        sources = [state[source] for source in line.sources]
        # Views of one storage are made anew at each state_dict(); their place is what they share.
        key = (*map(identity, sources), line.do, line.options)
        if key not in self._made:
            self._made[key] = self.hold(self.compute(line, state.__getitem__, self.asked))
            self._alive += sources  # their addresses must not be given to others
        return self._made[key]


def _like(value: Any, children: list[Any]) -> Any:
    """A list or tuple of the same class, named tuples included."""
    return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)


def _empty_like(state: Mapping[Any, Any]) -> Any:
    """An empty mapping of the same class that keeps attributes such as ``_metadata``."""
    if type(state) is dict or not isinstance(state, MutableMapping):
        return {}
    result = copy.copy(state)
    result.clear()
    return result
