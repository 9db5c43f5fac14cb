"""Weight norm on models of transformers and diffusers, by a config that travels with them.

Importing this package lets ``from_pretrained`` rebuild the weight norm that a checkpoint's config
describes.

In: models, configs and folders of transformers; models of diffusers.
Out: the same with weight norm, or without.
Imports: errors, norm, rules, model, checkpoints.
"""

try:
    # What transformers 5.6 added.
    from transformers.core_model_loading import PrefixChange as _PrefixChange  # noqa: F401
except ImportError as error:
    raise ModuleNotFoundError(
        "wn_surgery.huggingface needs transformers 5.6 or newer: "
        "pip install 'wn-surgery[transformers]'",
        name=error.name,
    ) from error

import warnings
from contextlib import suppress

from wn_surgery.huggingface.adapters import merge_adapter, merge_and_unload
from wn_surgery.huggingface.config import WeightNormConfig
from wn_surgery.huggingface.folders import apply_folder, built_in_keys, model_on_meta
from wn_surgery.huggingface.loading import register
from wn_surgery.huggingface.patching import patch_model, repair, unpatch_model
from wn_surgery.huggingface.saving import save_pretrained
from wn_surgery.huggingface.usual import rules_for

__all__ = [
    "WeightNormConfig", "apply_folder", "built_in_keys", "merge_adapter", "merge_and_unload",
    "model_on_meta", "patch_model", "repair", "rules_for", "save_pretrained", "unpatch_model",
]  # fmt: skip

register()

# It may not be there, or be older than its quantizers: patch_model() raises then.
with suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from wn_surgery.huggingface import diffusion

    diffusion.register()
