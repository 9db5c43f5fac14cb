"""Which rule decides at which site."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from wn_surgery.errors import RuleError
from wn_surgery.model.holders import axes, in_parts
from wn_surgery.model.sites import Node, Site, sites_of
from wn_surgery.rules.rule import (
    Rule,
    is_universal,
    matches_class,
    matches_param,
    matches_path,
    path_test,
    takes_rank,
)
from wn_surgery.surgery import checks

__all__ = ["Match", "eligible", "match", "takes"]


Match: TypeAlias = tuple[Site, dict[str, int], list[int]]
"""A site; for each of its paths that rules match, the last; all rules that match it, in order.

Rules are numbered from 0.
"""


def match(nodes: Sequence[Node], rules: Sequence[Rule]) -> Iterator[Match]:
    """Every site that some rule matches, in the order of the nodes."""
    numbered = list(enumerate(rules))
    tests = [path_test(rule) for rule in rules]

    # Models have many modules, but few classes and few parameter names.
    by_class: dict[type, list[tuple[int, Callable[[str], object]]]] = {}

    @functools.cache
    def of_param(param: str) -> set[int]:
        return {i for i, rule in numbered if matches_param(rule, param)}

    for node in nodes:
        base = node.base
        if base not in by_class:
            by_class[base] = [(i, tests[i]) for i, rule in numbered if matches_class(rule, base)]
        if not (typed := by_class[base]):
            continue
        named = [(path, i) for path in node.paths for i, test in typed if test(path)]
        for site in sites_of(node, of_param) if named else ():
            wanted = of_param(site.param)
            taken = [
                (path, i) for path, i in named if i in wanted and eligible(site, rules[i], path)
            ]
            if taken:
                yield site, dict(taken), sorted({i for _, i in taken})


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
    if site.held is not None and tensor is not None and rule.action != "remove":
        # As before it had weight norm: a rule that names it may have put it on.
        return takes_rank(rule, site.param, axes(tensor)) or in_parts(tensor)
    if site.held is not None or tensor is None or nn.parameter.is_lazy(tensor):
        return True
    # FSDP1 has one dimension for everything, and does not say what its parts are parts of.
    if not takes_rank(rule, site.param, axes(tensor)) and not in_parts(tensor):
        return False
    # A rule that is about everything means everything it can mean; one that names
    # modules or types means these, and the plan says why they cannot be.
    return not is_universal(rule) or (
        (tensor.is_floating_point() or tensor.is_complex())
        and checks.quantizer(site.node, tensor) is None
    )
