"""PEFT: adapters on weight-normed layers, and merging them on every layout of weight norm."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

import wn_surgery as wn
from wn_surgery.rules.sources import Rule

__all__ = ["merge_and_unload", "merge_adapter", "without_adapters"]

_ADAPTERS = ("lora_", "vera_", "ia3_", "oft_", "boft_", "adalora_")
_SKIP = Rule(action="skip", names=[f"**.{prefix}*.**" for prefix in _ADAPTERS], label="adapters")


def without_adapters(model: nn.Module, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules, and one that skips adapters unless a rule names them."""
    # A broad rule would match them. LoRA matrices start at zero and cannot be normalised.
    parts = {part for path, _ in model.named_modules() for part in path.split(".")}
    names = [name for rule in rules for name in rule.names or ()]
    named = any(prefix in name for name in names for prefix in _ADAPTERS)
    there = any(part.startswith(_ADAPTERS) for part in parts)
    return (*rules, _SKIP) if there and not named else rules


def merge_and_unload(model: Any, **kwargs: Any) -> nn.Module:
    """Call ``model.merge_and_unload()`` on a PEFT model whose base has weight norm.

    PEFT adds an adapter to ``layer.weight.data``, which of a weight-normed layer is a computed
    tensor. On the weight norm of this library that takes effect, and PEFT's own method is as good.
    On that of torch, which models put on themselves, the adapter is silently lost. Here g and v
    follow the weights on both.

    Args:
        model: a PEFT model; LoRA, DoRA and others that merge.
        kwargs: to PEFT's method, such as ``safe_merge``.

    Returns:
        The base model with its weight norm and with the adapters merged.

    Raises:
        TypeError: the model has no adapters that merge.
        ZeroNormError: a merged weight has a slice of zero norm; g and v are as they were.

    Example:
        >>> import peft, torch, wn_surgery as wn
        >>> from wn_surgery.huggingface import merge_and_unload
        >>> model = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 8)})
        >>> _ = wn.apply(model, "linears")
        >>> tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["proj"]))
        >>> wn.sites(merge_and_unload(tuned))[0].layout
        'parametrized'
    """
    return cast(nn.Module, _merged(model, "merge_and_unload", kwargs))


def merge_adapter(model: Any, **kwargs: Any) -> None:
    """Call ``model.merge_adapter()`` on a PEFT model whose base has weight norm.

    Of torch or of this library: see :func:`merge_and_unload`. To take it back where the weight
    norm is that of torch, call ``model.unmerge_adapter()`` inside ``wn_surgery.writable(model)``.

    Args:
        model: a PEFT model.
        kwargs: to PEFT's method.

    Raises:
        TypeError: the model has no adapters that merge.
        ZeroNormError: a merged weight has a slice of zero norm; g and v are as they were.
    """
    _merged(model, "merge_adapter", kwargs)


def _merged(model: Any, method: str, kwargs: dict[str, Any]) -> Any:
    if not hasattr(model, method):
        raise TypeError(
            f"expected a PEFT model that has {method}(), got {type(model).__name__}; "
            "peft.get_peft_model() makes one"
        )
    with wn.writable(model):
        return getattr(model, method)(**kwargs)
