"""Reloading: a quantizer that quantizes nothing, but is asked while ``from_pretrained`` builds.

transformers 5 reads checkpoints key by key, past the load hooks of modules, and lets only a
quantizer change the model between building it and reading its weights. This one puts weight norm
on the sites that the config names, converts plain weights on the way, and leaves no trace: the
loaded model is not quantized, trains in a Trainer, and accepts adapters.
"""

from __future__ import annotations

from typing import Any

from wn_surgery.huggingface import embeddings
from wn_surgery.huggingface.bases import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    HfQuantizer,
    PreTrainedModel,
)
from wn_surgery.huggingface.config import METHOD, WeightNormConfig
from wn_surgery.huggingface.conversions import is_ours, reading_plain
from wn_surgery.huggingface.guard import register_guard
from wn_surgery.huggingface.missing import draw_missing, forget_missing
from wn_surgery.huggingface.noting import write
from wn_surgery.huggingface.placing import freeze, put

__all__ = ["WeightNormQuantizer", "register"]


class WeightNormQuantizer(HfQuantizer):
    """Puts weight norm on a model while ``from_pretrained`` builds it."""

    requires_calibration = False
    quantization_config: WeightNormConfig

    def preprocess_model(
        self,
        model: PreTrainedModel,
        dtype: Any = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Put weight norm on the empty model.

        Raises:
            WeightNormError: the config does not fit the model.
        """
        tied = embeddings.ties_of(model)
        put(model, self.quantization_config, replace=True)
        embeddings.follow(model, tied)
        draw_missing(model, self.quantization_config)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Let plain weights be read, too; transformers itself reads weight_g and weight_v."""
        return weight_conversions + reading_plain(model, self.quantization_config.sites)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> Any:  # noqa: ARG002
        """Leave a model that is not quantized, with the config that says where weight norm is."""
        forget_missing(model)
        freeze(model, self.quantization_config)
        write(model.config, self.quantization_config)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            # Saving reverts what loading converted; g and v are to stay.
            kept: Any = [c for c in conversions if not is_ours(c)]
            model._weight_conversions = kept
        if "hf_quantizer" in vars(model):
            del model.hf_quantizer

    def is_serializable(self) -> Any:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Yes."""
        return True


def register() -> None:
    """Make the quantizer known to transformers; again and again is the same as once."""
    for name in (METHOD, "weight_norm"):
        AUTO_QUANTIZER_MAPPING[name] = WeightNormQuantizer
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = WeightNormConfig
    register_guard()
