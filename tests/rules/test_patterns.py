"""The pattern language: a table of rows, errors, and an independent slow matcher."""

from __future__ import annotations

import copy
import pickle
import re
import time
from fnmatch import fnmatchcase
from itertools import product

import bracex
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wn_surgery.rules.patterns import (
    MAX_ALTERNATIVES,
    PatternError,
    PatternSet,
    compile_pattern,
)

# Each row: a pattern, the paths it matches, the paths it does not.
LANGUAGE: list[tuple[str, list[str], list[str]]] = [
    # The root's own path is the empty string: `**` and the empty pattern match it.
    ("", [""], ["a", "a.b"]),
    ("**", ["", "a", "a.b", "a.b.c"], []),
    ("**.**", ["", "a", "a.b"], []),
    ("*", ["a", "0", "_x", "é"], ["", "a.b"]),
    ("?", ["a"], ["", "ab", "a.b"]),
    # Always a full match, case-sensitive, no implicit suffix or prefix match.
    ("a", ["a"], ["A", "aa", "a.b", "b.a", ""]),
    ("a.b", ["a.b"], ["a", "b", "a.b.c", "x.a.b", "a.bb", "aXb"]),
    ("gate", ["gate"], ["my_gate", "gate_proj", "mlp.gate"]),
    ("layers.1", ["layers.1"], ["layers.10", "layers.1.fc", "model.layers.1"]),
    # `*` stays within one segment.
    ("*.*", ["a.b"], ["a", "a.b.c"]),
    ("a.*", ["a.b"], ["a", "a.b.c"]),
    ("*.fc", ["a.fc"], ["fc", "a.b.fc"]),
    ("a.*.c", ["a.b.c"], ["a.c", "a.b.b.c"]),
    ("conv*", ["conv", "conv1", "conv_pre"], ["conv.a", "conv1.a", "my_conv", "Conv"]),
    ("*conv", ["conv", "my_conv"], ["a.conv", "conv1"]),
    ("*conv*", ["conv", "my_conv1"], ["a.conv", "con"]),
    ("a*c", ["ac", "abc", "abbc", "acc"], ["a.c", "acb"]),
    ("a*b*c", ["abc", "axbxc", "abbcc"], ["acb", "ab.c"]),
    ("*a*a", ["aa", "aba", "xaxa"], ["a", "aab"]),
    ("?*", ["a", "ab"], ["", "a.b"]),
    # `**` is zero or more whole segments.
    ("**.q_proj", ["q_proj", "a.q_proj", "a.b.q_proj"], ["my_q_proj", "a.my_q_proj", "q_proj.a"]),
    ("a.**", ["a", "a.b", "a.b.c"], ["ab", "b.a", ""]),
    ("a.**.z", ["a.z", "a.b.z", "a.z.z", "a.b.c.z"], ["a", "z", "az", "a.z.b"]),
    ("**.a.**", ["a", "a.b", "b.a", "b.a.b", "b.b.a.b.b"], ["", "ab", "b", "b.ab"]),
    ("**.*", ["a", "a.b"], [""]),
    ("*.**", ["a", "a.b", "a.b.c"], [""]),
    ("**.*.x", ["a.x", "a.b.x"], ["x", "a"]),
    ("**.a.*.**", ["a.b", "x.a.b.c", "a.a"], ["a", "x.a"]),
    ("**.a.**.b.**.c", ["a.b.c", "x.a.x.b.x.c", "a.a.b.c.c"], ["a.c", "b.a.c", "a.b", "a.b.c.x"]),
    ("**.a.b.**", ["a.b", "a.a.b", "x.a.b.y"], ["a.x.b", "a"]),
    ("a.**.b.c.**.d", ["a.b.c.d", "a.b.b.c.d", "a.x.b.c.x.d"], ["a.b.d", "a.b.x.c.d"]),
    ("**.**.x", ["x", "a.x", "a.b.x"], ["", "xa"]),
    # `?` and classes: one character, never a dot.
    ("a?c", ["abc", "a?c", "aéc"], ["ac", "a.c", "abbc"]),
    ("[0-9]", ["0", "9"], ["", "10", "a"]),
    ("l[0-35]", ["l0", "l3", "l5"], ["l4", "l"]),
    ("[abc]x", ["ax", "cx"], ["dx", "x"]),
    ("[!a]", ["b", "0"], ["a", "", "bb"]),
    ("a[!b]c", ["axc"], ["abc", "a.c", "ac"]),
    ("a[+-9]c", ["a-c", "a0c"], ["a.c"]),
    ("[]a]", ["]", "a"], ["b"]),
    ("[!]a]", ["b"], ["]", "a"]),
    ("[a-]", ["a", "-"], ["b"]),
    ("[-a]", ["a", "-"], ["b"]),
    ("[*]", ["*"], ["a"]),
    ("[?]", ["?"], ["a"]),
    ("[[]", ["["], ["a"]),
    ("[a^]", ["a", "^"], ["b"]),
    ("[a&&b]", ["a", "&", "b"], ["c"]),
    ("a[!x]*", ["ab", "abx"], ["a", "ax", "a.b"]),
    # Braces: lists, ranges, nesting, empty alternatives, dots within.
    ("{a,b}", ["a", "b"], ["c", "{a,b}", "ab"]),
    ("{q,k}_proj", ["q_proj", "k_proj"], ["v_proj"]),
    ("**.{q,k}_proj", ["q_proj", "x.k_proj"], ["x.v_proj"]),
    ("{0..11}", ["0", "1", "10", "11"], ["12", "01", "-1", "111"]),
    ("l.{0..11}.**", ["l.0", "l.11.a", "l.1.a.b"], ["l.12", "l.111", "l", "l.a"]),
    ("{00..02}", ["00", "01", "02"], ["0", "1"]),
    ("{3..1}", ["1", "2", "3"], ["0", "4"]),
    ("{0..10..5}", ["0", "5", "10"], ["1"]),
    ("{a..c}", ["a", "b", "c"], ["d"]),
    ("x{,_post}", ["x", "x_post"], ["x_", "_post"]),
    ("{,a.}b", ["b", "a.b"], ["a", "x.b"]),
    ("{a,b{1,2}}", ["a", "b1", "b2"], ["b", "a1"]),
    ("{encoder,decoder.pre}.**", ["encoder.a", "decoder.pre", "decoder.pre.a"], ["decoder.a"]),
    ("{a,**.b}", ["a", "b", "x.b"], ["x.a"]),
    ("{a*,b?}.c", ["a.c", "ax.c", "bx.c"], ["b.c", "c"]),
    ("{a,b}.{c,d}", ["a.c", "a.d", "b.c", "b.d"], ["a.b", "c.d"]),
    ("[{a,b}]", ["a", "b"], [","]),
    ("{,a}", ["", "a"], ["b"]),
    ("${a,b}", ["$a", "$b"], ["a"]),
    # Segments may hold any character but a dot; none of these has a meaning.
    ("a+b", ["a+b"], ["aab", "ab"]),
    ("(a|b)$^", ["(a|b)$^"], ["a"]),
    ("a\\b", ["a\\b"], ["ab"]),
    ("\\*", ["\\", "\\x"], ["*"]),
    ("\\{a,b}", ["\\a", "\\b"], ["{a,b}"]),
    ("a b", ["a b"], ["ab"]),
    ("a\nb", ["a\nb"], ["a"]),
    ("a*", ["a\nb"], ["a.b"]),
    ("-1", ["-1"], ["1"]),
    # `re:` is re.fullmatch on the rest.
    ("re:a|b", ["a", "b"], ["ab", "aa", "re:a|b"]),
    (r"re:layers\.\d+", ["layers.0", "layers.12"], ["layers.x", "layers.1.fc", "x.layers.1"]),
    ("re:.*", ["", "a", "a.b"], []),
    ("re:", [""], ["a"]),
    ("re:(?i)head", ["head", "HEAD"], ["heads"]),
    ("re:x{2}", ["xx"], ["x{2}"]),
]

