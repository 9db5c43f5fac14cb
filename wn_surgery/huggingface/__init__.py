"""Weight norm on models of transformers and diffusers, by a config that travels with them.

Importing this package lets ``from_pretrained`` rebuild the weight norm that a checkpoint's config
describes.

In: models, configs and folders of transformers; models of diffusers.
Out: the same with weight norm, or without.
Imports: errors, norm, rules, model, checkpoints.
"""

try:
    import transformers as _transformers
except ImportError as error:
    raise ModuleNotFoundError(
        "wn_surgery.huggingface needs transformers 5.23 or newer: "
        "pip install 'wn-surgery[transformers]'",
        name=error.name,
    ) from error

# An older one takes weights of another shape without a word: docs/versions.md.
if tuple(int(part) for part in _transformers.__version__.split(".")[:2]) < (5, 23):
    raise ImportError(
        f"wn_surgery.huggingface needs transformers 5.23 or newer, and {_transformers.__version__} "
        "is installed: pip install 'wn-surgery[transformers]'",
        name="transformers",
    )

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
