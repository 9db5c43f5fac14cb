"""Saving a checkpoint that any transformers loads without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from wn_surgery.huggingface.bases import PreTrainedModel
from wn_surgery.huggingface.config import recorded
from wn_surgery.huggingface.conversions import built_in
from wn_surgery.huggingface.noting import forget, write
from wn_surgery.model.state_keys import keys_of, stripped

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
            the weights that were put under weight norm by :func:`patch_model` or
            ``wn_surgery.apply``, and a config that does not speak of it. Weight norm that the
            model's class puts on when it is built stays g and v, which is what that class loads.
        kwargs: to ``model.save_pretrained``, such as ``max_shard_size``.

    Raises:
        ValueError: ``layout`` is none of these.
        TypeError: ``model`` is not a model of transformers.

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
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a model of transformers, got {type(model).__name__}; any other model's own "
            "save_pretrained() saves what its class reads"
        )
    if layout == "parametrized":
        model.save_pretrained(folder, **kwargs)
        return
    held = recorded(model.config)
    ours = [key for key in keys_of(model) if key.site.ours]
    built = {key.weight for key in built_in(model)} if ours else set()
    state = stripped(model.state_dict(), [key for key in ours if key.weight not in built])
    forget(model.config)
    try:
        model.save_pretrained(folder, state_dict=state, **kwargs)
    finally:
        if held is not None:
            write(model.config, held)
