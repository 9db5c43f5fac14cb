"""What the callback cannot work with: other callbacks, and strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

import wn_surgery as wn
from wn_surgery.callbacks.holding import refuse_scalars
from wn_surgery.model.sites import normed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["check", "cuts_tensors", "in_worker_processes", "is_a", "shards"]

_SHARDING = ("ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy")


def check(trainer: Trainer, pl_module: LightningModule, callback: Any, save_layout: str) -> None:
    """Raise CallbackError where weight norm cannot work with what else the Trainer has."""
    callbacks: list[Any] = list(getattr(trainer, "callbacks", ()))
    own = sum(isinstance(other, type(callback)) for other in callbacks)
    if own > 1:
        raise wn.CallbackError(
            f"the Trainer has {own} WeightNorm callbacks; give one of them all the rules, in "
            "order: the last one that matches wins"
        )
    for position, other in enumerate(callbacks):
        name = type(other).__name__
        if is_a(other, "ModelPruning"):
            raise wn.CallbackError(
                f"{name} prunes parameters, and a weight-normed weight is not one: it is computed "
                "from g and v. Prune after training, when wn_surgery.remove(model) has made the "
                "weights plain, or exclude one of the two callbacks"
            )
        if callback in callbacks[position:] and other is not callback and _copies(other, pl_module):
            raise wn.CallbackError(
                f"{name} comes before WeightNorm in callbacks= and has copied the model without "
                f"weight norm; put WeightNorm first: callbacks=[WeightNorm(...), {name}(...)]"
            )
    if shards(trainer) and getattr(trainer.strategy, "_data_parallel_size", 2) != 1:
        scalar = [rule for rule in callback.rules if rule.action == "apply" and rule.dim is None]
        names = (f"the rule ({rule.describe()})" for rule in scalar)
        refuse_scalars(names, type(trainer.strategy).__name__)
    if save_layout != "parametrized" and shards(trainer):
        raise wn.CallbackError(
            f"save_layout={save_layout!r} needs whole tensors, and "
            f"{type(trainer.strategy).__name__} writes its checkpoints in shards; leave it at "
            "'parametrized' and convert the consolidated checkpoint afterwards"
        )


def in_worker_processes(trainer: Trainer) -> bool:
    """Return whether this process ends with the run and sends its weights to another."""
    launcher = getattr(trainer.strategy, "launcher", None)
    return is_a(launcher, "_MultiProcessingLauncher")


def shards(trainer: Trainer) -> bool:
    """Return whether the strategy splits parameters."""
    return any(is_a(trainer.strategy, name) for name in _SHARDING)


def cuts_tensors(trainer: Trainer) -> bool:
    """Return whether the strategy has a mesh for tensor parallelism."""
    return getattr(trainer.strategy, "_tensor_parallel_size", 1) != 1


def is_a(thing: object, name: str) -> bool:
    """Return whether a class of that name is among its bases: Lightning has each of them twice."""
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def _copies(other: Any, pl_module: LightningModule) -> bool:
    """Return whether a callback keeps a plain copy of the module, as averaging callbacks do."""

    def is_copy(module: nn.Module) -> bool:
        return type(module) is type(pl_module) and module is not pl_module

    held = [value for value in vars(other).values() if isinstance(value, nn.Module)]
    return any(any(map(is_copy, value.modules())) and not normed(value) for value in held)
