"""Which rule decides at which site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import checks
from .rules import Rule
from .sites import Node, Site, sites_of

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
    for node in nodes:
        by_path = {
            path: [i for i, rule in enumerate(rules) if rule.matches_module(path, node.base)]
            for path in node.paths
        }
        if not any(by_path.values()):
            continue
        for site in sites_of(node):
            winners: dict[str, int] = {}
            matching: set[int] = set()
            for path, candidates in by_path.items():
                hits = [i for i in candidates if eligible(site, rules[i], path)]
                if hits:
                    winners[path] = hits[-1]
                    matching.update(hits)
            if winners:
                winner = max(winners.values())
                shadowed = tuple(sorted(matching - {winner}))
                yield Match(site, winners, winner, shadowed)


def eligible(site: Site, rule: Rule, path: str) -> bool:
    """Whether a rule that matches the module matches this parameter of it."""
    if not rule.matches_param(site.param):
        return False
    if rule.where is not None and not rule.where(path, site.module):
        return False
    tensor = site.tensor
    if site.held is not None or tensor is None or checks.lazy(tensor):
        return True
    if tensor.ndim < 2 and not rule.names_param_literally(site.param):
        return False
    # A rule that is about everything means everything it can mean; one that names
    # modules or types means these, and the plan says why they cannot be.
    return not rule.is_universal or (
        checks.floating(tensor) and checks.quantizer(site.node, tensor) is None
    )
