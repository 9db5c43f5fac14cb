"""What would break or bloat an export: the weight-normed parameters that a target cannot take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from wn_surgery.model.sites import Site, sites_of, walk
from wn_surgery.surgery.checks import runs_no_hook
from wn_surgery.tables import render

__all__ = ["Effect", "Finding", "Preflight", "Target", "check"]

Target: TypeAlias = Literal[
    "onnx",
    "torch.export",
    "torchscript-trace",
    "torchscript-script",
    "aotinductor",
    "ort-quantize",
    "torch-quantize",
    "torchao",
]
"""What a model is exported to, by default options: ``onnx`` is ``torch.onnx.export(dynamo=True)``,
``ort-quantize`` onnxruntime's ``quantize_dynamic`` of that file, ``torch-quantize``
``torch.ao.quantization.quantize_dynamic``, ``torchao`` its ``quantize_`` to int8."""

Effect: TypeAlias = Literal["breaks", "unquantized", "stale", "bloats"]
"""``breaks``: the export, or its result, raises. ``unquantized``: the weight silently stays in
floating point. ``stale``: the exported weight is not that of g and v. ``bloats``: the result is
right, but computes the weight at each call."""

# The most elements that the ONNX exporter's own constant folding takes.
_FOLDED_BY_ONNX = 8192

# The exact types that quantize_dynamic replaces by default.
_QUANTIZED_BY_TORCH = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


_Verdict: TypeAlias = tuple[Effect, str]


@dataclass(frozen=True)
class Finding:
    """One weight-normed parameter that causes a problem with a target.

    Attributes:
        name: the parameter's first name.
        type: its module's class, without weight norm.
        layout: ``legacy``, ``parametrized``, or ``other`` where something else is stacked on it.
        effect: what happens; see :data:`Effect`.
        why: the reason, in words.
    """

    name: str
    type: str
    layout: str
    effect: Effect
    why: str

    def to_dict(self) -> dict[str, str]:
        """The finding as plain JSON data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Preflight:
    """What :func:`check` found: ``print`` it.

    Attributes:
        target: the target that was asked about.
        findings: what would go wrong, in the order of the model.
        normed: how many weight-normed parameters the model has.
    """

    target: Target
    findings: tuple[Finding, ...]
    normed: int = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing would go wrong."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain JSON data."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"target": self.target, "ok": self.ok, "normed": self.normed, "findings": findings}

    def __repr__(self) -> str:
        return f"<Preflight for {self.target}: {len(self.findings)} findings, {self.normed} normed>"

    def __str__(self) -> str:
        if self.ok:
            of = f"; {self.normed} weight-normed parameters do no harm here" if self.normed else ""
            return f"no problem with {self.target}{of}"
        rows = [(each.name, each.layout, each.effect, each.why) for each in self.findings]
        fix = "export wn_surgery.export.stripped_copy(model) instead"
        if any(each.layout == "other" for each in self.findings):
            fix = "first remove what else computes the parameters of layout 'other'"
        return (
            f"{render(['site', 'layout', 'effect', 'why'], rows)}\n{len(rows)} of {self.normed} "
            f"weight-normed parameters would cause problems with {self.target}; {fix}"
        )


def check(model: nn.Module, target: Target) -> Preflight:
    """What would break or bloat if ``model`` were exported with its weight norm on.

    Nothing is exported, run or imported: the answers are known from real exports, which
    tests/export/test_check.py repeats. Inside ``folded`` the answer is about the model outside it.

    Args:
        model: any module tree. It is only read.
        target: what to export to; see :data:`Target`.

    Returns:
        A finding for each weight-normed parameter that would cause a problem.

    Raises:
        ValueError: the target is unknown.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.export import check
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Conv1d(8, 8, 1))
        >>> _ = wn.apply(model, {"names": "*"})
        >>> print(check(model, "torch-quantize"))
        site      layout        effect  why
        --------  ------------  ------  --------------------------------------------------...
        0.weight  parametrized  breaks  quantize_dynamic refuses the class of a weight-normed Linear
        1 of 2 weight-normed parameters would cause problems with torch-quantize; export
        wn_surgery.export.stripped_copy(model) instead
    """
    if target not in get_args(Target):
        known = ", ".join(repr(name) for name in get_args(Target))
        raise ValueError(f"check(target={target!r}): expected one of {known}")
    found = [site for node in walk(model) for site in sites_of(node) if _has_weight_norm(site)]
    findings = []
    for site in found:
        verdict = _stale(site, target) or _JUDGES[target](site)
        if verdict is not None:
            findings.append(Finding(site.name, site.node.base.__name__, site.layout, *verdict))
    return Preflight(target, tuple(findings), len(found))


