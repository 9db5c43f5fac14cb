"""Weight norm on Hugging Face models: by a config that is saved and reloaded with them.

Importing this module lets ``from_pretrained`` rebuild the weight norm that a checkpoint's config
speaks of.

In: models, configs and folders of transformers.
Out: the same with weight norm, or without.
Imports: errors, norm, rules, model, checkpoints.
"""

from wn_surgery.huggingface.adapters import merge_adapter, merge_and_unload
from wn_surgery.huggingface.config import WeightNormConfig
from wn_surgery.huggingface.folders import apply_folder, built_in_keys, model_on_meta
from wn_surgery.huggingface.patching import patch_model, repair, unpatch_model
from wn_surgery.huggingface.presets import rules_for
from wn_surgery.huggingface.reload import register
from wn_surgery.huggingface.saving import save_pretrained

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
