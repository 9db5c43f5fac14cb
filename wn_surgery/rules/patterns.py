"""The name-pattern language: globs over dotted paths, compiled to one regular expression.

A pattern always has to match the full path. Braces are expanded first, the alternatives are
split at dots into segments, and alternatives that differ in one segment are merged again, so
that ``layers.{0..11}.*`` is one short expression and not twelve.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import bracex

from wn_surgery.errors import WeightNormError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["MAX_ALTERNATIVES", "Pattern", "PatternError", "PatternSet", "compile_pattern"]

MAX_ALTERNATIVES = 10_000
"""The most alternatives that the braces of one pattern may expand into."""

_ANY = frozenset({"**"})
_BRACES = "braces hold a list {a,b} or a range {0..11}; match a brace itself with 're:'"
_CLASSES = "write a class as [0-9] or [!a]; match a bracket itself with 're:'"


class PatternError(WeightNormError, ValueError):
    """A pattern is not in the language; the message says which piece, and what to write."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern; `compile_pattern` makes it."""

    source: str  # as it was written
    literal: bool  # it has no wildcard, no braces and no `re:`, and so names one path
    alternatives: tuple[str, ...] = field(compare=False)  # what the braces expand into
    exact: frozenset[str] = field(repr=False, compare=False)
    regex: re.Pattern[str] | None = field(repr=False, compare=False)

    def matches(self, path: str) -> bool:
        """Whether the pattern matches the whole of ``path``."""
        return path in self.exact or (self.regex is not None and bool(self.regex.fullmatch(path)))


@dataclass(frozen=True, slots=True)
class PatternSet:
    """Several patterns, any of which may match."""

    patterns: tuple[Pattern, ...]
    exact: frozenset[str] = field(repr=False, compare=False)
    regexes: tuple[re.Pattern[str], ...] = field(repr=False, compare=False)

    @classmethod
    def of(cls, sources: Iterable[str]) -> PatternSet:
        """Compile ``sources`` into one set; that of no patterns matches nothing."""
        patterns = tuple(map(compile_pattern, sources))
        exact = frozenset[str]().union(*(pattern.exact for pattern in patterns))
        regexes = tuple(pattern.regex for pattern in patterns if pattern.regex is not None)
        return cls(patterns, exact, regexes)

    def matches(self, path: str) -> bool:
        """Whether any of the patterns matches the whole of ``path``."""
        return path in self.exact or any(regex.fullmatch(path) for regex in self.regexes)

    @property
    def test(self) -> Callable[[str], object]:
        """The fastest that says the same as `matches`: most sets are one regular expression."""
        alone = len(self.regexes) == 1 and not self.exact
        return self.regexes[0].fullmatch if alone else self.matches


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> Pattern:
    """Compile a pattern of the name language; equal text gives the same object.

    ``*`` is any run of characters inside a segment (alone: one segment, whatever its name),
    ``?`` one character, ``[0-9]`` and ``[!a]`` one character of a class, ``**`` any number of
    whole segments, none included, ``{a,b}`` and ``{0..11}`` alternatives. ``re:`` makes the rest
    a regular expression for `re.fullmatch`. The empty pattern matches only the root.
    """
    if pattern.startswith("re:"):
        try:
            return Pattern(pattern, False, (pattern,), frozenset(), re.compile(pattern[3:]))
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"{pattern!r} is not a regular expression: {error}") from None
    alternatives = _expand(pattern)
    split = [_split(alternative) for alternative in alternatives]
    exact = frozenset(".".join(segments) for segments in split if not _is_glob(segments))
    globs = _merge([segments for segments in split if _is_glob(segments)])
    regex = re.compile("|".join(map(_path_regex, globs)), re.DOTALL) if globs else None
    return Pattern(pattern, pattern in exact, alternatives, exact, regex)


def _expand(pattern: str) -> tuple[str, ...]:
    """Expand the braces; a brace that is left over is an error rather than a character."""
    if "{" not in pattern and "}" not in pattern:
        return (pattern,)
    # The language has no escapes: a backslash, and the `$` that bash cares about, are characters.
    escaped = pattern.replace("\\", "\\\\").replace("${", "\\${")
    try:
        # bracex drops an alternative that is empty as a whole, so none may be.
        expanded = [text[1:] for text in bracex.expand(f"x{escaped}", limit=MAX_ALTERNATIVES)]
    except bracex.ExpansionLimitException:
        raise PatternError(
            f"the braces of {_short(pattern)} expand into more than {MAX_ALTERNATIVES} "
            "alternatives; use '*', or a regular expression after 're:'"
        ) from None
    except (RecursionError, ValueError):
        raise PatternError(f"cannot expand the braces of {_short(pattern)}; {_BRACES}") from None
    for text in expanded:
        if "{" in text or "}" in text:
            raise PatternError(f"a brace of {_short(pattern)} opens or closes nothing; {_BRACES}")
    return tuple(dict.fromkeys(expanded))


