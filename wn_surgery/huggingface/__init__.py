"""Weight norm on Hugging Face models: by a config that is saved and reloaded with them.

Importing this module lets ``from_pretrained`` rebuild the weight norm that a checkpoint's config
speaks of.
"""

from .adapters import merge_adapter, merge_and_unload
from .config import WeightNormConfig
from .folders import apply_folder, built_in_keys, model_on_meta
from .patching import patch_model, repair, unpatch_model
from .presets import rules_for
from .reload import register
from .saving import save_pretrained

__all__ = [
    "WeightNormConfig",
    "apply_folder",
    "built_in_keys",
    "merge_adapter",
    "merge_and_unload",
    "model_on_meta",
    "patch_model",
    "repair",
    "rules_for",
    "save_pretrained",
    "unpatch_model",
]

register()
