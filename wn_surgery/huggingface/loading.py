"""Loading: a quantizer that quantizes nothing, but is asked while ``from_pretrained`` builds.

transformers 5 reads checkpoints key by key, without the load hooks of modules, and lets only a
quantizer change the model between building it and reading its weights. This one puts weight norm
on the sites that the config names, converts plain weights on the way, and leaves no trace: the
loaded model is not quantized, trains in a Trainer, and accepts adapters.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from transformers import PreTrainedModel, fusion_mapping
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.huggingface.config import METHOD, WeightNormConfig, write
from wn_surgery.huggingface.conversions import drop_ours, reading_plain
from wn_surgery.huggingface.patching import freeze, put
from wn_surgery.model.sites import NormedSite, normed

__all__ = ["WeightNormQuantizer", "register"]

_INITIALIZE = "initialize_weights"
# The mark by which transformers knows what it has read.
_READ = "_is_hf_initialized"


class WeightNormQuantizer(HfQuantizer):
    """Puts weight norm on a model while ``from_pretrained`` builds it."""

    requires_calibration = False
    is_trainable: Any = True
    quantization_config: WeightNormConfig

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Put weight norm on the empty model."""
        put(model, self.quantization_config, replace=True)
        # Until the model is loaded, on the instance: to initialize a g and v that the checkpoint
        # lacks, or has in another shape. The class would write into ``layer.weight`` alone, which
        # is a computed tensor.
        vars(model)[_INITIALIZE] = partial(_initialize, model, self.quantization_config)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Let plain weights be read, too; transformers itself reads weight_g and weight_v."""
        return weight_conversions + reading_plain(model, self.quantization_config.sites)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> Any:  # noqa: ARG002
        """Leave a model that is not quantized, with the config that says where weight norm is."""
        vars(model).pop(_INITIALIZE, None)
        freeze(model, self.quantization_config)
        write(model.config, self.quantization_config)
        drop_ours(model)
        if "hf_quantizer" in vars(model):
            del model.hf_quantizer

    @override
    def is_serializable(self) -> Any:
        return True


def register() -> None:
    """Make the quantizer and the guard's fusion known to transformers. Safe to call twice."""
    for name in (METHOD, "weight_norm"):
        AUTO_QUANTIZER_MAPPING[name] = WeightNormQuantizer
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = WeightNormConfig
    # Never carried out: the config asks for it with ``False``.
    fusion_mapping._FUSION_REGISTRY[METHOD] = fusion_mapping.ModuleFusionSpec()


def _initialize(model: PreTrainedModel, config: WeightNormConfig) -> None:
    unread = [site for site in normed(model) if _is_unread(site)]
    with ExitStack() as opened:
        for module in dict.fromkeys(site.module for site in unread):
            opened.enter_context(wn.writable(module))
        for site in unread:
            # v may have been read, where g alone was absent.
            vars(getattr(site.module, site.param)).pop(_READ, None)
        getattr(type(model), _INITIALIZE)(model)
    fills = {site["name"]: site.get("g_init") for site in config.sites or ()}
    for site in unread:
        if (fill := fills.get(site.name)) is not None:
            site.held.g.data.fill_(fill)


def _is_unread(site: NormedSite) -> bool:
    """Return whether g or v was not in the checkpoint."""
    # What is on disk is on meta here, and so is an end that will be tied.
    parts = [part for part in (site.held.g, site.held.v) if not part.is_meta]
    return any(not getattr(part, _READ, False) for part in parts)