ROWS = [
    (pattern, path, expected)
    for pattern, matched, others in LANGUAGE
    for paths, expected in ((matched, True), (others, False))
    for path in paths
]


@pytest.mark.parametrize(("pattern", "path", "expected"), ROWS)
def test_language(pattern: str, path: str, expected: bool) -> None:
    assert compile_pattern(pattern).matches(path) is expected
    assert PatternSet.of(["never", pattern]).matches(path) is expected


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a**b", "write 'a*b'"),
        ("a**", "write 'a*'"),
        ("***", "write '*'"),
        ("x.**y.z", "cannot be a part of '**y'"),
        ("a..b", "empty segment"),
        (".a", "empty segment"),
        ("a.", "empty segment"),
        (".", "empty segment"),
        ("{a,}.b", "'.b' has an empty segment"),
        ("layers.0..11", "a range goes in braces"),
        ("{a", "'re:'"),
        ("a}", "'re:'"),
        ("{}", "{a,b}"),
        ("{a}", "{a,b}"),
        ("{0..x}", "{0..11}"),
        ("{a,b", "opens or closes nothing"),
        ("{a,b}}", "opens or closes nothing"),
        ("[a", "'['"),
        ("[", "'['"),
        ("[]", "'['"),
        ("[!]", "'['"),
        ("a]", "']'"),
        ("a[.]b", "holds no dot"),
        ("[^a]", "not '^'"),
        ("[9-0]", "write it as 0-9"),
        ("re:(", "not a regular expression"),
        ("re:*", "not a regular expression"),
        ("{0..10000}", f"more than {MAX_ALTERNATIVES}"),
        ("{1..99}{1..99}{1..99}", f"more than {MAX_ALTERNATIVES}"),
        ("{1..999999999999}", f"more than {MAX_ALTERNATIVES}"),
        ("{" * 5000, "braces"),
    ],
)
def test_errors_name_the_piece_and_a_fix(pattern: str, said: str) -> None:
    with pytest.raises(PatternError) as caught:
        compile_pattern(pattern)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("pattern", "literal"),
    [
        *(("", True), ("a.b", True), ("a\\b", True)),
        *(("a*", False), ("a?", False), ("**", False), ("[a]", False)),
        *(("{a,b}", False), ("{a,a}", False), ("re:a", False)),
    ],
)
def test_literal(pattern: str, literal: bool) -> None:
    assert compile_pattern(pattern).literal is literal


