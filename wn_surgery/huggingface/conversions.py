"""Weights ↔ g and v inside transformers' own loading and saving."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from wn_surgery.huggingface.bases import (
    ConversionOps,
    PrefixChange,
    PreTrainedModel,
    WeightConverter,
    get_model_conversion_mapping,
)
from wn_surgery.model.reloading import built_keys
from wn_surgery.model.state_keys import Keys, keys_of
from wn_surgery.norm.math import weight_norm
from wn_surgery.norm.options import NormOptions
from wn_surgery.norm.parametrization import parts_of

__all__ = ["built_in", "is_ours", "reading_plain", "save_as_built"]


class _Split(ConversionOps):
    """A weight → its g and v; ``g_init`` takes the place of its norm, as in a rule."""

    def __init__(self, norm: NormOptions, g_init: float | None = None) -> None:
        self.norm = norm
        self.g_init = g_init

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002
        target_patterns: list[str],
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        """One tensor under its name → two under theirs."""
        g, v = parts_of(_only(input_dict.values()), self.norm)
        if self.g_init is not None:
            g = torch.full_like(g, self.g_init)
        return dict(zip(target_patterns, (g, v), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        """Their weight."""
        return _Merge(self.norm)


class _Merge(ConversionOps):
    """A g and v → their weight."""

    def __init__(self, norm: NormOptions) -> None:
        self.norm = norm

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Two tensors under their names → one under its own."""
        g, v = (_only([input_dict[pattern]]) for pattern in source_patterns)
        return {target_patterns[0]: weight_norm(v, g, *self.norm)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Its g and v."""
        return _Split(self.norm)


def reading_plain(
    model: PreTrainedModel, sites: Iterable[Mapping[str, Any]] | None = None
) -> list[Any]:
    """Converters by which a weight-normed model reads a checkpoint of plain weights."""
    fills = {site["name"]: site.get("g_init") for site in sites or ()}
    return [
        WeightConverter(
            f"^{re.escape(key.weight)}$",
            [key.g, key.v],
            [_Split(key.site.norm, fills.get(key.site.name))],
        )
        for key in keys_of(model)
    ]


def is_ours(conversion: Any) -> bool:
    """Whether a converter is one of these, or reads legacy names into parametrized ones.

    Saving reverts what loading has converted; g and v are to stay as they are.
    """
    operations = getattr(conversion, "operations", ())
    return any(isinstance(operation, (_Split, _Merge)) for operation in operations) or any(
        "parametrizations" in target and ".original" in target
        for target in getattr(conversion, "target_patterns", ())
    )


def built_in(model: PreTrainedModel) -> list[Keys]:
    """The sites on which the model's class itself puts weight norm when it is built.

    None for a class that cannot be built from its config alone: then nobody can tell, and what is
    saved says where weight norm is, or that there is none.
    """
    try:
        return list(built_keys(model).values())
    except Exception:  # noqa: BLE001 - the constructor is not ours
        return []


def save_as_built(model: PreTrainedModel, removed: Iterable[str]) -> list[str]:
    """Have ``save_pretrained`` write g and v where the model's class will look for them.

    A class that puts weight norm on in ``__init__`` finds no ``weight`` in a stripped checkpoint's
    place, and leaves g and v as they happen to be in memory.

    Args:
        model: stripped.
        removed: the keys of the weights that are plain now.

    Returns:
        Those of them that will be saved as g and v.
    """
    gone = set(removed)
    keys = [key for key in built_in(model) if key.weight in gone]
    if not keys:
        return []
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # What transformers would take for a model that was not loaded from a checkpoint.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in conversions if not isinstance(each, PrefixChange)]
    # As if the weights had been merged on loading, which saving reverts.
    merged = [
        WeightConverter([re.escape(key.g), re.escape(key.v)], [key.weight], [_Merge(key.site.norm)])
        for key in keys
    ]
    kept: Any = [*(each for each in conversions if not is_ours(each)), *merged]
    model._weight_conversions = kept
    return [key.weight for key in keys]


def _only(values: Iterable[Any]) -> Tensor:
    (value,) = values
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