def _has_weight_norm(site: Site) -> bool:
    # Stacked on another parametrization it does the same harm, but cannot be removed alone.
    return site.normed or (site.held is not None and "WeightNorm" in site.held.maker)


def _stale(site: Site, target: Target) -> _Verdict | None:
    """Attention reads ``out_proj.weight`` without a call, so that a legacy hook never runs."""
    if site.layout != "legacy" or not runs_no_hook(site):
        return None
    if target in ("torch-quantize", "torchao", "torchscript-script"):
        return None
    if target == "torchscript-trace" and _has_graph(site):
        return "breaks", "attention reads a tensor with a graph, which is not a constant"
    return "stale", "attention never runs the hook, so it reads an old weight"


def _scripted(site: Site) -> _Verdict:
    if site.layout == "legacy":
        return "breaks", "torch.jit.script does not take hooks that are objects"
    if site.ours:
        return "breaks", "torch.jit.script cannot compile the property that computes it"
    return "breaks", "torch.jit.script fails, or what it saves raises when run"


def _folds(site: Site) -> bool:
    return site.tensor is not None and site.tensor.numel() <= _FOLDED_BY_ONNX


def _onnx(site: Site) -> _Verdict | None:
    if _folds(site):
        return None
    why = f"norm, division and product stay in the graph: more than {_FOLDED_BY_ONNX} elements"
    return "bloats", why


def _quantized_by_ort(site: Site) -> _Verdict | None:
    module = site.module
    if _folds(site):
        return None
    if isinstance(module, _ConvTransposeNd | nn.RNNBase):
        return "bloats", f"{site.node.base.__name__} is not quantized; the norm stays"
    if not isinstance(module, _ConvNd):
        return "unquantized", "quantize_dynamic passes over weights that are computed"
    bias = module._parameters.get("bias")
    # The exporter leaves out a bias of zeros, with which many vocoders are initialized.
    if bias is not None and (bias.is_meta or bias.any()):
        return "breaks", "quantize_dynamic raises: weight beside a bias is computed"
    return "unquantized", "stored in floating point and quantized at each call"


def _quantized_by_torch(site: Site) -> _Verdict | None:
    name = site.node.base.__name__
    if site.node.base in _QUANTIZED_BY_TORCH:
        if site.layout == "legacy":
            return "breaks", f"the hook runs in a {name} that no longer has g and v"
        return "breaks", f"quantize_dynamic refuses the class of a weight-normed {name}"
    if site.layout == "legacy" and _has_graph(site):
        return "breaks", "it deep-copies the model, which fails for a weight with a graph"
    return None


def _quantized_by_torchao(site: Site) -> _Verdict | None:
    module = site.module
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    return "breaks", "quantize_ cannot assign a quantized weight where one is computed"


def _has_graph(site: Site) -> bool:
    weight = site.module.__dict__.get(site.param)
    return isinstance(weight, Tensor) and not weight.is_leaf


_JUDGES: dict[Target, Callable[[Site], _Verdict | None]] = {
    "onnx": _onnx,
    "torch.export": lambda _: (
        "bloats",
        "an operator of the graph computes the weight at each use",
    ),
    "torchscript-trace": lambda _: ("bloats", "traced operators compute the weight at each use"),
    "torchscript-script": _scripted,
    "aotinductor": lambda _: ("bloats", "compiled code computes the weight at each call"),
    "ort-quantize": _quantized_by_ort,
    "torch-quantize": _quantized_by_torch,
    "torchao": _quantized_by_torchao,
}
