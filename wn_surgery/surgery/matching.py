"""Which rule decides at which site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

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

__all__ = ["Match", "eligible", "match", "takes"]


@dataclass(frozen=True, eq=False, slots=True)
class Match:
    """The rules that match one site, by index."""

    site: Site
    winners: dict[str, int]  # for each path that a rule matches, the last such rule
    winner: int  # the last rule that matches under any path
    shadowed: tuple[int, ...]  # the other rules that match, in order


def match(nodes: Sequence[Node], rules: Sequence[Rule]) -> Iterator[Match]:
    """Every site that some rule matches, in the order of the nodes."""
    # Models have many modules, but few classes and few parameter names.
    by_class: dict[type, list[tuple[int, Rule]]] = {}
    by_param: dict[str, set[int]] = {}
    numbered = list(enumerate(rules))
    for node in nodes:
        base = node.base
        if base not in by_class:
            by_class[base] = [(i, rule) for i, rule in numbered if matches_class(rule, base)]
        by_path = {
            path: hits
            for path in node.paths
            if (hits := [i for i, rule in by_class[base] if matches_path(rule, path)])
        }
        for site in sites_of(node) if by_path else ():
            param = site.param
            if param not in by_param:
                by_param[param] = {i for i, rule in numbered if matches_param(rule, param)}
            wanted = by_param[param]
            found = {
                path: hits
                for path, named in by_path.items()
                if (hits := [i for i in named if i in wanted and eligible(site, rules[i], path)])
            }
            if found:
                winners = {path: hits[-1] for path, hits in found.items()}
                winner = max(winners.values())
                others = set[int]().union(*found.values()) - {winner}
                yield Match(site, winners, winner, tuple(sorted(others)))


def takes(rule: Rule, site: Site) -> bool:
    """Whether a rule matches a site under any of its paths."""
    node = site.node
    return (
        matches_class(rule, node.base)
        and matches_param(rule, site.param)
        and any(matches_path(rule, path) and eligible(site, rule, path) for path in node.paths)
    )


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
    if site.held is not None or tensor is None or nn.parameter.is_lazy(tensor):
        return True
    if not takes_rank(rule, site.param, tensor.ndim):
        return False
    # A rule that is about everything means everything it can mean; one that names
    # modules or types means these, and the plan says why they cannot be.
    return not is_universal(rule) or (
        (tensor.is_floating_point() or tensor.is_complex())
        and checks.quantizer(site.node, tensor) is None
    )
