"""What is in a container of state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from wn_surgery.checkpoints.pairs import (
    Axes,
    Options,
    Pair,
    Shape,
    find_pairs,
)
from wn_surgery.checkpoints.recorded import KEY, is_record, options_of
from wn_surgery.errors import CheckpointError

__all__ = ["bound", "layout_of", "pairs_of", "shapes_of", "walk"]

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
    found: dict[str, Pair] = {}
    for path, mapping, known in walk(state):
        for pair in find_pairs(shapes_of(mapping), dim=dim, known=known, orphans=orphans):
            found[path + pair.weight] = pair
    return found


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
    state: Any, path: str = "", known: Mapping[str, Options] | None = None, depth: int = 0
) -> Iterator[tuple[str, Mapping[Any, Any], Mapping[str, Options]]]:
    """Each mapping in a container: its path, itself, and the options recorded for its keys."""
    bound(depth)
    if isinstance(state, Mapping):
        yield path, state, known or {}
        record = state.get(KEY)
        inner = options_of(record["sites"], repr(KEY)) if is_record(record) else known
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
