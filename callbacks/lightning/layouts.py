"""The layouts of checkpoints: what a Trainer writes, and what it may be given to read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from torch import nn
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.callbacks.lightning.bases import CheckpointIO
from wn_surgery.model import records
from wn_surgery.model.records import KEY, VERSION
from wn_surgery.model.state_keys import keys_of, stripped
from wn_surgery.norm.naming import keys_for, part_of
from wn_surgery.training.optimizer_states import names_in, names_in_layout, remap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["LayoutIO", "SaveLayout", "WeightNormMixin", "check", "record", "rename_states"]

SaveLayout: TypeAlias = Literal["parametrized", "plain", "legacy"]

_log = logging.getLogger(__name__)


class Surgeon(Protocol):
    """What a checkpoint needs to know of the callback."""

    rules: tuple[wn.Rule, ...]
    save_layout: SaveLayout
    initialized: bool

    @property
    def module(self) -> nn.Module | None:
        """What the rules were applied to."""


class LayoutIO(CheckpointIO):
    """A strategy's CheckpointIO, with weight norm in the callback's layout.

    The last to see what is saved and the first to see what is read, it also sees weights-only
    checkpoints, and what weight averaging has exchanged.
    """

    def __init__(self, inner: Any, callback: Surgeon) -> None:
        self.inner = inner
        self.callback = callback

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "state_dict" in checkpoint and self.callback.module is not None:
            checkpoint = _packed(checkpoint, self.callback.module, self.callback)
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = self.inner.load_checkpoint(path, *args, **kwargs)
        if "state_dict" in checkpoint and self.callback.module is not None:
            check(checkpoint, self.callback.module, str(path))
            # Other layouts are read by the load hooks of modules.
            for name, parts in checkpoint.get(KEY, {}).pop("exact", {}).items():
                checkpoint[name] = records.with_exact(checkpoint[name], parts)
        return checkpoint

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self.inner.teardown()


class WeightNormMixin:
    """Lets ``load_from_checkpoint``, which runs no callbacks, load what :class:`WeightNorm` saved.

    A checkpoint says where the callback put weight norm and with which options; the mixin puts
    it there before the weights are loaded. It does nothing for checkpoints with
    ``save_layout="plain"``, which load without it, and for modules that have weight norm already.

    Put it before LightningModule, and call ``super().on_load_checkpoint(checkpoint)`` where the
    class has a hook of its own.

    Example:
        >>> import lightning.pytorch as lp, torch
        >>> from wn_surgery.callbacks.lightning import WeightNormMixin
        >>> class Model(WeightNormMixin, lp.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 3)
        >>> site = {"name": "layer.weight", "dim": 0, "eps": 0.0, "norm_dtype": None}
        >>> model = Model()
        >>> model.on_load_checkpoint({
        ...     "wn_surgery": {"version": 1, "layout": "parametrized", "sites": [site]}
        ... })
        >>> model.layer.parametrizations.weight.original0.shape
        torch.Size([3, 1])
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put weight norm where the checkpoint has it.

        Raises:
            wn_surgery.WeightNormError: the module has no such parameter, or it cannot carry
                weight norm; the module has not changed.
        """
        assert isinstance(self, nn.Module)  # a mixin for LightningModule
        info = checkpoint.get(KEY)
        if info is not None and not records.record(self):
            _check_version(info, "the checkpoint")
            rules = records.replay(info["sites"], replace=True)
            if rules and info["layout"] != "plain":
                wn.apply(self, rules)
        # LightningModule's hook, or that of another mixin.
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def record(pl_module: nn.Module, callback: Surgeon) -> dict[str, Any]:
    """Return what a checkpoint says about weight norm."""
    return {
        "version": VERSION,
        "layout": "parametrized",
        # A predicate cannot be written down, and a checkpoint must not fail because of it.
        "rules": [
            rule.to_dict() if rule.where is None else {"python": rule.describe()}
            for rule in callback.rules
        ],
        "sites": records.record(pl_module),
        "initialized": callback.initialized,
    }


def check(checkpoint: Mapping[str, Any], pl_module: nn.Module, path: str) -> None:
    """Raise CheckpointMismatchError for a checkpoint of a newer release, or of other rules."""
    info = checkpoint.get(KEY)
    if info is None:
        _check_foreign(checkpoint["state_dict"], pl_module, path)
        return
    _check_version(info, path)
    there = records.bare(info["sites"])
    here = records.bare(records.record(pl_module))
    if there and there != here:
        old = [site for name, site in there.items() if here.get(name) != site]
        new = [site for name, site in here.items() if there.get(name) != site]
        lines = [f"- {records.line(site)}" for site in old]
        lines += [f"+ {records.line(site)}" for site in new]
        if len(lines) > 20:
            lines[20:] = [f"... and {len(lines) - 20} more"]
        shown = "\n".join(lines)
        raise wn.CheckpointMismatchError(
            f"{path} was written with other weight-norm rules than the run has (- there, + here):\n"
            f"{shown}\ngo on with the rules of the checkpoint; or load it with them, call "
            "wn_surgery.remove(module), and start a new run from those plain weights"
        )


def _check_version(info: Mapping[str, Any], path: str) -> None:
    if info["version"] > VERSION:
        raise wn.CheckpointMismatchError(
            f"{path} has weight-norm data of version {info['version']}, and this release of "
            f"wn-surgery reads up to {VERSION}; install a newer one"
        )


def _check_foreign(state: Mapping[str, Any], pl_module: nn.Module, path: str) -> None:
    plain_here = {name for name, _ in pl_module.named_parameters(remove_duplicate=False)}
    for name in state:
        part = part_of(name)
        if part is None or part.part == "v" or part.weight not in plain_here:
            continue
        if keys_for(part.weight, part.layout)[1] in state:
            raise wn.CheckpointMismatchError(
                f"{path} has weight norm on {part.weight}, and the rules of this run do not: add a "
                "rule that matches it, or strip the checkpoint first"
            )


def _packed(checkpoint: dict[str, Any], pl_module: nn.Module, callback: Surgeon) -> dict[str, Any]:
    """Return a checkpoint in the callback's layout; the given one is not changed."""
    info = {**record(pl_module, callback), "layout": callback.save_layout}
    checkpoint = {**checkpoint, KEY: info}
    if callback.save_layout == "parametrized":
        return checkpoint
    keys = [key for key in keys_of(pl_module) if key.site.ours]
    exact: dict[str, dict[str, Any]] = {}
    for name, state in checkpoint.items():
        # Weight averaging has the current model beside the average one.
        if not isinstance(state, Mapping) or not any(key.g in state for key in keys):
            continue
        if callback.save_layout == "legacy":
            new = {key.g: key.legacy[0] for key in keys} | {key.v: key.legacy[1] for key in keys}
            checkpoint[name] = {new.get(old, old): value for old, value in state.items()}
        else:
            checkpoint[name] = stripped(state, keys)
            parts = (part for key in keys for part in (key.g, key.v) if part in state)
            exact[name] = {part: state[part] for part in parts}
    if exact:
        # w = g · v/‖v‖ does not give ‖v‖ back, nor v to the bit.
        info["exact"] = exact
    return checkpoint


