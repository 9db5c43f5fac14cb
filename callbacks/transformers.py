"""Weight norm in the Trainer of transformers: patched before the optimizer, checked, exported."""

from __future__ import annotations

__all__ = ["WeightNormCallback", "WeightNormTrainer"]

from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.callbacks.holding import refuse_unheld
from wn_surgery.huggingface import patch_model, save_pretrained
from wn_surgery.huggingface.config import ConfigLike, as_config
from wn_surgery.model.sites import normed

try:
    from transformers import Trainer, TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "wn_surgery.callbacks.transformers needs transformers with accelerate: "
        "pip install 'wn-surgery[transformers]' accelerate",
        name=error.name,
    ) from error


class WeightNormCallback(TrainerCallback):
    """Patches the model when the Trainer is made, so that its optimizer holds g and v.

    Give it to ``Trainer(callbacks=[...])``. With ``model_init``, call
    :func:`wn_surgery.huggingface.patch_model` in that function instead. Checkpoints hold g and v,
    so a resumed run continues bit for bit, and ``load_best_model_at_end`` finds them.

    When training begins, :class:`wn_surgery.CallbackError` is raised if the model is not patched,
    or the optimizer does not hold a trainable g or v. The Trainer gives weight decay to g as to
    any tensor with two axes; :class:`WeightNormTrainer` does not.

    Args:
        config: what to patch, as :func:`wn_surgery.huggingface.patch_model` takes it: a config,
            rules, or None for the usual rules of the model's type. Invalid rules raise here.
        export_to: a folder, into which the model is saved without weight norm when training has
            ended; the live model is not changed.

    Attributes:
        report: what was changed; None while nothing has been.

    Example:
        >>> from wn_surgery.callbacks.transformers import WeightNormCallback
        >>> callback = WeightNormCallback([{"types": "Linear"}])
        >>> callback.report is None
        True
    """

    def __init__(self, config: ConfigLike = None, export_to: str | Path | None = None) -> None:
        self.config = as_config(config)
        self.export_to = export_to
        self.report: wn.Report | None = None

    @override
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if not _is_patched(model):
            self.report = patch_model(model, self.config)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if not _is_patched(model):
            raise wn.CallbackError(
                "the model of this run has no weight norm: with model_init=..., call "
                "patch_model(model, config) in that function; and give the callback to "
                "Trainer(callbacks=[...]), since add_callback() comes after the optimizer's time"
            )
        if optimizer is not None:
            refuse_unheld(
                model,
                [optimizer],
                "it was made before the model was patched, or from names that end in '.weight'. "
                "Give the callback to Trainer(callbacks=[...]), and make optimizers for "
                "optimizers=(...) after patch_model(model, config), from "
                "wn_surgery.parameter_groups(model)",
            )

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.export_to is not None and state.is_world_process_zero:
            save_pretrained(kwargs["model"], self.export_to, layout="plain")


class WeightNormTrainer(Trainer):
    """A Trainer that keeps g out of weight decay, and is otherwise its base.

    Example:
        >>> from wn_surgery.callbacks.transformers import WeightNormTrainer
        >>> from transformers import Trainer
        >>> issubclass(WeightNormTrainer, Trainer)
        True
    """

    @override
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        magnitudes = {id(site.held.g) for site in normed(model)}
        exempt = {name for name, p in model.named_parameters() if id(p) in magnitudes}
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name not in exempt]


def _is_patched(model: nn.Module) -> bool:
    return any(site.ours for site in normed(model))
