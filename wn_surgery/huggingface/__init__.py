"""Weight norm on Hugging Face models: by a config that is saved and reloaded with them.

Importing this module lets ``from_pretrained`` rebuild the weight norm that a checkpoint's config
speaks of.
"""

from .adapters import merge_adapter, merge_and_unload
from .config import WeightNormConfig
from .patching import patch_model, repair, unpatch_model
from .presets import rules_for
from .reload import register
from .saving import save_pretrained

__all__ = [
    "WeightNormConfig",
    "merge_adapter",
    "merge_and_unload",
    "patch_model",
    "repair",
    "rules_for",
    "save_pretrained",
    "unpatch_model",
]

register()
