"""The ways to have weight norm, made from one plain model, and the check that they agree."""

from __future__ import annotations

import copy
import importlib
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wn_surgery as wn
from benchmarks.measure import Call
from benchmarks.models import Block
from wn_surgery.model.layouts import Normed
from wn_surgery.norm.math import norm_except

__all__ = [
    "BASE", "FORWARD", "MODES", "NO_GRAD", "PEERS", "STEP", "Alternative", "DisagreementError",
    "Mode", "Peer", "Workload", "agree", "alternatives", "check",
]  # fmt: skip

Mode: TypeAlias = Literal["forward (grad)", "forward (no grad)", "forward+backward"]
MODES: tuple[Mode, ...] = get_args(Mode)
FORWARD, NO_GRAD, STEP = MODES
BASE = "plain"


class DisagreementError(RuntimeError):
    """Two alternatives do not compute the same, so their times say nothing."""


@dataclass(frozen=True)
class Workload:
    """A model and what is done with it.

    Attributes:
        model: without weight norm, on its device; its dropout is 0.
        rules: where weight norm goes.
        forward: calls the model, or a copy of it, and gives its output.
        step: a whole training step instead of a forward and a backward from given noise.
        roots: the modules that are called, of the model or a copy: those to fuse.
        compiled: those to compile; ``None``: the roots.
        about: a line for the report.
    """

    model: nn.Module
    rules: dict[str, Any]
    forward: Callable[[Any], Tensor]
    step: Callable[[Any, Block], Tensor] | None = None
    roots: Callable[[Any], list[nn.Module]] = field(default=lambda model: [model])
    compiled: Callable[[Any], list[nn.Module]] | None = None
    about: str = ""


@dataclass(frozen=True)
class Peer:
    """One way to have weight norm.

    Attributes:
        name: the row of the table.
        prepare: puts it on a copy of the plain model.
        modes: where it makes sense.
        block: what surrounds a forward and its backward; it is part of what is timed.
        session: what surrounds all rounds.
        lacks: why it cannot be measured, or ``None``.
        compiles: whether it makes sense under ``torch.compile``.
    """

    name: str
    prepare: Callable[[Workload, nn.Module], object]
    modes: tuple[Mode, ...] = MODES
    block: Block = nullcontext
    session: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext
    lacks: Callable[[], str | None] = field(default=lambda: None)
    compiles: bool = True


@dataclass(frozen=True)
class Alternative:
    """What is timed in one row.

    Attributes:
        name: the row.
        call: one step; a number of calls in a row does the same each time.
        outcome: what has to agree with the other alternatives': its tensors by name.
        settle: frees what the last call left behind.
        prepared: what its peer's ``prepare`` returned.
    """

    name: str
    call: Call
    outcome: Callable[[], dict[str, Tensor]]
    settle: Callable[[], None] = field(default=lambda: None)
    prepared: object = None


