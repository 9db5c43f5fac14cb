"""What g, v and the weight are called in each layout."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

__all__ = ["Layout", "NormedLayout", "Part", "keys_for", "part_of"]

NormedLayout: TypeAlias = Literal["legacy", "parametrized"]
Layout: TypeAlias = Literal["plain", "legacy", "parametrized"]

_LEGACY = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<param>[^.]+)_(?P<part>[gv])", re.DOTALL)
_PARAMETRIZED = re.compile(
    r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<param>[^.]+)\.original(?P<part>[01])", re.DOTALL
)
_PARTS: dict[str, Literal["g", "v"]] = {"0": "g", "1": "v", "g": "g", "v": "v"}


class Part(NamedTuple):
    """What the key of a g or a v says: the weight's plain key, the layout, and which it is."""

    weight: str
    layout: NormedLayout
    part: Literal["g", "v"]


def keys_for(weight: str, layout: str) -> tuple[str, str]:
    """The keys of g and v for the key of a weight, or for a parameter's name alone."""
    if layout == "legacy":
        return f"{weight}_g", f"{weight}_v"
    prefix, dot, param = weight.rpartition(".")
    stem = f"{prefix}{dot}parametrizations.{param}.original"
    return f"{stem}0", f"{stem}1"


def part_of(key: str) -> Part | None:
    """What a key says of itself if it is named like a g or a v."""
    if match := _PARAMETRIZED.fullmatch(key):
        return Part(match["prefix"] + match["param"], "parametrized", _PARTS[match["part"]])
    if match := _LEGACY.fullmatch(key):
        return Part(match["prefix"] + match["param"], "legacy", _PARTS[match["part"]])
    return None
