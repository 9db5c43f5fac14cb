"""Weight norm in the Trainer of transformers: patched before the optimizer, checked, exported."""

from __future__ import annotations

__all__ = ["WeightNormCallback", "WeightNormTrainer"]

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.callbacks.holding import refuse_scalars, refuse_unheld
from wn_surgery.callbacks.renormalizing import AfterSteps, asks, renormalizing
from wn_surgery.huggingface import patch_model, rules_for, save_pretrained
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
        renormalize_every_n_steps: call :func:`wn_surgery.renormalize` after every so many optimizer
            steps, and once when a new run begins. It acts on the sites of rules with
            ``renormalize``; if no rule has it, each gets ``renormalize: true``. None is 1 where a
            rule has it, and otherwise never.
        once_per_step: compute each weight once per optimizer step, for all micro-batches; see
            ``optimizers`` of :func:`wn_surgery.fuse`. It ends with the training.

    Attributes:
        report: what was changed; None while nothing has been.

    Example:
        >>> from wn_surgery.callbacks.transformers import WeightNormCallback
        >>> callback = WeightNormCallback([{"types": "Linear"}])
        >>> callback.report is None
        True
    """

    def __init__(
        self,
        config: ConfigLike = None,
        export_to: str | Path | None = None,
        *,
        renormalize_every_n_steps: int | None = None,
        once_per_step: bool = False,
    ) -> None:
        renormalizing((), renormalize_every_n_steps)  # refuses a wrong number here
        self.config = as_config(config)
        self.export_to = export_to
        self.renormalize_every_n_steps = renormalize_every_n_steps
        self.once_per_step = once_per_step
        self._after_steps = AfterSteps()
        self.report: wn.Report | None = None

    @override
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        config, every = self.config, self.renormalize_every_n_steps
        if not _is_patched(model):
            if every is not None and config.sites is None:
                rules = rules_for(model) if config.rules is None else config.rules
                config = as_config(renormalizing(rules, every))
            if getattr(args, "fsdp", None):
                rules = rules_for(model) if config.rules is None else config.rules
                self._refuse_shards(rule.describe() for rule in rules if rule.dim is None)
            self.report = patch_model(model, config)
        elif getattr(args, "fsdp", None):
            self._refuse_shards(site.name for site in normed(model) if site.dim is None)

    def _refuse_shards(self, scalars: Iterable[str]) -> None:
        """Raise for what FSDP cannot do, before the model is patched."""
        refuse_scalars(scalars, "FSDP")
        if self.export_to is not None:
            raise wn.CallbackError(
                f"export_to={str(self.export_to)!r} needs whole weights when training ends, and "
                "FSDP has them in parts; leave it out, call trainer.save_model(folder), and make "
                "that plain: `wn-surgery strip folder plain`"
            )

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

        every = self.renormalize_every_n_steps
        if every is not None and not asks(model):
            raise wn.CallbackError(
                f"renormalize_every_n_steps={every}, and no weight norm of the model says what "
                "norm v is put back to: patch it by rules with `renormalize: true`"
            )
        if optimizer is not None and asks(model):
            if state.global_step == 0:  # what is resumed was put back already
                wn.renormalize(model)
            # The Trainer counts a step after it has been made.
            due = partial(_is_due, state, every or 1)
            self._after_steps.start(model, [optimizer], due)
        if optimizer is not None and self.once_per_step:
            wn.fuse(model, optimizers=[optimizer])

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._after_steps.stop()
        if self.once_per_step:
            wn.unfuse(kwargs["model"])
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


def _is_due(state: Any, every: int) -> bool:
    return (int(state.global_step) + 1) % every == 0


def _is_patched(model: nn.Module) -> bool:
    return any(site.ours for site in normed(model))
