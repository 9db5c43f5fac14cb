"""What a page shows, as data: weights, a tree, and what is wrong."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from wn_surgery.checkpoints.inspection import Inspection
from wn_surgery.model.layouts import Foreign
from wn_surgery.model.sites import Node, NormedSite, Site, could, sites_of, walk
from wn_surgery.norm.options import dtype_name
from wn_surgery.reporting.charts import Curve
from wn_surgery.rules.sources import RulesLike, given_rules
from wn_surgery.surgery.plan import Plan, Step
from wn_surgery.surgery.planning import build
from wn_surgery.training.statistics import History, measured

__all__ = ["Branch", "Content", "Note", "Weight", "of_checkpoint", "of_model", "runs"]

Severity: TypeAlias = Literal["error", "warning", "note"]
PARTS = {"g": "g", "v_norm": "‖v‖", "effective_lr": "lr/‖v‖²"}
DEEPEST = 40
"""How deep the tree is shown; what is below that has longer names instead."""


@dataclass
class Weight:
    """One row: a parameter of a model or a tensor of a file."""

    names: tuple[str, ...]
    kind: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    dim: object = None
    rule: str = ""
    becomes: str = ""  # the layout that the rules would give it
    g: Tensor | None = None
    v_norm: Tensor | None = None
    rate: float | None = None
    rates: Curve = ()
    zero: int | None = None  # rows without a direction
    bad: bool = False  # something about it is wrong


@dataclass
class Branch:
    """One module of the tree, or one part of a tensor's name."""

    kinds: list[str] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)  # their numbers among the rows
    others: list[str] = field(default_factory=list)
    size: int = 0  # its own numbers, and after totals() those of all that is below
    below: dict[str, Branch] = field(default_factory=dict)
    number: int = 0  # equal branches have the same one

    def at(self, parts: Iterable[str]) -> Branch:
        """The branch at a path, made where it is missing."""
        found = self
        for part in parts:
            found = found.below.setdefault(part, Branch())
        return found

    def totals(self) -> int:
        """Add up the sizes."""
        self.size += sum(each.totals() for each in self.below.values())
        return self.size

    def __len__(self) -> int:
        return 1 + sum(map(len, self.below.values()))


@dataclass
class Note:
    """One thing that deserves a look, and where it was seen."""

    severity: Severity
    text: str
    places: list[str] = field(default_factory=list)


@dataclass
class Content:
    """Everything on the page."""

    title: str
    weights: list[Weight]
    root: Branch
    notes: list[Note]
    rules: list[tuple[str, int]] = field(default_factory=list)  # and how many weights each decides
    curves: dict[str, list[tuple[str, Curve]]] = field(default_factory=dict)
    steps: int = 0
    live: bool = True

    def __post_init__(self) -> None:
        self.root.totals()
        number_alike(self.root, self.weights, {})


def of_model(
    model: nn.Module,
    rules: RulesLike | None = None,
    history: History | None = None,
    optimizers: Any = (),
) -> Content:
    """What to show of a model. Sharded parameters are gathered: every rank has to call it."""
    nodes = walk(model)
    plan = None if rules is None else build(model, given_rules("report", rules, {}), "ignore")
    steps = {} if plan is None else {(id(s.site.module), s.site.param): s for s in plan.steps}
    notes = _Notes()
    root, weights = Branch(), list[Weight]()
    normed: list[tuple[Weight, NormedSite]] = []
    seen = set[int]()
    for node in nodes:
        branch = root.at(_parts(node.paths[0]))
        branch.kinds.append(node.base.__name__)
        branch.size += _own_size(node, seen)
        for site in sites_of(node):
            step = steps.get((id(node.module), site.param))
            if not (step or site.held or could(site)):
                branch.others.append(site.param)
                continue
            weight = _weight(site, step)
            branch.weights.append(len(weights))
            weights.append(weight)
            if isinstance(site, NormedSite):
                normed.append((weight, site))
            elif isinstance(site.held, Foreign):
                notes.add("note", f"is computed by {site.held.maker}", site.name)
    _measure(normed, optimizers, notes)
    if isinstance(model, torch.jit.ScriptModule):
        notes.add("note", "is a TorchScript module, whose parameters are fixed", "the model")
    title = root.kinds[-1] if root.kinds else type(model).__name__  # of what wrappers hold
    content = Content(title, weights, root, notes.first(plan))
    if plan is not None:
        deciding = [step.rule for step in plan.steps]
        content.rules = [
            (rule.describe(), sum(rule is each for each in deciding)) for rule in plan.rules
        ]
    if history is not None:
        _add_history(content, history)
    return content


def _weight(site: Site, step: Step | None) -> Weight:
    tensor = site.tensor
    made = Weight(
        site.names,
        site.node.base.__name__,
        site.layout,
        site.shape,
        "" if tensor is None else dtype_name(tensor.dtype),
        site.dim,
    )
    if step is not None:
        made.rule = step.why if step.action != "skip" else f"{step.why}, skip"
        made.becomes = step.after if step.changes and step.after != site.layout else ""
    return made


def _own_size(node: Node, seen: set[int]) -> int:
    """The numbers in the module's own parameters that have not been counted elsewhere."""
    lists = node.module._modules.get("parametrizations")
    within = list(lists.parameters()) if isinstance(lists, nn.ModuleDict) else []
    total = 0
    for parameter in (*node.module._parameters.values(), *within):
        if parameter is None or id(parameter) in seen or nn.parameter.is_lazy(parameter):
            continue
        seen.add(id(parameter))
        total += parameter.numel()
    return total


