"""Saving a checkpoint that any transformers loads without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from wn_surgery.state_keys import plain_state_dict

from .bases import PreTrainedModel
from .config import WeightNormConfig
from .guard import guard, unguard

__all__ = ["save_pretrained"]


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    layout: Literal["parametrized", "plain"] = "parametrized",
    **kwargs: Any,
) -> None:
    """``model.save_pretrained(folder)``, in a layout to choose; the model is not changed.

    Args:
        model: patched or not.
        folder: where to.
        layout: ``"parametrized"`` is what ``model.save_pretrained`` does itself. ``"plain"`` saves
            the weights that were put under weight norm by :func:`patch_model`, and a config that
            does not speak of it. Weight norm that the model's class puts on when it is built stays
            g and v, which is what that class loads.
        kwargs: to ``model.save_pretrained``, such as ``max_shard_size``.

    Raises:
        ValueError: ``layout`` is none of these.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from wn_surgery.huggingface import WeightNormConfig, patch_model, save_pretrained
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                   intermediate_size=16, vocab_size=20)
        >>> model = BertModel(tiny)
        >>> _ = patch_model(model, WeightNormConfig())
        >>> folder = tempfile.mkdtemp()
        >>> save_pretrained(model, folder, layout="plain")
        >>> hasattr(BertModel.from_pretrained(folder).config, "quantization_config")
        False
    """
    if layout not in ("parametrized", "plain"):
        raise ValueError(f"layout={layout!r}; expected 'parametrized' or 'plain'")
    if layout == "parametrized":
        model.save_pretrained(folder, **kwargs)
        return
    held = getattr(model.config, "quantization_config", None)
    ours = isinstance(held, WeightNormConfig)
    state = plain_state_dict(model, maker="wn_surgery")
    if ours:
        vars(model.config).pop("quantization_config")
        unguard(model.config)
    try:
        model.save_pretrained(folder, state_dict=state, **kwargs)
    finally:
        if ours:
            model.config.quantization_config = held
            guard(model.config)
