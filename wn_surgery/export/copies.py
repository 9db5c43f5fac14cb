"""A copy of a model without weight norm, while the live model goes on training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from wn_surgery.errors import ExportError, ModelError
from wn_surgery.model.layouts import carried, hand_over
from wn_surgery.model.sites import normed
from wn_surgery.norm.module_class import FOLDED
from wn_surgery.surgery.execution import remove

__all__ = ["stripped_copy"]

M = TypeVar("M", bound=nn.Module)


def stripped_copy(model: M) -> M:
    """A copy of ``model`` without weight norm; the live model is only read.

    The copy's plain Parameters are new objects that share the memory of the live model's: training
    the live model changes them too, and an in-place write into one (``load_state_dict``,
    ``.data.mul_()``, an optimizer) reaches the live model. ``copy.half()``, ``.to(device)``,
    ``requires_grad_`` and ``.grad`` affect only the copy. Everything else is copied: computed
    weights, buffers, Parameters of special classes, attributes.
    ``copy.deepcopy(stripped_copy(model))`` shares nothing.

    Args:
        model: any module tree, in any layout, also fused or inside ``folded``, and after a
            forward in grad mode. Of a model compiled with ``torch.compile`` the model itself is
            copied. Hooks are treated as in ``copy.deepcopy``: bound methods become the copy's,
            functions are shared.

    Returns:
        The copy. Its weights have the bits that the live model computes from g and v.

    Raises:
        ExportError: something in the model cannot be copied; the message names it.
        ModelError: the model is inside DDP or FSDP.
        WeightNormError: weight norm cannot be removed: see :func:`wn_surgery.remove`.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.export import stripped_copy
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> _ = wn.apply(model, {"names": "0"})
        >>> plain = stripped_copy(model)
        >>> type(plain[0]) is torch.nn.Linear, type(model[0]) is torch.nn.Linear
        (True, False)
        >>> plain[1].weight.data_ptr() == model[1].weight.data_ptr()
        True
    """
    original = getattr(model, "_orig_mod", None)
    source = cast(M, original) if isinstance(original, nn.Module) else model
    for site in normed(source):
        if site.node.wrapped:
            raise ModelError(
                f"{site.node.paths[0] or type(source).__name__} is held by {site.node.wrapped}; "
                "copy the model inside DDP, stripped_copy(ddp.module); of a sharded model, gather "
                "the full state dict and load it into a model that is not sharded",
                kind="wrapped",
            )
    memo = {id(tensor): new for tensor, new in _replaced(source)}
    try:
        copied = copy.deepcopy(source, dict(memo))
    except Exception as error:
        raise ExportError(
            f"{type(source).__name__} cannot be copied: {_culprit(source, memo)} raised "
            f"{type(error).__name__}: {error}; take it out of the model while you copy, or "
            "give its class a __deepcopy__"
        ) from error
    remove(copied)
    return copied


def _replaced(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors that ``deepcopy`` must not copy in its own way, each with its replacement."""
    aliases: dict[int, nn.Parameter] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for parameter in module._parameters.values():
            if type(parameter) is not nn.Parameter or parameter.is_inference():
                continue
            if id(parameter) not in aliases:
                alias = nn.Parameter(parameter.detach(), parameter.requires_grad)
                hand_over(parameter, alias)
                aliases[id(parameter)] = alias
                yield parameter, alias
        # Computed weights are dropped when weight norm is removed: their bits need no copy.
        computed = FOLDED.get(module, {}).keys() | carried(module).keys()
        for name, value in vars(module).items():
            for tensor in _with_graph(value, seen):
                detached = tensor.detach()
                yield tensor, detached if name in computed else detached.clone()


def _with_graph(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors left by a forward that are not leaves, which ``deepcopy`` refuses."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _with_graph(item, seen)


def _culprit(model: nn.Module, memo: dict[int, Tensor]) -> str:
    """The first attribute that cannot be copied by itself."""
    for path, module in model.named_modules():
        where = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # noqa: BLE001 - the error itself was raised already
                return f"{where}{name} ({type(value).__name__})"
    return "it"