def rename_states(checkpoint: dict[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
    """Give a checkpoint's optimizer states, in place, the numbers of this run's parameters.

    A state dict numbers parameters by their order, which g and v have changed. What the callback
    itself has written is in this order already. Weights that were plain start without state.
    """
    states = checkpoint.get("optimizer_states")
    ours = checkpoint.get(KEY, {}).get("sites")
    if not states or ours or len(states) != len(trainer.optimizers):
        return
    keys, state = keys_of(pl_module), checkpoint["state_dict"].keys()
    parametrized = {key.weight for key in keys if state >= set(key.parametrized)}
    legacy = {key.weight for key in keys if state >= set(key.legacy)} - parametrized
    if not legacy and not any(key.weight in state for key in keys):
        return
    renamed: list[dict[str, Any]] = []
    fresh: list[str] = []
    for old_state, optimizer in zip(states, trainer.optimizers, strict=True):
        new = names_in(optimizer, pl_module)
        old = names_in_layout(new, pl_module, legacy, parametrized)
        moved, without = remap(old_state, old, new, pl_module)
        renamed.append(moved)
        fresh += without
    checkpoint["optimizer_states"] = renamed
    if fresh and trainer.is_global_zero:
        _log.info(
            "The checkpoint's optimizer has no state for g and v of %d weights, which were plain "
            "there: %s%s start afresh; everything else goes on.",
            *(len(fresh), ", ".join(fresh[:3]), ", ..." if len(fresh) > 3 else ""),
        )
