"""Containers of state dicts: what is in them, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from wn_surgery.checkpoints.pairs import Axes, Pair, Shape, find_pairs
from wn_surgery.errors import CheckpointError, RuleError
from wn_surgery.model.records import KEY, is_record, options_of, with_exact
from wn_surgery.norm.options import NormOptions

__all__ = ["bound", "converted_record", "layout_of", "pairs_of", "recorded", "shapes_of", "walk"]

MAX_DEPTH = 64


def pairs_of(
    state: Mapping[str, Any], *, dim: Axes = "auto", orphans: Literal["error", "keep"] = "error"
) -> dict[str, Pair]:
    """Where weight norm is in a state dict, by names and shapes alone.

    Args:
        state: tensors by key; containers of state dicts are walked, and the keys of what is in
            them are joined with ``/``.
        dim: the axes to take where g's shape fits several.
        orphans: whether half a pair is an error.

    Returns:
        The pair for each weight-normed key (its plain name); empty for a plain state dict.

    Raises:
        CheckpointError: a pair does not fit, or is ambiguous.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints import pairs_of
        >>> state = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 2)}
        >>> pairs_of({"generator": state})["generator/weight"].layout
        'legacy'
    """
    return {
        path + pair.weight: pair
        for path, mapping, known in walk(state)
        for pair in find_pairs(shapes_of(mapping), dim=dim, known=known, orphans=orphans)
    }


def layout_of(state: Mapping[str, Any], *, dim: Axes = "auto") -> str:
    """The layout of a state dict, or of a container of some.

    Args:
        state: tensors by key; containers are walked.
        dim: the axes to take where g's shape fits several.

    Returns:
        ``"plain"``, ``"legacy"``, ``"parametrized"``, or ``"mixed"`` where both of the latter
        are there; :func:`pairs_of` says what is where.

    Raises:
        CheckpointError: a pair does not fit, or is ambiguous.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints import layout_of
        >>> layout_of({"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 2)})
        'legacy'
    """
    layouts = {pair.layout for pair in pairs_of(state, dim=dim).values()}
    return "mixed" if len(layouts) > 1 else next(iter(layouts), "plain")


def walk(
    state: Any, path: str = "", known: Mapping[str, NormOptions] | None = None, depth: int = 0
) -> Iterator[tuple[str, Mapping[Any, Any], Mapping[str, NormOptions]]]:
    """Each mapping in a container: its path, itself, and the options recorded for its keys."""
    bound(depth)
    if isinstance(state, Mapping):
        yield path, state, known or {}
        record = state.get(KEY)
        inner = recorded(record["sites"], repr(KEY)) if is_record(record) else known
        for key, child in state.items():
            if not (key == KEY and is_record(child)):
                yield from walk(child, f"{path}{key}/", inner, depth + 1)
    elif isinstance(state, (list, tuple)):
        for number, child in enumerate(state):
            yield from walk(child, f"{path}{number}/", known, depth + 1)


def bound(depth: int) -> None:
    """Raise where containers are nested too deep to be walked."""
    if depth > MAX_DEPTH:
        raise CheckpointError(
            f"the checkpoint nests containers more than {MAX_DEPTH} deep, or holds itself; "
            "pass the state dict that is in it"
        )


def shapes_of(state: Mapping[Any, Any]) -> dict[str, Shape]:
    """The shapes of the tensors in a mapping itself."""
    return {
        key: tuple(value.shape)
        for key, value in state.items()
        # A nested tensor has no shape; nothing is weight-normed by one.
        if isinstance(key, str) and isinstance(value, Tensor) and not value.is_nested
    }


def recorded(sites: Any, where: str) -> dict[str, NormOptions]:
    """The options of each site of a record, perhaps of a hostile file, by its plain key."""
    try:
        return {str(site["name"]): options_of(site) for site in sites}
    except (TypeError, KeyError, RuleError) as error:
        raise CheckpointError(
            f"{where} has a record of weight norm that this release cannot read: {error}; update "
            "wn-surgery, or delete the record if nothing has an eps"
        ) from error


def converted_record(checkpoint: Mapping[str, Any], to: str) -> Mapping[str, Any]:
    """A Lightning checkpoint whose record fits the layout that its state dict will have.

    Plain ones have no record. Otherwise the record names the new layout, and where the callback
    wrote plain weights and the exact g and v beside them, these take the place of the weights.
    """
    record = checkpoint[KEY]
    if to == "plain":
        return {key: value for key, value in checkpoint.items() if key != KEY}
    result = dict(checkpoint)
    exact = record.get("exact")
    for name, parts in exact.items() if isinstance(exact, Mapping) else ():
        if isinstance(state := result.get(name), Mapping) and isinstance(parts, Mapping):
            result[name] = with_exact(state, parts)
    result[KEY] = {key: value for key, value in record.items() if key != "exact"} | {"layout": to}
    return result
