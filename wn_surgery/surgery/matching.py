"""Which rule decides at which site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from wn_surgery.errors import RuleError
from wn_surgery.model.sites import Node, Site, sites_of
from wn_surgery.rules.rule import (
    Rule,
    is_universal,
    matches_class,
    matches_param,
    matches_path,
    takes_rank,
)
from wn_surgery.surgery import checks

__all__ = ["Match", "eligible", "match"]


@dataclass(frozen=True, eq=False, slots=True)
class Match:
    """The rules that match one site.

    Attributes:
        site: the site.
        winners: for each of the module's paths that a rule matches, the last such rule.
        winner: the last rule that matches under any path.
        shadowed: the other rules that match, in order.
    """

    site: Site
    winners: dict[str, int]
    winner: int
    shadowed: tuple[int, ...]


def match(nodes: Sequence[Node], rules: Sequence[Rule]) -> Iterator[Match]:
    """Every site that some rule matches, in the order of the nodes."""
    # Models have many modules, but few classes and few parameter names.
    by_class: dict[type, list[tuple[int, Rule]]] = {}
    by_param: dict[str, set[int]] = {}
    for node in nodes:
        if node.base not in by_class:
            by_class[node.base] = [
                (i, rule) for i, rule in enumerate(rules) if matches_class(rule, node.base)
            ]
        candidates = by_class[node.base]
        if not candidates:
            continue
        by_path: dict[str, list[int]] = {}
        for path in node.paths:
            if hits := [i for i, rule in candidates if matches_path(rule, path)]:
                by_path[path] = hits
        if not by_path:
            continue
        for site in sites_of(node):
            if site.param not in by_param:
                by_param[site.param] = {
                    i for i, rule in enumerate(rules) if matches_param(rule, site.param)
                }
            wanted = by_param[site.param]
            if wanted and (found := _match_site(site, by_path, wanted, rules)):
                yield found


def _match_site(
    site: Site, by_path: dict[str, list[int]], by_param: set[int], rules: Sequence[Rule]
) -> Match | None:
    winners: dict[str, int] = {}
    matching: set[int] = set()
    for path, candidates in by_path.items():
        hits = [i for i in candidates if i in by_param and eligible(site, rules[i], path)]
        if hits:
            winners[path] = hits[-1]
            matching.update(hits)
    if not winners:
        return None
    winner = max(winners.values())
    matching.discard(winner)
    return Match(site, winners, winner, tuple(sorted(matching)))


def eligible(site: Site, rule: Rule, path: str) -> bool:
    """Whether a rule that matches the module and the parameter's name may act on it."""
    if rule.where is not None:
        wanted: object = rule.where(path, site.module)
        if isinstance(wanted, Tensor) and wanted.numel() != 1:
            raise RuleError(
                f"rule `{rule.describe()}`: where returned a tensor of shape {tuple(wanted.shape)} "
                f"for {path or 'the root'}; expected True or False"
            )
        if not wanted:
            return False
    tensor = site.tensor
    if site.held is not None or tensor is None or checks.lazy(tensor):
        return True
    if not takes_rank(rule, site.param, tensor.ndim):
        return False
    # A rule that is about everything means everything it can mean; one that names
    # modules or types means these, and the plan says why they cannot be.
    return not is_universal(rule) or (
        checks.floating(tensor) and checks.quantizer(site.node, tensor) is None
    )