def test_the_same_text_gives_the_same_object_which_can_be_copied_and_pickled() -> None:
    pattern = compile_pattern("a.{b,c*}")
    assert pattern is compile_pattern("a.{b,c*}")
    assert pattern.source == "a.{b,c*}"
    assert pattern.alternatives == ("a.b", "a.c*")
    for other in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern)):
        assert other == pattern
        assert hash(other) == hash(pattern)
        assert other.matches("a.cx")


def test_alternatives_become_one_short_expression() -> None:
    regex = compile_pattern("**.layers.{0..9}.{q,k,v}_*").regex
    assert regex is not None
    assert regex.pattern.count("layers") == 1


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("**.**.**.**.x", ".".join(["a"] * 5000)),
        ("**.a.**.a.**.a.**.a.**.a.**.x", ".".join(["a"] * 5000)),
        ("**.a.*.**.a.*.**.a.*.**.a.*.**", ".".join(["b"] * 5000)),
        ("*a*a*a*a*a*a*a*b", "a" * 5000),
        ("**.*a*a*a*a*b.**", ".".join(["a" * 30] * 200)),
    ],
)
def test_no_catastrophic_backtracking(pattern: str, path: str) -> None:
    start = time.process_time()
    assert not compile_pattern(pattern).matches(path)
    # Linear time is milliseconds; what this guards against is hours.
    assert time.process_time() - start < 5


# An independent matcher: by recursion over segments, with the standard library's fnmatch for one.


def slow(pattern: str, path: str) -> bool:
    segments = path.split(".") if path else []
    return any(
        _recurse(text.split(".") if text else [], segments)
        for text in (alternative[1:] for alternative in bracex.expand(f"x{pattern}", limit=0))
    )


def _recurse(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_recurse(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _recurse(pattern[1:], path[1:])


NAMES = st.text(alphabet="ab", min_size=1, max_size=4)
PATHS = st.lists(NAMES, max_size=6).map(".".join)
PIECES = st.sampled_from(["a", "b", "*", "?", "[ab]", "[!a]", "{a,b}", "{,a}b", "{b*,?}"])
SEGMENTS = st.lists(PIECES, min_size=1, max_size=4).map("".join).filter(lambda s: "**" not in s)
ALTERNATIVES = st.sampled_from(["{a,b.a}", "{**,a}", "{*.b,**.a}", "{a.**,b}"])
PATTERNS = st.lists(SEGMENTS | st.just("**") | ALTERNATIVES, max_size=5).map(".".join)


@settings(deadline=None)
@given(PATTERNS, PATHS)
@example("**.{b*,?}{b*,?}", "bb")
def test_agrees_with_the_slow_matcher(pattern: str, path: str) -> None:
    try:
        compiled = compile_pattern(pattern)
    except PatternError:
        # `{b*,?}*` and the like make a `**` inside a segment.
        assert any("**" in text for text in bracex.expand(pattern))
        return
    assert compiled.matches(path) is slow(pattern, path)


def test_agrees_with_the_slow_matcher_on_all_short_patterns() -> None:
    segments = ["a", "*", "**", "?b", "a*"]
    names = ["a", "b", "ab"]
    paths = [".".join(path) for n in range(5) for path in product(names, repeat=n)]
    for n in range(5):
        for parts in product(segments, repeat=n):
            pattern = compile_pattern(".".join(parts))
            for path in paths:
                assert pattern.matches(path) is slow(pattern.source, path), (pattern, path)


ANY_SEGMENT = st.text(min_size=1, max_size=8).filter(lambda s: not set(s) & set(".*?[]{}"))


@settings(deadline=None)
@given(st.lists(ANY_SEGMENT, max_size=5).map(".".join))
def test_a_plain_path_matches_itself_and_nothing_longer(path: str) -> None:
    if path.startswith("re:"):
        return
    pattern = compile_pattern(path)
    assert pattern.literal
    assert pattern.matches(path)
    assert not pattern.matches(f"{path}.x")
    assert not pattern.matches(f"{path}x")
    assert compile_pattern("**").matches(path)
    if path:
        assert compile_pattern(f"**.{path}").matches(f"x.{path}")
        assert compile_pattern(f"{path}.**").matches(path)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_every_text_is_a_pattern_or_a_pattern_error(text: str) -> None:
    try:
        compile_pattern(text).matches("a.b")
    except PatternError:
        return


@settings(deadline=None)
@given(PATHS, PATHS)
def test_an_escaped_path_is_a_regular_expression_for_itself(path: str, other: str) -> None:
    assert compile_pattern(f"re:{re.escape(path)}").matches(other) is (path == other)
