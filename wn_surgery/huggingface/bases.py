"""What this package takes from transformers, and the error where that is missing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

try:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "wn_surgery.huggingface needs transformers 5 or newer: "
        "pip install 'wn-surgery[transformers]'",
        name=error.name,
    ) from error

FUSIONS: dict[str, Any] = {}
Fusion: Any = object
# An early transformers 5 does not look at a config's fusions.
with suppress(ImportError):
    from transformers import fusion_mapping

    FUSIONS, Fusion = fusion_mapping._FUSION_REGISTRY, fusion_mapping.ModuleFusionSpec

__all__ = [
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "FUSIONS",
    "ConversionOps",
    "Fusion",
    "HfQuantizer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PrefixChange",
    "QuantizationConfigMixin",
    "WeightConverter",
    "get_model_conversion_mapping",
]
