"""A word in the config that stops transformers where this library has not been imported.

transformers only warns of a quantization that it does not know, and goes on with random weights.
Of a fusion that it does not know it makes an error, before it builds the model. So a patched
model's config asks for one too, whose name says what to install, and which does nothing.
"""

from __future__ import annotations

from typing import Any

from wn_surgery.huggingface.bases import FUSIONS, Fusion
from wn_surgery.huggingface.config import METHOD

__all__ = ["guard", "register_guard", "unguard"]

_FIELD = "fusion_config"


def guard(config: Any) -> None:
    """Have a model config stop ``from_pretrained`` where nobody knows what it says."""
    setattr(config, _FIELD, {**(getattr(config, _FIELD, None) or {}), METHOD: False})


def unguard(config: Any) -> None:
    """Take that out of a model config, which may ask for other fusions."""
    fusions = dict(getattr(config, _FIELD, None) or {})
    if fusions.pop(METHOD, None) is None:
        return
    if fusions:
        setattr(config, _FIELD, fusions)
    else:
        vars(config).pop(_FIELD)


def register_guard() -> None:
    """Make the name known: a fusion that is ``False`` is never carried out."""
    FUSIONS[METHOD] = Fusion()
