"""Clipping of gradients that counts v by its direction: ‖v‖ does not decide what is clipped.

The gradient of v is as long as 1/‖v‖ says: halve v, and the function stays, but the gradient
doubles. The gradient of the direction v/‖v‖ is ‖v‖ · ∇v, for each slice, because ∇v is at right
angles to v (Salimans & Kingma 2016, arXiv:1602.07868, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from wn_surgery.errors import ModelError
from wn_surgery.model.sites import normed
from wn_surgery.surgery.optimizers import all_unwrapped
from wn_surgery.training.renormalization import Direction, batches, norms_of, refuse_sharded

__all__ = ["clip_gradients"]


def clip_gradients(
    model: nn.Module,
    max_norm: float,
    *,
    optimizers: Optimizer | Iterable[Any] = (),
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale the gradients so that their norm is at most ``max_norm``; return the norm before.

    As :func:`torch.nn.utils.clip_grad_norm_`, but each slice of a gradient of v counts ‖v‖ times
    (``eps`` times where that is larger), as if its v had norm 1. So the same function with the same
    loss is clipped alike, however long v has become. If every v has norm 1, as after
    ``renormalize(model, 1.0)``, it is torch's function. All gradients are scaled by one number, so
    the step keeps its direction.

    Call it between ``backward`` and ``step``; with a ``GradScaler``, after ``unscale_``.

    Args:
        model: weight-normed, in any layout; also inside DDP, fused or compiled.
        max_norm: above 0; ``inf`` only measures.
        optimizers: if given, only what they hold is counted and clipped.
        error_if_nonfinite: raise if the norm is infinite or NaN.

    Returns:
        The norm, without axes. 0 if nothing has a gradient.

    Raises:
        ModelError: the model has no weight norm, or a v is sharded. Nothing has changed then.
        ValueError: ``max_norm`` is not a number above 0.
        RuntimeError: the norm is not finite, and ``error_if_nonfinite`` is set.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> _ = wn.apply(model, "linears")
        >>> model(torch.randn(16, 4)).square().sum().backward()
        >>> norm = wn.clip_gradients(model, 1.0)
        >>> print(f"{wn.clip_gradients(model, 1.0):.4f}")
        1.0000
    """
    if not isinstance(cast(object, max_norm), Real) or not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r}; expected a number above 0")
    sites = normed(model)
    if not sites:
        raise ModelError(
            f"{type(model).__name__} has no weight norm, and so no direction; apply it first, or "
            "call torch.nn.utils.clip_grad_norm_",
            kind="model",
        )
    groups = [group for each in all_unwrapped(optimizers) for group in each.param_groups]
    held = [p for group in groups for p in group["params"]] if groups else model.parameters()
    found = {id(p): p for p in held if p.grad is not None}
    directions: dict[int, Direction] = {}
    for site in sites:
        if id(site.held.v) in found:
            refuse_sharded(site)
            directions.setdefault(id(site.held.v), Direction(site, 1.0))
    with torch.no_grad():
        counted: list[Tensor] = [
            p.grad for key, p in found.items() if key not in directions and p.grad is not None
        ]
        for batch in batches(directions.values()):
            site = batch.members[0].site
            grads = torch.stack([cast(Tensor, each.v.grad) for each in batch.members])
            counted.append(norms_of(grads, site.dim) * batch.norms.clamp_min(site.norm.eps))
        total = get_total_norm(counted, error_if_nonfinite=error_if_nonfinite)
        clip_grads_with_norm_(found.values(), float(max_norm), total)
    return total
