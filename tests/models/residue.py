"""What weight norm leaves behind in a model, of which there must be nothing."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def residue(model: nn.Module) -> list[str]:
    """Classes, hooks and tensors of any weight norm in the model."""
    found: list[str] = []
    for name, module in model.named_modules():
        cls = type(module)
        if cls.__name__.startswith("Parametrized") or "parametrizations" in module._modules:
            found.append(f"{name}: {cls.__name__}")
        found += [f"{name}: {hook}" for hook in module._forward_pre_hooks.values() if _norms(hook)]
        found += [f"{name}: {hook}" for hook in module._load_state_dict_pre_hooks.values()]
        found += [f"{name}.{key}" for key in module._parameters if key in ("weight_g", "weight_v")]
        if "weight" in module.__dict__:
            found.append(f"{name}.weight is no parameter")
    return found


def _norms(hook: Any) -> bool:
    return hasattr(hook, "compute_weight")


def plain_keys(keys: list[str]) -> set[str]:
    """The state dict keys of the same model without weight norm."""
    pattern = r"(parametrizations\.)?(?P<name>weight)(_[gv]|\.original[01])$"
    return {re.sub(pattern, r"\g<name>", key) for key in keys}
