"""What g, v and the weight are called in each layout."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias, cast

__all__ = ["Layout", "NormedLayout", "Part", "keys_for", "part_of"]

NormedLayout: TypeAlias = Literal["legacy", "parametrized"]
Layout: TypeAlias = Literal["plain", "legacy", "parametrized"]

_LEGACY = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<param>[^.]+)_(?P<part>[gv])", re.DOTALL)
_PARAMETRIZED = re.compile(
    r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<param>[^.]+)\.original(?P<part>[01])", re.DOTALL
)


class Part(NamedTuple):
    """What the key of a g or a v says.

    Attributes:
        weight: the key of the weight in the plain layout.
        layout: the layout that the key belongs to.
        part: which of the two it is.
    """

    weight: str
    layout: NormedLayout
    part: Literal["g", "v"]


def keys_for(weight: str, layout: str) -> tuple[str, str]:
    """The keys of g and v for the key of a weight, or for a parameter's name alone.

    Example:
        >>> from wn_surgery.norm.naming import keys_for
        >>> keys_for("weight", "legacy"), keys_for("a.weight", "parametrized")[0]
        (('weight_g', 'weight_v'), 'a.parametrizations.weight.original0')
    """
    if layout == "legacy":
        return f"{weight}_g", f"{weight}_v"
    prefix, dot, param = weight.rpartition(".")
    stem = f"{prefix}{dot}parametrizations.{param}.original"
    return f"{stem}0", f"{stem}1"


def part_of(key: str) -> Part | None:
    """What a key says of itself if it is named like a g or a v.

    Example:
        >>> from wn_surgery.norm.naming import part_of
        >>> part_of("a.weight_v")
        Part(weight='a.weight', layout='legacy', part='v')
    """
    if match := _PARAMETRIZED.fullmatch(key):
        part = cast('Literal["g", "v"]', "gv"[int(match["part"])])
        return Part(match["prefix"] + match["param"], "parametrized", part)
    if match := _LEGACY.fullmatch(key):
        return Part(match["prefix"] + match["param"], "legacy", cast('Literal["g", "v"]', match[3]))
    return None
