"""Directions put back to a norm of their own: it changes the learning rate, not the function.

In w = g · v/‖v‖ the norm of v cancels, but the direction moves by lr/‖v‖² (gradient descent) or
lr/‖v‖ (Adam) at each step, and every step makes ‖v‖ grow. Putting v back to a fixed norm keeps this
effective learning rate what the schedule says. Karras et al. 2024 (arXiv:2312.02696, section 2.3)
call it forced weight normalization; nGPT (Loshchilov et al. 2024, arXiv:2410.01131, section 2.6)
does the same to every matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.optim import Optimizer

from wn_surgery.errors import ModelError, UnmatchedRuleError, WeightNormError
from wn_surgery.model.sites import NormedSite, is_folded, normed
from wn_surgery.norm.cuts import is_dtensor
from wn_surgery.norm.limits import least_norm
from wn_surgery.norm.math import PLAIN_TYPES, real_dtype, wanted_norm
from wn_surgery.norm.options import Dim, kept_axes
from wn_surgery.rules import fields
from wn_surgery.rules.patterns import PatternSet
from wn_surgery.surgery.checks import error_at, refused_norm
from wn_surgery.surgery.optimizers import all_unwrapped

__all__ = ["renormalize"]


def renormalize(
    model: nn.Module,
    norm: float | Literal["rms"] | None = None,
    *,
    names: str | Iterable[str] | None = None,
    optimizers: Optimizer | Iterable[Any] = (),
    project: bool = False,
) -> tuple[str, ...]:
    """Scale each slice of v, in place, to a given norm; the model's weights stay as they are.

    Call it after each optimizer step (``optimizer.register_step_post_hook`` does), and once before
    training. g takes part only where ``eps`` is above ‖v‖, and so part of the weight. Tied
    directions are scaled once, frozen ones not at all. Every rank of a process group computes the
    same. It costs one transfer from the device, for the check of the norms.

    The moments of an optimizer stay as they are: if every step is followed by it, ‖v‖ moves too
    little in between to matter. The ``z`` of a schedule-free optimizer is scaled with v, as is
    then the average of the two that it evaluates.

    Args:
        model: weight-normed, in any layout; also inside DDP, fused or compiled.
        norm: of each slice that has a g; ``"rms"`` is the square root of the slice's size, so that
            a step of Adam is as large for every shape. None is for the sites of rules with
            ``renormalize``, each with the norm that its rule says.
        names: patterns (docs/rules.md) over module paths; only these are scaled.
        optimizers: if given, only what they hold is scaled: after the step of a discriminator, say.
        project: remove from ``exp_avg`` and ``momentum_buffer`` in ``optimizers`` the part along v,
            which is left from earlier directions: it makes ‖v‖ grow faster (Heo et al. 2021,
            arXiv:2006.08217).

    Returns:
        The names of the sites whose v was scaled.

    Raises:
        ZeroNormError: a slice of v is zero, not finite, or too small to be scaled.
        ModelError: the model has no weight norm, or no rule says ``renormalize``; a v is folded,
            sharded or on meta; another package computes the weight; eps is above ``norm``; or a
            frozen g would have to change.
        UnmatchedRuleError: a pattern of ``names`` matches no weight-normed module.
        ValueError: ``norm`` is not one, or ``project`` is given without ``optimizers``.
        Nothing has changed then.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> _ = wn.apply(model, {"types": "Linear", "renormalize": True})
        >>> x = torch.randn(2, 4)
        >>> before = model(x)
        >>> wn.renormalize(model)
        ('0.weight',)
        >>> model[0].parametrizations.weight.original1.norm(dim=1).allclose(torch.ones(8))
        True
        >>> torch.testing.assert_close(model(x), before)
    """
    asked = fields.renormalize(norm)
    held = all_unwrapped(optimizers)
    if project and not held:
        raise ValueError("project=True removes a part of an optimizer's moments; give optimizers=")
    chosen = _chosen(model, asked, names, held)
    with torch.no_grad():
        found = list(batches(chosen))
        _check(found)
        for batch in found:
            batch.absorb()
        vs: list[Tensor] = [direction.v for batch in found for direction in batch.members]
        scales: Any = [scale for batch in found for scale in batch.scales()]
        if vs:
            torch._foreach_mul_(vs, scales)
        for optimizer in held:
            for batch in found:
                _follow(optimizer.state, batch, project)
    return tuple(direction.site.name for direction in chosen)


@dataclass(slots=True, eq=False)
class Direction:
    """One v, and the norm that it gets."""

    site: NormedSite
    wanted: float

    @property
    def v(self) -> nn.Parameter:
        return self.site.held.v


def _chosen(
    model: nn.Module,
    asked: float | Literal["rms"] | None,
    names: str | Iterable[str] | None,
    optimizers: list[Any],
) -> list[Direction]:
    sites = normed(model)
    if not sites:
        raise ModelError(
            f"{type(model).__name__} has no weight norm to renormalize; apply it first",
            kind="model",
        )
    if names is not None:
        sites = _named(sites, names)
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    found: dict[int, Direction] = {}
    said = False
    for site in sites:
        how = site.held.renormalize if asked is None else asked
        if how is None:
            continue
        said = True
        v = site.held.v
        # No step moves a frozen v, and whoever froze it does not expect it to move.
        if not v.requires_grad or 0 in site.shape or (optimizers and id(v) not in held):
            continue
        wanted = wanted_norm(how, site.shape, site.dim)
        if problem := _refused(site, wanted):
            raise problem
        before = found.setdefault(id(v), Direction(site, wanted))
        if (before.wanted, before.site.dim) != (wanted, site.dim):
            message = (
                f"{site.name} and {before.site.name} share one v, and want it at norm {wanted:g} "
                f"along dim={site.dim} and {before.wanted:g} along dim={before.site.dim}; "
                "give both the same"
            )
            raise error_at(site, "names", message)
    if not said:
        raise ModelError(
            f"no weight norm of {type(model).__name__} says what norm v is put back to; apply it "
            "by a rule with `renormalize: true`, or give renormalize(model, norm=1.0)",
            kind="model",
        )
    return list(found.values())


def _named(sites: list[NormedSite], names: str | Iterable[str]) -> list[NormedSite]:
    kept: set[int] = set()
    for source in fields.strings("names", names):
        pattern = PatternSet.of([source])
        matched = {i for i, site in enumerate(sites) if any(map(pattern.matches, site.node.paths))}
        if not matched:
            raise UnmatchedRuleError(
                f"names={source!r} matches no module with weight norm, so that there is no v to "
                "renormalize; print wn_surgery.sites(model), or apply weight norm first"
            )
        kept |= matched
    return [site for i, site in enumerate(sites) if i in kept]


def refuse_sharded(site: NormedSite) -> None:
    """Raise if no rank holds whole slices of v."""
    if is_dtensor(site.held.v) or site.holder not in (None, "DistributedDataParallel"):
        by = f" by {site.holder}" if site.holder else ""
        message = f"is sharded{by}, so that no rank holds whole slices of v, which this needs"
        raise error_at(site, "wrapped", f"{site.name} {message}")


def _refused(site: NormedSite, wanted: float) -> WeightNormError | None:
    v, maker = site.held.v, site.held.maker
    if is_folded(site.node):
        message = "is inside folded() or writable() now; leave the context first"
        return error_at(site, "folded", f"{site.name} {message}")
    refuse_sharded(site)
    if v.is_meta or is_fake(v):
        return error_at(site, "model", f"{site.name} is on the meta device and has no values")
    if v.is_inference():
        return error_at(site, "inference", f"{site.name} was made in inference mode; copy it first")
    if maker not in ("torch", "wn_surgery"):
        message = f"is computed by {maker}, for which ‖v‖ may matter; wn_surgery.migrate() it first"
        return error_at(site, "stacked", f"{site.name} {message}")
    if problem := refused_norm(wanted, site.norm, real_dtype(v.dtype)):
        return error_at(site, "model", f"{site.name} {problem}")
    return None


_TOGETHER = 1 << 18  # elements: where starting an operation costs more than a copy


@dataclass(slots=True, eq=False)
class _Batch:
    """Directions of one shape and one kind of norm, all g frozen or none; their norms, stacked."""

    members: list[Direction]
    norms: Tensor

    def scales(self) -> Iterable[Tensor]:
        """What each v is multiplied by."""
        return (self.members[0].wanted / self.norms).unbind()

    def absorb(self) -> None:
        """Let g take over, exactly, what eps has held back; see :func:`_check`."""
        first = self.members[0].site
        if first.norm.eps > 0.0 and first.held.g.requires_grad:
            for direction, norms in zip(self.members, self.norms, strict=True):
                direction.site.held.g.mul_(norms / norms.clamp_min(first.norm.eps))


def batches(chosen: Iterable[Direction]) -> Iterator[_Batch]:
    """Group directions so that each group is one stack."""
    alike: dict[Any, list[Direction]] = {}
    for direction in chosen:
        v = direction.v
        alone = id(v) if 2 * v.numel() > _TOGETHER or type(v) not in PLAIN_TYPES else None
        trains = direction.site.held.g.requires_grad
        key = (v.shape, v.dtype, v.device, direction.site.norm, direction.wanted, trains, alone)
        alike.setdefault(key, []).append(direction)
    for members in alike.values():
        count = max(1, _TOGETHER // max(1, members[0].v.numel()))
        for start in range(0, len(members), count):
            some = members[start : start + count]
            vs: list[Tensor] = [direction.v for direction in some]
            stacked = torch.stack(vs) if len(vs) > 1 else vs[0].unsqueeze(0)
            yield _Batch(some, norms_of(stacked, members[0].site.dim))


def norms_of(stacked: Tensor, dim: Dim) -> Tensor:
    """The norms of the slices, in float32 at least, so that the scale is not rounded twice."""
    x = stacked.abs() if stacked.is_complex() else stacked
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = {0, *(axis + 1 for axis in kept_axes(dim))}
    reduced = [axis for axis in range(x.ndim) if axis not in kept]
    if not reduced:
        return x.abs().to(wide)
    norms: Tensor = torch.linalg.vector_norm(x, 2, reduced, keepdim=dim is not None, dtype=wide)
    return norms


def _check(batches: list[_Batch]) -> None:
    """Raise for norms that cannot be divided by, and for a g that would have to change."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for batch in batches:
        found = by_device.setdefault(batch.norms.device, [])
        found.append(torch.stack(torch.aminmax(batch.norms)))
    ranges = {device: iter(torch.stack(found).tolist()) for device, found in by_device.items()}
    for batch in batches:
        low, high = next(ranges[batch.norms.device])
        least = least_norm(batch.norms.dtype)
        if not (least <= low and high < math.inf):
            raise _at_first(
                batch,
                lambda norms, least=least: ~(norms >= least) | norms.isinf(),
                "zero_norm",
                "{count} slice(s) along dim={dim} of v whose norm is zero, not finite, or below "
                f"{least:.1g}, and which have no direction to keep; initialise them, or leave the "
                "site out",
            )
        first = batch.members[0].site
        if low < (eps := first.norm.eps) and not first.held.g.requires_grad:
            raise _at_first(
                batch,
                lambda norms, eps=eps: norms < eps,
                "model",
                f"{{count}} slice(s) along dim={{dim}} of v below eps={eps}, of which a longer v "
                "would change the weight, and its g is frozen and cannot make up for it; let g "
                "train, or scale v above eps before you freeze g",
            )


