"""Folders of transformers models: built without weights, and patched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import wn_surgery as wn
from wn_surgery.checkpoints.folders import copy_companions, find
from wn_surgery.checkpoints.io.atomic import atomic_folder
from wn_surgery.errors import CheckpointError
from wn_surgery.huggingface.config import WeightNormConfig
from wn_surgery.huggingface.loading import register
from wn_surgery.huggingface.patching import patch_model
from wn_surgery.model.state_keys import keys_of
from wn_surgery.rules.sources import RulesLike, as_rules

__all__ = ["apply_folder", "built_in_keys", "model_on_meta"]


def model_on_meta(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Build the model of a folder on the meta device, without reading weights.

    Code in the folder is not run. Weight norm that :func:`patch_model` put on is not there.

    Args:
        folder: with a ``config.json``.

    Raises:
        CheckpointError: there is no such config, or transformers does not know the class.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from wn_surgery.huggingface.folders import model_on_meta
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BertConfig(architectures=["BertModel"]).save_pretrained(folder)
        ...     model_on_meta(folder).embeddings.word_embeddings.weight.device
        device(type='meta')
    """
    register()
    try:
        config = transformers.AutoConfig.from_pretrained(
            Path(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{str(folder)!r} has no config that transformers reads without running code: {said}"
        ) from error
    name = str((config.architectures or [""])[0])
    cls: Any = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise CheckpointError(
            f"{str(folder)!r}: transformers {transformers.__version__} has no class {name!r}; "
            "load the model in Python and call wn_surgery.huggingface.patch_model"
        )
    if isinstance(getattr(config, "quantization_config", None), (WeightNormConfig, dict)):
        vars(config).pop("quantization_config")
    with torch.device("meta"):
        model: PreTrainedModel = cls(config)
    return model


def built_in_keys(folder: str | os.PathLike[str]) -> frozenset[str]:
    """Return the plain keys of the weights on which the class of a model puts weight norm itself.

    A checkpoint of such a class has to hold g and v: the class does not read a plain weight. For
    a class that transformers does not know there are none.
    """
    try:
        return frozenset(key.weight for key in keys_of(model_on_meta(folder)))
    except CheckpointError:
        return frozenset()


def apply_folder(
    source: str | os.PathLike[str], target: str | os.PathLike[str], rules: RulesLike | None
) -> wn.Report:
    """Load a model, put weight norm on it, and save it with the folder's other files.

    Args:
        source: a folder that ``from_pretrained`` reads.
        target: a folder that does not exist yet, or an empty one; it is written atomically.
        rules: for :func:`patch_model`; None for those of the model's type.

    Returns:
        What was done.

    Raises:
        CheckpointError: there is no such model.
        WeightNormError: the rules do not fit the model.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
        >>> from wn_surgery.huggingface.folders import apply_folder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=32))
        ...     model.save_pretrained(f"{folder}/plain")
        ...     report = apply_folder(f"{folder}/plain", f"{folder}/normed", "convolutions")
        ...     len(report.changed)
        78
    """
    folder = Path(source)
    cls, found = type(model_on_meta(folder)), find(folder)
    if found.patched is not None:
        raise CheckpointError(f"{str(folder)!r} is weight-normed already; strip it first")
    model = cls.from_pretrained(folder, local_files_only=True, dtype="auto")
    report = patch_model(model, WeightNormConfig(None if rules is None else as_rules(rules)))
    with atomic_folder(Path(target), like=folder) as made:
        copy_companions(found, made, plain=False)
        model.save_pretrained(made)
    return report
