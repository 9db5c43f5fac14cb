"""Whole-model evaluation: the weights of a model computed in groups, once a forward.

In: a model.
Out: a :class:`Fusion`; weights, a group at a time.
Imports: errors, tables, norm, model, surgery.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import get_args

from torch import nn

from wn_surgery.errors import ModelError
from wn_surgery.fused.choice import Mode
from wn_surgery.fused.fusion import (
    Enter,
    Fusion,
    Member,
    hook,
    unhook,
)
from wn_surgery.model.sites import (
    as_module,
    is_folded,
    sites_of,
    walk,
)
from wn_surgery.surgery.execution import execute
from wn_surgery.surgery.planning import build_migration

__all__ = ["Fusion", "Member", "Mode", "fuse", "is_fused", "shared", "unfuse"]


def fuse(model: nn.Module, mode: Mode = "auto") -> Fusion:
    """Compute the weights of ``model`` in groups, each once a forward, with one autograd node.

    A group is computed when the first of its weights is read inside ``model(...)``; until
    that call returns, reading any of them costs what reading an attribute costs. Outside of
    it, and where a tracer or a transform looks on (``torch.compile``, ``torch.export``,
    ``torch.jit``, ``torch.func``, forward-mode AD), a weight is computed as if nothing were
    fused. Values, parameters, names, state dicts and optimizers are what they were. Copies
    and pickles of the model are fused too.

    Modules whose weight norm is ``torch.nn.utils.parametrizations.weight_norm`` become this
    library's first, as by :func:`wn_surgery.migrate`; the legacy hook's are left out.

    Args:
        model: the module that is called: weights are shared within one call of it. Fuse the
            generator and the discriminator, not what holds both.
        mode: ``auto``: Triton on CUDA where it can, torch's operators on the CPU; weights
            for which neither is possible are left out, and the result says why.
            ``triton``, ``cpu``: that path (``cpu`` means torch's operators, on any
            device), or an error.

    Returns:
        The groups; print it to see which path each weight takes, and why.

    Raises:
        ModelError: nothing in the model is weight-normed, or ``mode`` names a path that a
            weight cannot take.
        ModelError: the model is inside ``folded`` or ``writable``.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> _ = wn.apply(model, {"types": "Linear"})
        >>> print(wn.fuse(model))
        weight    path  group
        --------  ----  -----
        0.weight  cpu   0
        1.weight  cpu   0
        2 of 2 weights in 1 groups
    """
    if mode not in get_args(Mode):
        known = ", ".join(repr(name) for name in get_args(Mode))
        raise ValueError(f"fuse(mode={mode!r}): expected one of {known}; to end it, use unfuse()")
    nodes = walk(model)
    for node in nodes:
        if is_folded(node):
            where = node.paths[0] or type(model).__name__
            raise ModelError(
                f"{where} is inside folded() or writable(); leave it first", kind="folded"
            )
    found = [site for node in nodes for site in sites_of(node) if site.normed]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no weight-normed parameter to fuse; "
            "call wn_surgery.apply(model, rules) first",
            kind="fusion",
        )
    if any(site.layout == "parametrized" for site in found):
        execute(build_migration(model, "parametrized", {"parametrized"}))
    unfuse(model)
    fusion = Fusion(mode)
    fusion.build(model)
    refused = [member for member in fusion.members if member.path == "off"]
    if mode != "auto" and refused:
        fusion.release()
        first = refused[0]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ModelError(
            f"{first.name}{more} cannot take the path {mode!r}: {first.why}; "
            "with mode='auto' it is left out",
            kind="fusion",
        )
    hook(model, fusion)
    return fusion


def unfuse(model: nn.Module) -> int:
    """End whole-model evaluation in ``model`` and every module below it.

    Args:
        model: any module tree.

    Returns:
        How many fused roots there were.

    Example:
        >>> import torch, wn_surgery as wn
        >>> layer = torch.nn.Linear(4, 8)
        >>> _ = wn.apply(layer, {"names": ""})
        >>> _ = wn.fuse(layer)
        >>> wn.unfuse(layer), wn.unfuse(layer)
        (1, 0)
    """
    released = [fusion for module in as_module(model).modules() if (fusion := unhook(module))]
    for fusion in released:
        fusion.release()
    return len(released)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` itself, not only one below it, is a fused root.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.fused import is_fused
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> _ = wn.apply(model, {"types": "Linear"})
        >>> _ = wn.fuse(model)
        >>> is_fused(model), is_fused(model[0])
        (True, False)
    """
    hooks: list[object] = list(module._forward_pre_hooks.values())
    return any(isinstance(hook, Enter) for hook in hooks)


@contextmanager
def shared(model: nn.Module) -> Generator[None]:
    """Inside, several calls of a fused model share one computation of its weights.

    For a discriminator that sees real and generated samples, or for gradient accumulation:
    the backwards may run together or one after another, also after the context. An optimizer's
    step inside is seen: what follows is computed from the new g and v.

    Args:
        model: any module tree; fused roots below it are found.

    Raises:
        ModelError: nothing in the model is fused.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.fused import shared
        >>> layer = torch.nn.Linear(4, 8)
        >>> _ = wn.apply(layer, {"names": ""})
        >>> _ = wn.fuse(layer)
        >>> with shared(layer):
        ...     real, generated = layer(torch.ones(1, 4)), layer(torch.zeros(1, 4))
        >>> real.sum().backward(); generated.sum().backward()
    """
    found = list(_fusions(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} is not fused; call wn_surgery.fuse(model) first", kind="fusion"
        )
    owner = object()
    try:
        for fusion in found:
            fusion.enter(None, owner)
        yield
    finally:
        for fusion in found:
            fusion.leave(owner)


def _fusions(model: nn.Module) -> Iterator[Fusion]:
    for module in as_module(model).modules():
        for entry in module._forward_pre_hooks.values():
            if isinstance(entry, Enter):
                yield entry.fusion
