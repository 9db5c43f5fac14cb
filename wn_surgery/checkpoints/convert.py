"""State dicts in memory, from one layout to another."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from wn_surgery.checkpoints.contents import bound, shapes_of
from wn_surgery.checkpoints.folding import (
    computable,
    fold,
    magnitude_of,
    refuse_non_finite,
)
from wn_surgery.checkpoints.optimizer_names import is_numbered, moments_of, renamed_lists
from wn_surgery.checkpoints.pairs import (
    Axes,
    Options,
    Pair,
    Shape,
    find_pairs,
    keys_for,
)
from wn_surgery.checkpoints.recorded import (
    KEY,
    is_record,
    options_of,
    unpacked,
)
from wn_surgery.checkpoints.request import (
    Also,
    Choice,
    Layout,
    Request,
    request,
    unmatched,
)
from wn_surgery.checkpoints.selection import select
from wn_surgery.checkpoints.spectral import Spectral, find_spectral, spectral_weight
from wn_surgery.errors import CheckpointError, UnmatchedRuleError
from wn_surgery.model.sites import sites
from wn_surgery.norm.math import g_shape
from wn_surgery.rules.sources import RulesLike

__all__ = ["Conversion", "convert", "converted", "written_shape"]


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
    return converted(state, request(to, rules, ranks, dim, also, orphans, non_finite)).result


def converted(
    state: Any, asked: Request, hold: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Conversion:
    """Carry a request out on a container; ``hold`` may put new tensors elsewhere."""
    work = Conversion(asked, hold)
    with torch.no_grad():
        work.result = work.walk(state, dict(asked.known), 0)
    if asked.rules is not None and not work.weights:
        raise UnmatchedRuleError(unmatched(asked))
    if work.forgotten:
        warnings.warn(
            f"the optimizer's state of {len(work.forgotten)} tensors is left out, such as that of "
            f"{work.forgotten[0]!r}: g and v have moments of their own, a weight would need others",
            stacklevel=3,
        )
    if work.numbered and asked.to != "plain" and work.weights:
        warnings.warn(
            "an optimizer's state by number is left as it is: it fits where the parameters of the "
            "converted model come in the same order, which torch does not check. In modules that "
            "have weight norm and children of their own they do not",
            stacklevel=3,
        )
    return work


class Conversion:
    """One conversion: what came out, and what is shared on the way.

    Attributes:
        result: the new container.
        weights: the plain keys of what was converted.
        spectral: those of spectral-normed tensors that are plain now.
        kept_spectral: those of spectral-normed tensors that are as they were.
        kept: those of weight-normed tensors that stay as they are.
        forgotten: the keys of optimizer states that were left out.
        numbered: whether there is an optimizer's state by number.
    """

    def __init__(self, asked: Request, hold: Callable[[Tensor], Tensor]) -> None:
        self.asked, self.hold = asked, hold
        self.result: Any = None
        self.weights: list[str] = []
        self.spectral: list[str] = []
        self.kept_spectral: list[str] = []
        self.kept: list[str] = []
        self.forgotten: list[str] = []
        self.numbered = False
        self._made: dict[tuple[object, ...], Tensor] = {}
        self._alive: list[Tensor] = []

    def walk(self, value: Any, known: Mapping[str, Options], depth: int) -> Any:
        """The counterpart of a value."""
        bound(depth)
        if isinstance(value, Mapping):
            return self._mapping(value, known, depth)
        if isinstance(value, (list, tuple)):
            children = [self.walk(child, known, depth + 1) for child in value]
            changed = any(new is not old for new, old in zip(children, value, strict=True))
            return _like(value, children) if changed else value
        if isinstance(value, nn.Module) and any(site.normed for site in sites(value)):
            raise CheckpointError(
                f"the checkpoint holds a weight-normed {type(value).__name__} itself, not its "
                "state dict: load it, call wn_surgery.remove on it, and save it again"
            )
        return value

    def _mapping(self, state: Mapping[Any, Any], known: Mapping[str, Options], depth: int) -> Any:
        record = state.get(KEY)
        inner = known
        if is_record(record):
            inner = {**known, **options_of(record["sites"], repr(KEY))}
            state = unpacked(state, self.asked.to)
        self.numbered |= is_numbered(state)
        one = _OneState(self, state, known)
        items: list[tuple[Any, Any]] = []
        for key, value in state.items():
            items += one.items(key, value, lambda child: self.walk(child, inner, depth + 1))
        result = _empty_like(state)
        for key, value in items:
            if key in result:
                raise CheckpointError(f"two tensors would be called {key!r}; rename one of them")
            result[key] = value
        if one.renames and "param_groups" in result:
            result["param_groups"] = renamed_lists(
                result["param_groups"], lambda name: one.renames.get(name, name)
            )
        return result

    def once(self, make: Callable[[], Tensor], *sources: Tensor, extra: object) -> Tensor:
        """A tensor made of others, or what was made of the same memory before."""
        key = (*(part for source in sources for part in _identity(source)), extra)
        if key not in self._made:
            self._made[key] = self.hold(make())
            self._alive += sources  # their addresses must not be given to others
        return self._made[key]


class _OneState:
    """One mapping on its way."""

    def __init__(self, work: Conversion, state: Mapping[Any, Any], known: Any) -> None:
        self.work, self.state = work, state
        asked = work.asked
        shapes = shapes_of(state)
        found = find_pairs(shapes, dim=asked.dim, known=known, orphans=asked.orphans)
        work.kept += [pair.weight for pair in found if pair.weight in asked.keep]
        self.pairs = _by_part(pair for pair in found if pair.weight not in asked.keep)
        self.spectral = {part: one for one in find_spectral(shapes) for part in _parts(one)}
        self.chosen = self._chosen(shapes)
        # {"state": {name: moments}, "param_groups": [...]}: a mapping of the state dicts of names
        self.renames: dict[str, str | None] = {}
        inner = state.get("state") if "param_groups" in state else None
        for holder in (state, inner):
            for pair in moments_of(holder) if isinstance(holder, Mapping) else ():
                new = (None, None) if asked.to == "plain" else keys_for(pair.weight, asked.to)
                self.renames |= dict(zip((pair.g, pair.v), new, strict=True))

    def _chosen(self, shapes: dict[str, Shape]) -> dict[str, Options]:
        asked = self.work.asked
        if asked.rules is None:
            return {}
        free = {
            key: shape
            for key, shape in shapes.items()
            if key not in self.pairs
            and key not in self.spectral
            and ".parametrizations." not in f".{key}"
            and self.state[key].layout is torch.strided
            and computable(self.state[key].dtype, complex_too=True)
        }
        return select(free, asked.rules, asked.ranks)

    def items(self, key: Any, value: Any, walk: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
        """What stands in the new mapping for one entry of the old one."""
        if key in self.pairs:
            return self._of_pair(self.pairs[key], key, value)
        if key in self.spectral:
            return self._of_spectral(self.spectral[key], key, value)
        if key in self.chosen:
            return self._split(key, value, self.chosen[key])
        if isinstance(value, Tensor):
            return [(key, value)]
        if key in self.renames and isinstance(value, Mapping):
            new = self.renames[key]
            if new is None:
                self.work.forgotten.append(key)
            return [] if new is None else [(new, value)]
        return [(key, walk(value))]

    def _of_pair(self, pair: Pair, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        to = self.work.asked.to
        v = self.state[pair.v]
        if to != "plain":
            number = int(key == pair.v)
            if number == 0:
                self.work.weights.append(pair.weight)
                shape = written_shape(tuple(value.shape), tuple(v.shape), pair)
                value = value if tuple(value.shape) == shape else value.reshape(shape)
            return [(keys_for(pair.weight, to)[number], value)]
        if key == pair.v:
            return []
        self.work.weights.append(pair.weight)
        return [
            (pair.weight, self.work.once(lambda: self._folded(pair), value, v, extra=pair.options))
        ]

    def _folded(self, pair: Pair) -> Tensor:
        g, v = self.state[pair.g], self.state[pair.v]
        if g.is_meta != v.is_meta:
            part = pair.g if g.is_meta else pair.v
            raise CheckpointError(
                f"{part!r} is on the meta device and has no values; load it first"
            )
        w = fold(g, v, pair.options)
        if self.work.asked.non_finite == "error":
            refuse_non_finite(w, g, v, pair)
        return w

    def _of_spectral(self, one: Spectral, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        if "spectral_norm" not in self.work.asked.also:
            if key == one.original:
                self.work.kept_spectral.append(one.weight)
            return [(key, value)]
        if key != one.original:
            return []
        self.work.spectral.append(one.weight)
        u, v, dim = self.state[one.u], self.state[one.v], self.work.asked.dim
        w = self.work.once(
            lambda: spectral_weight(value, u, v, one.original, dim), value, u, v, extra="spectral"
        )
        return [(one.weight, w)]

    def _split(self, key: str, value: Tensor, options: Options) -> list[tuple[str, Tensor]]:
        self.work.weights.append(key)
        g = self.work.once(lambda: magnitude_of(value, key, options), value, extra=options)
        g_key, v_key = keys_for(key, self.work.asked.to)
        return [(g_key, g), (v_key, value)]


def written_shape(g: Shape, v: Shape, pair: Pair) -> Shape:
    """G's shape in a layout that torch reads: it knows no g of one axis beside a v of several."""
    return g_shape(v, pair.dim) if len(g) == 1 and len(v) > 1 else g


def _by_part(pairs: Iterable[Pair]) -> dict[str, Pair]:
    return {part: pair for pair in pairs for part in (pair.g, pair.v)}


def _parts(one: Spectral) -> Collection[str]:
    return (one.original, one.u, one.v)


def _like(value: Any, children: list[Any]) -> Any:
    """A list or tuple of the same class, named tuples included."""
    if hasattr(value, "_fields"):
        return type(value)(*children)
    return type(value)(children)


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # Views of one storage are made anew at each state_dict(); their place is what they share.
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _empty_like(state: Mapping[Any, Any]) -> Any:
    """An empty mapping of the same class that keeps attributes such as ``_metadata``."""
    if type(state) is dict:
        return {}
    if not isinstance(state, MutableMapping):
        return {}
    result = copy.copy(state)
    result.clear()
    return result
