"""Weights ↔ g and v inside transformers' own loading and saving."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from typing_extensions import override

from wn_surgery.model.reloading import built_keys
from wn_surgery.model.state_keys import Keys, keys_of
from wn_surgery.norm.operator import weight_norm
from wn_surgery.norm.options import NormOptions
from wn_surgery.norm.parametrization import parts_of

__all__ = ["built_in", "drop_ours", "reading_plain", "save_as_built"]


class _OfNorm(ConversionOps):
    """A conversion with the options of a norm."""

    def __init__(self, norm: NormOptions, g_init: float | None = None) -> None:
        self.norm = norm
        self.g_init = g_init

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Version 0.1.0 kept the module WeightNorm, which has the options.
        norm = state["norm"]
        self.__init__(getattr(norm, "options", norm), state.get("g_init"))  # type: ignore[misc]


class _Split(_OfNorm):
    """A weight → its g and v; ``g_init`` takes the place of its norm, as in a rule."""

    @override
    @torch.no_grad()
    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        g, v = parts_of(_only(input_dict.values()), self.norm)
        if self.g_init is not None:
            g = torch.full_like(g, self.g_init)
        return dict(zip(target_patterns, (g, v), strict=True))

    @property
    @override
    def reverse_op(self) -> ConversionOps:
        return _Merge(self.norm)


class _Merge(_OfNorm):
    """A g and v → their weight."""

    @override
    @torch.no_grad()
    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        g, v = (_only([input_dict[pattern]]) for pattern in source_patterns)
        return {target_patterns[0]: weight_norm(v, g, *self.norm)}

    @property
    @override
    def reverse_op(self) -> ConversionOps:
        return _Split(self.norm)


def reading_plain(
    model: PreTrainedModel, sites: Iterable[Mapping[str, Any]] | None = None
) -> list[Any]:
    """Return converters by which a weight-normed model reads a checkpoint of plain weights."""
    fills = {site["name"]: site.get("g_init") for site in sites or ()}
    result = []
    for key in keys_of(model):
        split = _Split(key.site.norm, fills.get(key.site.name))
        result.append(WeightConverter(f"^{re.escape(key.weight)}$", [key.g, key.v], [split]))
    return result


def drop_ours(model: nn.Module) -> None:
    """Forget what loading converted to g and v: saving would convert it back."""
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        vars(model)["_weight_conversions"] = _others(conversions)


def _others(conversions: Iterable[Any]) -> Any:
    """Return the converters that are not ours, and do not read legacy names as parametrized."""

    def parametrizes(each: Any) -> bool:
        targets = getattr(each, "target_patterns", ())
        return any("parametrizations" in name and ".original" in name for name in targets)

    def is_ours(each: Any) -> bool:
        return any(isinstance(op, _OfNorm) for op in getattr(each, "operations", ()))

    return [each for each in conversions if not is_ours(each) and not parametrizes(each)]


def built_in(model: PreTrainedModel) -> list[Keys]:
    """Return the sites on which the model's class itself puts weight norm when it is built.

    None for a class that cannot be built from its config alone: then what is saved says where
    weight norm is, or that there is none.
    """
    try:
        return list(built_keys(model).values())
    except Exception:  # noqa: BLE001 - the constructor is not ours
        return []


def save_as_built(model: PreTrainedModel, removed: Iterable[str]) -> None:
    """Have ``save_pretrained`` write g and v where the class of a stripped model looks for them.

    A class that puts weight norm on in ``__init__`` does not read a plain ``weight``. ``removed``
    has the keys of the weights that are plain.
    """
    gone = set(removed)
    # As if loading had merged the weights, which saving reverts.
    merged = [
        WeightConverter([re.escape(key.g), re.escape(key.v)], [key.weight], [_Merge(key.site.norm)])
        for key in built_in(model)
        if key.weight in gone
    ]
    if not merged:
        return
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # What transformers would take for a model that was not loaded from a checkpoint.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in conversions if not isinstance(each, PrefixChange)]
    kept: Any = [*_others(conversions), *merged]
    model._weight_conversions = kept


def _only(values: Iterable[Any]) -> Tensor:
    (value,) = values
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