def _measure(normed: list[tuple[Weight, NormedSite]], optimizers: Any, notes: _Notes) -> None:
    """Fill in g, ‖v‖ and the learning rate, and note what is wrong with them."""
    there = []
    for weight, site in normed:
        if site.held.v.is_meta:
            notes.add("note", "is on the meta device, without values", site.name)
        elif site.shape and 0 not in site.shape:
            there.append((weight, site))
    statistics = measured([site for _, site in there], optimizers).sites
    for found, (weight, site) in zip(statistics, there, strict=True):
        weight.g, weight.v_norm = found.g_values, found.v_norm_values
        weight.rate = found.effective_lr
        weight.zero = int((found.v_norm_values == 0).sum())
        broken = sum(int((~each.isfinite()).sum()) for each in (weight.g, weight.v_norm))
        if broken:
            notes.add("error", "has a g or a ‖v‖ that is NaN or infinite", found.name)
        if weight.zero and site.norm.eps == 0.0:
            notes.add("error", "has rows with ‖v‖ = 0, where v/‖v‖ is not a number", found.name)
        elif weight.zero:
            notes.add("note", "has rows with ‖v‖ = 0, which eps keeps at zero", found.name)
        elif gone := int((found.g_values == 0).sum()):
            many = "every g is" if gone == len(found.g_values) else "some g are"
            notes.add("warning", f"has rows of zeros: {many} 0", found.name)
        weight.bad = bool(broken or (weight.zero and site.norm.eps == 0.0))


class _Notes:
    """Notes by what they say; the places of one are kept together."""

    def __init__(self) -> None:
        self._found: dict[tuple[Severity, str], Note] = {}

    def add(self, severity: Severity, text: str, place: str) -> None:
        """Note something at a place."""
        key = (severity, text)
        self._found.setdefault(key, Note(severity, text)).places.append(place)

    def first(self, plan: Plan | None = None) -> list[Note]:
        """All of them, the worst first, and before them what the plan says."""
        said = []
        if plan is not None:
            said = [Note("error", str(problem)) for problem in plan.problems]
            said += [
                Note("warning", f"rule {each.number} decides nothing: {each.reason}")
                for each in plan.unmatched
            ]
        order: list[Severity] = ["error", "warning", "note"]
        return sorted([*said, *self._found.values()], key=lambda note: order.index(note.severity))


def _add_history(content: Content, history: History) -> None:
    content.steps = len(history.steps)
    for key in PARTS:
        found: dict[str, list[tuple[float, float]]] = {}
        for step, record in zip(history.steps, history.records, strict=True):
            for name, means in record.items():
                if key in means:
                    found.setdefault(name, []).append((float(step), means[key]))
        if found:
            content.curves[key] = list(found.items())
    rates: Mapping[str, Curve] = dict(content.curves.get("effective_lr", ()))
    for weight in content.weights:
        weight.rates = rates.get(weight.names[0], ())
        if weight.rate is None and weight.rates:
            weight.rate = weight.rates[-1][1]


def of_checkpoint(inspection: Inspection, title: str) -> Content:
    """What to show of a checkpoint."""
    root, weights = Branch(), list[Weight]()
    wrong = {each.name for each in inspection.findings if each.severity == "error"}
    for tensor in inspection.tensors:
        *parts, last = _of_key(tensor.name)
        branch = root.at(parts)
        branch.weights.append(len(weights))
        branch.size += math.prod(tensor.shape)
        layout = tensor.layout if tensor.norm == "weight" else "spectral"
        weights.append(Weight((tensor.name,), last, layout, tensor.shape, tensor.dtype, tensor.dim))
        made = weights[-1]
        made.g, made.v_norm = tensor.g_values, tensor.v_norm_values
        made.zero = None if tensor.g is None else tensor.zero_slices
        made.bad = tensor.name in wrong
    for name, shape in inspection.others.items():
        *parts, last = _of_key(name)
        branch = root.at(parts)
        branch.others.append(last)
        branch.size += math.prod(shape)
    notes = [Note(each.severity, each.message) for each in inspection.findings]
    return Content(title, weights, root, notes, live=False)


def _parts(path: str) -> list[str]:
    return path.split(".", DEEPEST) if path else []


def _of_key(name: str) -> list[str]:
    """The parts of a tensor's name, after the place of its state dict in the file."""
    place, slash, key = name.rpartition("/")
    return [place + slash, *_parts(key)] if slash else _parts(key) or [""]


def runs(branch: Branch) -> list[list[tuple[str, Branch]]]:
    """The branches below, equal neighbours whose names differ by a number together."""

    def kind(item: tuple[str, Branch]) -> tuple[int, str]:
        return item[1].number, re.sub(r"\d+", "0", item[0])

    return [list(run) for _, run in itertools.groupby(branch.below.items(), kind)]


def number_alike(branch: Branch, weights: list[Weight], numbers: dict[Any, int]) -> int:
    """Give this branch and all below their ``number``; equal ones get the same."""
    rows = [weights[number] for number in branch.weights]
    says = tuple((row.names[0].rpartition(".")[2], *_visible(row)) for row in rows)
    below = tuple((k, number_alike(each, weights, numbers)) for k, each in branch.below.items())
    key = (tuple(branch.kinds), says, tuple(branch.others), branch.size, below)
    branch.number = numbers.setdefault(key, len(numbers))
    return branch.number


def _visible(weight: Weight) -> tuple[object, ...]:
    return (weight.layout, weight.becomes, weight.shape, str(weight.dim), weight.rule, weight.bad)