def _legacy(workload: Workload, model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and what most models have
        for module, param, dim in _chosen(workload, model):
            torch.nn.utils.weight_norm(module, param, dim)


def _torch(workload: Workload, model: nn.Module) -> None:
    for module, param, dim in _chosen(workload, model):
        parametrizations.weight_norm(module, param, dim)


def _chosen(workload: Workload, model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Where the rules put weight norm: a plan changes nothing."""
    steps = wn.plan(model, workload.rules).changes
    return [(s.site.module, s.site.param, s.norm.dim) for s in steps if s.norm is not None]


def _ours(workload: Workload, model: nn.Module) -> None:
    wn.apply(model, workload.rules)


def _fused(workload: Workload, model: nn.Module) -> list[Any]:
    wn.apply(model, workload.rules)
    fuse = getattr(wn, "fuse", None)
    assert fuse is not None  # Peer.lacks was asked
    return [fuse(root) for root in workload.roots(model)]


def _native(workload: Workload, model: nn.Module) -> list[Any]:
    wn.apply(model, workload.rules)
    return [wn.fuse(root, "native") for root in workload.roots(model)]


def _no_native() -> str | None:
    if why := _no_fuse():
        return why
    try:
        building = importlib.import_module("wn_surgery.fused.native.building")
        building.load()
    except (ImportError, wn.ModelError) as error:
        return str(error).partition("\n")[0]
    return None


def _no_fuse() -> str | None:
    return None if hasattr(wn, "fuse") else "this wn_surgery has no fuse()"


def _nothing(_workload: Workload, _model: nn.Module) -> None:
    """Leave the model plain."""


PEERS: tuple[Peer, ...] = (
    Peer(BASE, _nothing),
    Peer(f"{BASE} (A/A)", _nothing),
    Peer("legacy", _legacy),
    Peer("torch", _torch),
    Peer("torch cached()", _torch, block=parametrize.cached, compiles=False),
    Peer("ours", _ours),
    Peer("ours fused", _fused, lacks=_no_fuse),
    Peer("ours native", _native, lacks=_no_native),
    Peer("ours folded", _ours, (NO_GRAD,), session=wn.folded, compiles=False),
)
"""Every peer, in the order of the table. ``torch`` is ``parametrizations.weight_norm``."""


@contextmanager
def alternatives(
    workload: Workload,
    mode: Mode,
    peers: tuple[Peer, ...] = PEERS,
    *,
    compiled: bool = False,
    around: Block = nullcontext,
) -> Iterator[list[Alternative]]:
    """Copies of the workload's model with each kind of weight norm, ready to be timed.

    Args:
        workload: whose model is copied, and left as it is.
        mode: what is timed.
        peers: the kinds; those that lack something or have no such mode are left out.
        compiled: compile the copies, and leave out what makes no sense then.
        around: surrounds each call, such as autocast.
    """
    with ExitStack() as sessions:
        ready = []
        for peer in peers:
            if mode not in peer.modes or peer.lacks() or (compiled and not peer.compiles):
                continue
            model = copy.deepcopy(workload.model).train(mode != NO_GRAD)
            prepared = peer.prepare(workload, model)
            if compiled:
                for part in (workload.compiled or workload.roots)(model):
                    part.compile()
            with torch.no_grad():
                sessions.enter_context(peer.session(model))
            ready.append(
                replace(_alternative(workload, mode, peer, model, around), prepared=prepared)
            )
        yield ready


def _alternative(
    workload: Workload, mode: Mode, peer: Peer, model: nn.Module, around: Block
) -> Alternative:
    parameters = list(model.parameters())
    upstream: list[Tensor] = []

    def settle() -> None:
        for parameter in parameters:
            parameter.grad = None

    def forward() -> Tensor:
        with around(), peer.block():
            return workload.forward(model)

    def no_grad() -> Tensor:
        with torch.no_grad(), around(), peer.block():
            return workload.forward(model)

    def step() -> Tensor:
        settle()  # as an optimizer's zero_grad, and in what is timed
        if workload.step is not None:
            with around():
                return workload.step(model, peer.block)
        with peer.block():
            with around():
                output = workload.forward(model)
            if not upstream:
                upstream.append(_upstream(output))
            torch.autograd.backward(output, upstream[0])
        return output.detach()

    call = {FORWARD: forward, NO_GRAD: no_grad, STEP: step}[mode]

    def outcome() -> dict[str, Tensor]:
        found = {"the output": call().detach().clone()}
        if mode == STEP:
            found |= _gradients(workload, model)
            settle()
        return found

    return Alternative(peer.name, call, outcome, settle)


def _upstream(output: Tensor) -> Tensor:
    """The same noise for all: a loss such as the mean square is constant after a layer norm."""
    chance = torch.Generator().manual_seed(0)
    return torch.randn(output.shape, generator=chance).to(output)


def _gradients(workload: Workload, model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters; for a plain weight those that its g and v would have."""
    found: dict[str, Tensor] = {}
    normed: set[int] = set()

    def add(name: str, gradient: Tensor | None) -> None:
        # A compiled graph gives zeros where eager mode gives nothing.
        if gradient is not None and gradient.any():
            found[f"the gradient of {name}"] = gradient.detach().clone()

    for site in wn.sites(model):
        if isinstance(site.held, Normed):
            g, v = site.held.g, site.held.v
            normed |= {id(g), id(v)}
            if g.grad is not None and v.grad is not None:
                add(site.name, _joined(g.grad, v.grad))
    if not normed:
        for step in wn.plan(model, workload.rules).changes:
            weight = step.site.tensor
            assert weight is not None and step.norm is not None
            normed.add(id(weight))
            if weight.grad is not None:
                norms = norm_except(weight.detach(), step.norm.dim)
                direction = weight.detach() / norms
                along = weight.grad * direction
                kept = [a for a in range(along.ndim) if norms.ndim and norms.shape[a] > 1]
                axes = [a for a in range(along.ndim) if a not in kept]
                grad_g = along.sum(axes, keepdim=bool(norms.ndim)) if axes else along
                add(step.site.name, _joined(grad_g, weight.grad - direction * grad_g))
    for name, parameter in model.named_parameters():
        if id(parameter) not in normed:
            add(name, parameter.grad)
    return found


def _joined(grad_g: Tensor, grad_v: Tensor) -> Tensor:
    """Both as one tensor: where a slice has one element, v's gradient is rounding alone."""
    return torch.cat([grad_g.flatten(), grad_v.flatten()])


def agree(found: Sequence[Alternative], tolerance: float) -> None:
    """Run each alternative once and :func:`check` them; the first that computes anything is right.

    Raises:
        DisagreementError: two do not compute the same.
    """
    outcomes = {each.name: tensors for each in found if (tensors := each.outcome())}
    check(outcomes, next(iter(outcomes)), tolerance)


def check(outcomes: Mapping[str, Mapping[str, Tensor]], base: str, tolerance: float) -> None:
    """Compare what the alternatives computed with what the base did.

    Args:
        outcomes: by alternative, then by tensor.
        base: the alternative that is right.
        tolerance: the largest difference, relative to the largest element of the tensor, or
            to a hundredth of the median tensor's, where that is more: the gradient of a bias
            that a softmax or a norm cancels is rounding alone.

    Raises:
        DisagreementError: an alternative lacks a tensor, or has another one.
    """
    sizes = {what: float(tensor.abs().max()) for what, tensor in outcomes[base].items()}
    floor = max(0.01 * statistics.median(sizes.values()), 1e-30)
    for name, found in outcomes.items():
        if found.keys() != outcomes[base].keys():
            odd = sorted(found.keys() ^ outcomes[base].keys())
            raise DisagreementError(
                f"{name} and {base} do not have the same tensors: {', '.join(odd)}"
            )
        for what, wanted in outcomes[base].items():
            tensor = found[what]
            if tensor.shape != wanted.shape:
                raise DisagreementError(
                    f"{name}: {what} is {tuple(tensor.shape)}, not {wanted.shape}"
                )
            off = float((tensor - wanted).abs().max()) / max(sizes[what], floor)
            # Not `off > tolerance`: a NaN is a disagreement too.
            if not off <= tolerance:
                raise DisagreementError(
                    f"{name}: {what} is off by {off:.2g} of its largest element"
                )