def _at_first(batch: _Batch, bad: Any, kind: str, message: str) -> WeightNormError:
    """The error of the first site that has a bad norm."""
    for direction, norms in zip(batch.members, batch.norms, strict=True):
        if count := int(bad(norms).sum()):
            site = direction.site
            return error_at(
                site, kind, f"{site.name} has " + message.format(count=count, dim=site.dim)
            )
    raise AssertionError  # one of them has: aminmax says so


_MOMENTA = ("exp_avg", "momentum_buffer")


def _follow(state: Any, batch: _Batch, project: bool) -> None:
    """Bring along what an optimizer keeps of each v."""
    for direction, scale in zip(batch.members, batch.scales(), strict=True):
        v, kept = direction.v, state.get(direction.v, {})
        if isinstance(z := kept.get("z"), Tensor) and z.shape == v.shape:
            z.mul_(scale)
        for key in _MOMENTA if project else ():
            moment = kept.get(key)
            if isinstance(moment, Tensor) and moment.shape == v.shape:
                _project(moment, v, direction.site.dim)


def _project(moment: Tensor, v: Tensor, dim: Dim) -> None:
    """Remove from each slice of a moment the part along v."""
    reduced = [axis for axis in range(v.ndim) if axis not in kept_axes(dim)]
    if not reduced:
        moment.zero_()  # a slice of one element has no other direction
        return
    wide = torch.promote_types(v.dtype, torch.float32)
    x = v.to(wide)
    along = (x.conj() * moment.to(wide)).real.sum(reduced, keepdim=True)
    squares = (x.conj() * x).real.sum(reduced, keepdim=True)
    moment.sub_(x * (along / squares))