def _split(text: str) -> tuple[str, ...]:
    """Split at the dots, check every segment, and drop a ``**`` that follows another."""
    if not text:
        return ()
    segments: list[str] = []
    for segment in text.split("."):
        if not segment:
            raise PatternError(
                f"{_short(text)} has an empty segment; a path has no two dots in a row, and no "
                "dot at either end (a range goes in braces: {0..11})"
            )
        if segment == "**" and segments[-1:] == ["**"]:
            continue
        if "**" in segment and segment != "**":
            once = re.sub(r"\*+", "*", segment)
            raise PatternError(
                f"'**' stands for whole segments, so it cannot be a part of {_short(segment)}; "
                f"write {once!r} to stay in one segment, or put dots around '**'"
            )
        _segment_regex(segment)
        segments.append(segment)
    return tuple(segments)


def _is_glob(segments: Sequence[str]) -> bool:
    return any(character in segment for segment in segments for character in "*?[")


def _merge(paths: Sequence[tuple[str, ...]]) -> list[tuple[frozenset[str], ...]]:
    """Join paths that differ in one segment, position by position, to undo the expansion."""
    merged = [tuple(_ANY if part == "**" else frozenset({part}) for part in path) for path in paths]
    for position in range(max(map(len, merged), default=0)):
        groups: dict[object, tuple[frozenset[str], ...]] = {}
        for path in merged:
            if position >= len(path) or path[position] == _ANY:
                groups[path] = path
                continue
            before, part, after = path[:position], path[position], path[position + 1 :]
            key = (before, after, None)  # None: not equal to any path
            if known := groups.get(key):
                part |= known[position]
            groups[key] = (*before, part, *after)
        merged = list(groups.values())
    return merged


def _path_regex(path: tuple[frozenset[str], ...]) -> str:
    """Translate one path of segments, each a set of alternatives.

    Between two ``**`` only the leftmost match of a block matters, so it is an atomic group: the
    time stays linear in the path, where a plain translation is exponential in the number of
    ``**``. `slow` in tests/rules/test_patterns.py is the specification.
    """
    blocks: list[list[str]] = [[]]
    for part in path:
        if part == _ANY:
            blocks.append([])
        else:
            blocks[-1].append(f"(?:{'|'.join(map(_segment_regex, sorted(part)))})")
    head, *rest = [r"\.".join(block) for block in blocks]
    if not rest:
        return head
    *middle, tail = rest
    if not tail and not middle:
        return rf"{head}(?:\..*)?" if head else ".*"
    # After the last `**` comes the tail, or nothing: then the last block ends at a dot or the end.
    end = rf"(?:.*\.)?{tail}" if tail else rf"(?:[^.]+\.)*?{middle.pop()}(?:\..*)?"
    leftmost = "".join(rf"(?>(?:[^.]+\.)*?{block}\.)" for block in middle)
    return (rf"{head}\." if head else "") + leftmost + end


# One character of a segment, or a class; a bracket that comes first is a member of the class.
_TOKEN = re.compile(r"\[(?P<negated>!?+)(?P<members>.[^\]]*)\]|.", re.DOTALL)


def _segment_regex(segment: str) -> str:
    """Translate one segment; atomic groups keep several ``*`` from backtracking."""
    if segment == "*":
        return "[^.]+"
    chunks = [""]
    for token in _TOKEN.finditer(segment):
        if token["members"]:
            chunks[-1] += _class_regex(token, segment)
        elif token[0] == "*":
            chunks.append("")
        elif token[0] == "?":
            chunks[-1] += "[^.]"
        elif token[0] == "[":
            raise PatternError(
                f"a '[' of {_short(segment)} opens nothing (a class holds no dot); {_CLASSES}"
            )
        elif token[0] == "]":
            raise PatternError(f"a ']' of {_short(segment)} closes nothing; {_CLASSES}")
        else:
            chunks[-1] += re.escape(token[0])
    head, *rest = chunks
    if not rest:
        return head
    *middle, tail = rest
    return f"{head}{''.join(f'(?>[^.]*?{chunk})' for chunk in middle)}[^.]*{tail}"


def _class_regex(token: re.Match[str], segment: str) -> str:
    if token[0].startswith("[^"):
        raise PatternError(
            f"a class is negated with '!', not '^', in {_short(segment)}; {_CLASSES}"
        )
    items = ""
    for low, high, single in re.findall("(.)-(.)|(.)", token["members"], re.DOTALL):
        if low > high:
            raise PatternError(
                f"the range {low}-{high} of {_short(segment)} is empty; write it as {high}-{low}"
            )
        items += re.escape(single) or f"{re.escape(low)}-{re.escape(high)}"
    # No class may match a dot, be it negated or a range that a dot lies in.
    return f"[^.{items}]" if token["negated"] else rf"(?!\.)[{items}]"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
