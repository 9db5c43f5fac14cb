"""What this library has written beside tensors: where weight norm is, and with which options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from wn_surgery.checkpoints.pairs import Options, keys_for
from wn_surgery.errors import CheckpointError, RuleError
from wn_surgery.rules import fields

__all__ = ["KEY", "is_record", "options_of", "unpacked"]

KEY = "wn_surgery"
"""The entry in a Lightning checkpoint that the callback writes."""


def is_record(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is what the Lightning callback keeps under :data:`KEY`."""
    return isinstance(value, Mapping) and "sites" in value and "version" in value


def options_of(sites: Any, where: str) -> dict[str, Options]:
    """The options of each site, by its plain key.

    Args:
        sites: what :func:`wn_surgery.model.records.record` gave, perhaps read from a hostile file.
        where: the file or entry, for errors.

    Returns:
        Options by key.

    Raises:
        CheckpointError: it is no such record.

    Example:
        >>> from wn_surgery.checkpoints.recorded import options_of
        >>> options_of([{"name": "weight", "dim": 0, "eps": 1e-6, "norm_dtype": None}], "a.ckpt")
        {'weight': Options(dim=0, eps=1e-06, norm_dtype=None)}
    """
    try:
        return {str(site["name"]): _options(site) for site in sites}
    except (TypeError, KeyError, RuleError) as error:
        raise CheckpointError(
            f"{where} has a record of weight norm that this release cannot read: {error}; update "
            "wn-surgery, or delete the record if nothing has an eps"
        ) from error


def _options(site: Mapping[str, Any]) -> Options:
    dim = tuple(site["dim"]) if isinstance(site["dim"], list) else site["dim"]
    dim = fields.dim(dim)
    dtype = fields.norm_dtype(site["norm_dtype"])
    if dim == "out":
        raise RuleError("dim='out' in a record")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return Options(dim, fields.eps(site["eps"]), name)


def unpacked(checkpoint: Mapping[str, Any], to: str) -> Mapping[str, Any]:
    """A Lightning checkpoint whose record fits the layout that it is going to be in.

    Args:
        checkpoint: with a record; it is not changed.
        to: the layout.

    Returns:
        For ``"plain"``: without the record, for nothing is weight-normed any more. Otherwise
        with the new layout in it, and where the callback wrote plain weights and the exact g and
        v beside them (``save_layout="plain"``), with these in the place of the weights.
    """
    record = checkpoint[KEY]
    if to == "plain":
        return {key: value for key, value in checkpoint.items() if key != KEY}
    result = dict(checkpoint)
    exact = record.get("exact")
    for name, parts in exact.items() if isinstance(exact, Mapping) else ():
        state = result.get(name)
        if isinstance(state, Mapping) and isinstance(parts, Mapping):
            result[name] = _restored(state, parts)
    result[KEY] = {key: value for key, value in record.items() if key != "exact"} | {"layout": to}
    return result


def _restored(state: Mapping[Any, Any], parts: Mapping[Any, Any]) -> dict[Any, Any]:
    whole: dict[Any, Any] = {}
    for key, value in state.items():
        both = keys_for(str(key), "parametrized")
        if set(both) <= parts.keys():
            whole |= {part: parts[part] for part in both}
        else:
            whole[key] = value
    return whole
