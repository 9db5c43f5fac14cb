"""Loading models of diffusers, by a quantizer that quantizes nothing, as for transformers.

diffusers asks the quantizer that a model's config names, between building the model and reading its
weights, and after. One that it does not know is an error, and its name says what to install.
"""

from __future__ import annotations

from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.errors import CheckpointMismatchError
from wn_surgery.huggingface.config import METHOD, WeightNormConfig, fill_in, put_note, type_of
from wn_surgery.huggingface.patching import freeze, put
from wn_surgery.model import records
from wn_surgery.model.sites import normed
from wn_surgery.norm.naming import Layout, keys_for

__all__ = ["DiffusionQuantizer", "register"]


class DiffusionQuantizer(DiffusersQuantizer):
    """Puts weight norm on a model of diffusers while ``from_pretrained`` builds it."""

    quantization_config: Any  # a WeightNormConfig, which is of the family of transformers

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._keys: frozenset[str] = frozenset()
        self._layouts: dict[str, Layout] = {}

    @override
    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        """Take note of what the checkpoint has."""
        self._keys = frozenset(loaded_keys)
        return loaded_keys

    @override
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Store each noted weight of the empty model in the layout in which it will be read."""
        config = self.quantization_config
        self._layouts = {site["name"]: self._layout(model, site) for site in config.sites or ()}
        for site in normed(model):
            if site.name in self._layouts:  # by the class, with options or in a layout of its own
                wn.remove(site.module, params=site.param)
        if split := self._sites("parametrized", "legacy"):
            put(model, WeightNormConfig(config.rules, split))
        for site in normed(model):
            if self._layouts.get(site.name) == "legacy":
                wn.migrate(site.module, to="legacy")

    @override
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Put weight norm on weights that were plain, and leave a model that is not quantized."""
        config = self.quantization_config
        for site in normed(model):
            if self._layouts.get(site.name) == "legacy":
                wn.migrate(site.module)
        if config.sites is None:
            put(model, config)
        elif plain := self._sites("plain"):
            # Their norm is g by now, whatever a rule filled g with.
            bare = [{key: site[key] for key in site if key != "g_init"} for site in plain]
            put(model, WeightNormConfig(config.rules, bare))
        freeze(model, config)
        sites = fill_in(records.record(model), config.sites)
        put_note(model, WeightNormConfig(config.rules, sites, type_of(model)))
        for mark in ("is_quantized", "quantization_method"):
            vars(model).pop(mark, None)

    def _layout(self, model: Any, site: Any) -> Layout:
        """In which layout the checkpoint has a weight."""
        name: str = site["name"]
        if self._keys.issuperset(keys_for(name, "parametrized")):
            return "parametrized"
        if self._keys.issuperset(keys_for(name, "legacy")):
            return "legacy"
        if name in self._keys:
            return "plain"
        raise CheckpointMismatchError(
            f"the weight-norm config names {name}, of which the checkpoint of "
            f"{type(model).__name__} has neither the weight nor g and v; it is of another model, "
            "or of another release of diffusers"
        )

    def _sites(self, *layouts: Layout) -> list[dict[str, Any]]:
        sites = self.quantization_config.sites or ()
        return [site for site in sites if self._layouts[site["name"]] in layouts]

    @property
    @override
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    @override
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


def register() -> None:
    """Make the quantizer known to diffusers. Safe to call twice."""
    AUTO_QUANTIZER_MAPPING[METHOD] = DiffusionQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = WeightNormConfig
