"""Tied parameters: one tensor under several names, and what a rule says to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace as changed
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from wn_surgery.model.layouts import Normed, carried
from wn_surgery.model.sites import Node, Site, has_address, identity, sites_of
from wn_surgery.surgery.checks import before_apply, error_at
from wn_surgery.surgery.plan import Plan, Step

__all__ = ["Index", "resolve_ties", "tie_key"]


class _End(NamedTuple):
    node: Node
    param: str


def tie_key(tensor: Tensor, normed: bool) -> Hashable:
    """Equal for parameters that are one tensor: the same object, or the same memory.

    A direction v is compared by identity alone: torch's functions leave v aliasing the
    plain end of a former tie, and the two are no longer one parameter.
    """
    # In torch's legacy layout v is a parameter of the module as well.
    return -id(tensor) if normed else identity(tensor)


class Index:
    """Every parameter of a model: how many there are, and which are one tensor."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.ties: dict[Hashable, list[_End]] = {}
        sizes: dict[int, int] = {}
        # Most tensors have a place of their own, which is quicker to ask for than a key.
        places: list[int] = []
        for node in nodes:
            for _, tensor, normed in _tensors(node):
                sizes[id(tensor)] = tensor.numel()
                places.append(_place(tensor, normed))
            if (lists := node.module._modules.get("parametrizations")) is not None:
                sizes.update((id(p), p.numel()) for p in lists.parameters())
        self.count = sum(sizes.values())
        if len(set(places)) == len(places):
            return
        counts = Counter(places)
        for node in nodes:
            for name, tensor, normed in _tensors(node):
                if counts[_place(tensor, normed)] > 1:
                    self.ties.setdefault(tie_key(tensor, normed), []).append(_End(node, name))


def _place(tensor: Tensor, normed: bool) -> int:
    """What tied tensors share, and few others."""
    if normed:
        return -id(tensor)
    # On the meta device, and where it is empty, the address is 0.
    return (has_address(tensor) and tensor.data_ptr()) or id(tensor)


def _tensors(node: Node) -> list[tuple[str, Tensor, bool]]:
    """Every parameter of a module, and every v once more."""
    module = node.module
    found: list[tuple[str, Tensor, bool]] = [
        (name, parameter, False)
        for name, parameter in module._parameters.items()
        if type(parameter) is nn.Parameter
        or (parameter is not None and not nn.parameter.is_lazy(parameter))
    ]
    if "parametrizations" in module._modules or module._forward_pre_hooks:
        for name, held in carried(module).items():
            if isinstance(held, Normed):
                found.append((name, held.v, True))
    return found


_Steps: TypeAlias = "dict[tuple[int, str], Step]"  # by module and parameter


def resolve_ties(plan: Plan, index: Index) -> None:
    """Make the plan treat every end of a tie as the rules say; add problems where they cannot."""
    if not index.ties:
        return
    steps: _Steps = {_where(step.site): step for step in plan.steps}
    for step in plan.changes:
        tensor = step.site.tensor
        # An earlier end of the tie may have decided for this one, or a rule skips it.
        decided = step.group is not None or not step.changes
        if tensor is None or nn.parameter.is_lazy(tensor) or decided:
            continue
        key = tie_key(tensor, step.site.normed)
        ends = index.ties.get(key, ())
        if len(ends) > 1:
            others = [end for end in ends if _where(end) != _where(step.site)]
            _resolve(plan, step, key, others, steps)
    rank = {id(node): i for i, node in enumerate(index.nodes)}
    plan.steps.sort(key=lambda step: rank[id(step.site.node)])


def _resolve(plan: Plan, step: Step, key: Hashable, others: list[_End], steps: _Steps) -> None:
    """Decide what becomes of one end of a tie, and of the others with it."""
    present = [steps.get(_where(end)) for end in others]
    mode = "together" if step.rule is None else step.rule.tied
    if step.action in ("remove", "replace") and all(_alike(step, other) for other in present):
        mode = "together"
    tied_to = ", ".join(map(_named, others))
    if mode == "error":
        message = (
            f"{step.site.name} is tied to {tied_to}: they are one tensor, and changing one end "
            "would end the tie in silence; give the rule tied='together' (one g and one v under "
            "both), tied='untie' (a copy), or tied='skip'"
        )
        plan.problems.append(error_at(step.site, "tied", message))
    elif mode == "skip":
        step.action, step.after, step.norm = "skip", step.site.layout, step.site.norm
        step.why += f", tied to {tied_to}"
    elif mode == "untie":
        # The last end to leave may keep the tensor: nobody shares it any more.
        leaving = [each for each in present if each and each.action == step.action and each.copies]
        step.copies = len(leaving) < len(others)
        step.leaves = any(
            _is_one(end, step.site) and steps.get(_where(end)) not in leaving for end in others
        )
        step.why += f", untied from {tied_to}"
    else:
        _join(plan, step, key, others, steps)


def _named(end: _End) -> str:
    return f"{end.node.paths[0]}.{end.param}".removeprefix(".")


def _is_one(end: _End, site: Site) -> bool:
    """Whether the other end is the same Parameter, and not another one in its memory."""
    return site.normed or end.node.module._parameters.get(end.param) is site.tensor


def _join(plan: Plan, step: Step, key: Hashable, others: list[_End], steps: _Steps) -> None:
    """Give the other ends of a tie the same step, under one group."""
    step.group = key
    for end in others:
        other = steps.get(_where(end))
        if other is None:
            site = next((site for site in sites_of(end.node) if site.param == end.param), None)
            if site is None:
                message = (
                    f"{step.site.name} has its values in the memory of {_named(end)}, which is a "
                    "part of another weight norm, so the two cannot have one g and one v; give the "
                    "rule tied='untie' (a copy), or tied='skip'"
                )
                plan.problems.append(error_at(step.site, "tied", message))
                continue
            joined = changed(step, site=site, why=f"tied to {step.site.name}", shadowed=())
            if step.action == "apply":
                plan.problems += before_apply(site)
            plan.steps.append(joined)
            steps[_where(site)] = joined
        elif _alike(step, other):
            other.group = key
        else:
            message = (
                f"{step.site.name} and {other.site.name} are one tied parameter, but "
                f"{step.why} says {_told(step)} and {other.why} says {_told(other)}; "
                "give both the same options, or use tied='untie'"
            )
            plan.problems.append(error_at(step.site, "names", message))


def _alike(step: Step, other: Step | None) -> bool:
    if other is None or (step.action, step.norm) != (other.action, other.norm):
        return False
    return step.norm is None or _of_g(step) == _of_g(other)


def _of_g(step: Step) -> str:
    """What the rule says of training g and v, if anything."""
    if step.rule is None:
        return ""
    said = {key: getattr(step.rule, key) for key in ("g_init", "renormalize")}
    words = [f", {key}={value}" for key, value in said.items() if value is not None]
    return "".join([*words, "" if step.rule.train_g else ", train_g=False"])


def _told(step: Step) -> str:
    return step.action if step.norm is None else f"{step.action} {step.norm}{_of_g(step)}"


def _where(end: Site | _End) -> tuple[int, str]:
    return id(end.node.module), end.param
