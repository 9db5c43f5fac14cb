"""Why a rule matches nothing, and what its author probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from wn_surgery.model.holders import FSDP1
from wn_surgery.model.sites import Node, sites_of
from wn_surgery.rules.rule import Rule, matches_module, matches_param
from wn_surgery.surgery import checks
from wn_surgery.surgery.matching import eligible

__all__ = ["Unmatched", "explain"]


@dataclass(frozen=True)
class Unmatched:
    """A rule that decides nothing: its number from 1, which part of it failed, and near misses."""

    number: int
    reason: str
    kind: str = "unmatched"  # of the error that it calls for


def explain(index: int, rules: Sequence[Rule], nodes: Sequence[Node]) -> Unmatched:
    """Find the first part of rule ``index`` that leaves nothing over."""
    rule = rules[index]
    included = _matching(rule, nodes)
    for node, _ in included:
        if callable(getattr(node.base, "weight", None)) and (maker := checks.quantizer(node, None)):
            reason = (
                f"{node.paths[0]} is quantized ({maker}) and has no floating-point weight; change "
                "weight norm before quantization"
            )
            return Unmatched(index + 1, reason, "quantized")
        if node.wrapped == FSDP1 and not any(matches_param(rule, s.param) for s in sites_of(node)):
            reason = (
                f"{node.paths[0]} is held by {FSDP1}, which has taken its parameters "
                "(use_orig_params=False); change weight norm before wrapping the model"
            )
            return Unmatched(index + 1, reason, "wrapped")
    if included:
        return Unmatched(index + 1, _why_no_site(index, rules, included))
    typed = _matching(replace(rule, exclude_names=(), exclude_types=()), nodes)
    named = _matching(replace(rule, types=None, exclude_names=(), exclude_types=()), nodes)
    if typed:
        reason = f"excluded: all {len(typed)} modules it matches are excluded by itself"
    elif named:
        reason = _wrong_type(rule, [node for node, _ in named], nodes)
    else:
        paths = [path for node in nodes for path in node.paths]
        hints = [_hint(pattern, rule, nodes, paths) for pattern in rule.names or ()]
        wanted = " or ".join(map(repr, rule.names or ()))
        reason = "; ".join([f"no module is named {wanted}", *filter(None, hints)])
    return Unmatched(index + 1, reason)


def _why_no_site(index: int, rules: Sequence[Rule], included: list[tuple[Node, str]]) -> str:
    """Why a rule that matches modules decides about none of their parameters."""
    rule = rules[index]
    sites = [
        (site, path)
        for node, path in included
        for site in sites_of(node)
        if matches_param(rule, site.param)
    ]
    if not sites:
        return _no_such_parameter(rule, [node for node, _ in included])
    if not any(eligible(site, replace(rule, where=None), path) for site, path in sites):
        return _not_eligible([site.name for site, _ in sites])
    if not any(eligible(site, rule, path) for site, path in sites):
        return "its `where` predicate is false for every parameter it matches"
    later = [
        str(i)
        for i, other in enumerate(rules[index + 1 :], index + 2)
        if any(matches_module(other, path, node.base) for node, path in included)
    ]
    return (
        f"shadowed: every parameter it matches is decided by a later rule ({', '.join(later)}); "
        "the last matching rule wins, so put special rules after general ones"
    )


def _matching(rule: Rule, nodes: Iterable[Node]) -> list[tuple[Node, str]]:
    return [
        (node, path)
        for node in nodes
        for path in node.paths
        if matches_module(rule, path, node.base)
    ]


def _hint(pattern: str, rule: Rule, nodes: Sequence[Node], paths: Sequence[str]) -> str:
    if not pattern.startswith(("re:", "**")):
        anywhere = replace(rule, names=(f"**.{pattern}",), types=None)
        if found := _matching(anywhere, nodes):
            return f"did you mean '**.{pattern}' ({_some(path for _, path in found)})?"
    parent, _, last = pattern.rpartition(".")
    if parent and not pattern.startswith("re:"):
        found = _matching(replace(rule, names=(parent,), types=None), nodes)
        if any(last in node.module._parameters for node, _ in found):
            return f"{last!r} is a parameter: did you mean names='{parent}', params='{last}'?"
    folded = pattern.lower()
    if same := [path for path in paths if path.lower() == folded]:
        return f"names are case-sensitive: did you mean {same[0]!r}?"
    if near := difflib.get_close_matches(pattern, paths[:20_000], n=3, cutoff=0.75):
        return f"did you mean {_some(near)}?"
    if pattern.startswith("re:"):
        return ""
    # The longest start of the pattern without wildcards that is a module; the root at least.
    start = re.split(r"[*?\[{]", f"{pattern}.")[0].rpartition(".")[0]
    while start and start not in paths:
        start = start.rpartition(".")[0]
    prefix = f"{start}." if start else ""
    inside = (path.removeprefix(prefix) for path in paths if path.startswith(prefix) and path)
    children = sorted({path.split(".")[0] for path in inside})
    holder = f"{start!r} exists and" if start else "the model"
    return f"{holder} holds {_some(children, 6)}" if children else f"{start!r} has no children"


def _wrong_type(rule: Rule, by_name: Sequence[Node], nodes: Sequence[Node]) -> str:
    wanted = " or ".join(t if isinstance(t, str) else t.__name__ for t in rule.types or ())
    where = "in the model" if rule.names is None else "under the names it matches"
    present = sorted({node.base.__name__ for node in by_name if node.module._parameters})
    reason = f"no {wanted} {where}; the types there are {_some(present, 8)}"
    everywhere = sorted({base.__name__ for node in nodes for base in node.base.__mro__})
    for kind in rule.types or ():
        name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
        near = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.7)
        if near and near[0] != name:
            reason += f"; did you mean {near[0]!r}?"
    return reason


def _no_such_parameter(rule: Rule, nodes: Sequence[Node]) -> str:
    wanted = " or ".join(map(repr, rule.params))
    sites = [site for node in nodes for site in sites_of(node)]
    held = dict.fromkeys(site.param for site in sites)  # in order, each once
    kinds = sorted({node.base.__name__ for node in nodes})
    if not held:
        return f"no parameter {wanted}: the modules it matches ({_some(kinds)}) have none"
    matrices = [
        site.param
        for site in sites
        if site.tensor is not None and (nn.parameter.is_lazy(site.tensor) or site.tensor.ndim >= 2)
    ]
    suggestion = list(dict.fromkeys(matrices or held))
    return (
        f"no parameter {wanted} in {_some(kinds)}, which has {_some(held, 8)}; "
        f"did you mean params={suggestion[:4]}?"
    )


def _not_eligible(names: Sequence[str]) -> str:
    param = names[0].rpartition(".")[2]
    # The default, `weight`, says nothing of vectors: only another spelling of it names them.
    naming = f"re:{param}" if param == "weight" else param
    return (
        f"{_some(names)} has fewer than two dimensions or is not floating-point; a vector takes "
        f"weight norm only where the rule names it, e.g. params={naming!r} without wildcards"
    )


def _some(items: Iterable[str], most: int = 3) -> str:
    listed = list(items)
    shown = ", ".join(repr(item) for item in listed[:most])
    return shown + (f" and {len(listed) - most} more" if len(listed) > most else "")
