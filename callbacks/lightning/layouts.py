"""The layouts of checkpoints: what a Trainer writes, and what it may be given to read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

from torch import nn
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.callbacks.lightning.bases import CheckpointIO
from wn_surgery.model import records
from wn_surgery.model.state_keys import Keys, keys_of, stripped

__all__ = ["KEY", "LayoutIO", "SaveLayout", "apply_recorded", "check", "record", "stored"]

SaveLayout: TypeAlias = Literal["parametrized", "plain", "legacy"]

KEY = "wn_surgery"
"""The checkpoint's entry about weight norm: plain data, which weights_only loading accepts."""

_VERSION = 1
_PAIR = re.compile(r"(?:(.*)\.)?parametrizations\.([^.]+)\.original0")


class Surgeon(Protocol):
    """What a checkpoint has to know of the callback."""

    rules: tuple[wn.Rule, ...]
    save_layout: SaveLayout
    initialized: bool

    @property
    def module(self) -> nn.Module | None:
        """What the rules were applied to."""
        ...


class LayoutIO(CheckpointIO):
    """Stands before a strategy's CheckpointIO, last to see what is saved, first what is read.

    So it sees weights-only checkpoints and what weight averaging has exchanged, too.

    Args:
        inner: what reads and writes.
        callback: whose layout and rules count.
    """

    def __init__(self, inner: Any, callback: Surgeon) -> None:
        self.inner = inner
        self.callback = callback

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save, in the callback's layout."""
        if "state_dict" in checkpoint and self.callback.module is not None:
            checkpoint = _packed(checkpoint, self.callback.module, self.callback)
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load, and give g and v their bits back."""
        checkpoint: dict[str, Any] = self.inner.load_checkpoint(path, *args, **kwargs)
        if "state_dict" in checkpoint and self.callback.module is not None:
            check(checkpoint, self.callback.module, str(path))
            _unpack(checkpoint, self.callback.module)
        return checkpoint

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """As the inner one does."""
        self.inner.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        """As the inner one does."""
        self.inner.teardown()


def record(pl_module: nn.Module, callback: Surgeon) -> dict[str, Any]:
    """What a checkpoint says about weight norm."""
    return {
        "version": _VERSION,
        "layout": "parametrized",
        "rules": [_plain(rule) for rule in callback.rules],
        "sites": records.record(pl_module),
        "initialized": callback.initialized,
    }


def check(checkpoint: Mapping[str, Any], pl_module: nn.Module, path: str) -> None:
    """Raise where a checkpoint does not fit the weight norm that the module has.

    Raises:
        wn_surgery.CheckpointMismatchError: it is of a newer release, or of other rules.
    """
    info = checkpoint.get(KEY)
    if info is None:
        _check_foreign(checkpoint["state_dict"], pl_module, path)
        return
    _check_version(info, path)
    there = records.bare(info["sites"])
    here = records.bare(records.record(pl_module))
    if there and there != here:
        lines = [
            f"- {records.line(site)}" for name, site in there.items() if here.get(name) != site
        ]
        lines += [
            f"+ {records.line(site)}" for name, site in here.items() if there.get(name) != site
        ]
        more = f"\n... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise wn.CheckpointMismatchError(
            f"{path} was written with other weight-norm rules than the run has (- there, + here):\n"
            + "\n".join(lines[:20])
            + more
            + "\ngo on with the rules of the checkpoint; or load it with them, call "
            "wn_surgery.remove(module), and start a new run from those plain weights"
        )


def apply_recorded(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put weight norm where a checkpoint has it, for a module that has none.

    Raises:
        wn_surgery.WeightNormError: it does not fit the module, which is then as it was.
    """
    info = checkpoint.get(KEY)
    if info is None or records.record(module):
        return
    _check_version(info, "the checkpoint")
    if info["layout"] == "plain":
        return
    if rules := records.replay(info["sites"], replace=True):
        wn.apply(module, rules)


def stored(state: Mapping[str, Any], pl_module: nn.Module) -> dict[str, str]:
    """How a state dict has the weights that are weight-normed in the module: layouts by key."""
    layouts: dict[str, str] = {}
    for key in keys_of(pl_module):
        if set(key.parametrized) <= state.keys():
            layouts[key.weight] = "parametrized"
        elif set(key.legacy) <= state.keys():
            layouts[key.weight] = "legacy"
        elif key.weight in state:
            layouts[key.weight] = "plain"
    return layouts


def _packed(checkpoint: dict[str, Any], pl_module: nn.Module, callback: Surgeon) -> dict[str, Any]:
    """A checkpoint in the callback's layout; the given one is not changed."""
    info = {**record(pl_module, callback), "layout": callback.save_layout}
    checkpoint = {**checkpoint, KEY: info}
    if callback.save_layout == "parametrized":
        return checkpoint
    keys = _our_keys(pl_module)
    exact: dict[str, dict[str, Any]] = {}
    for name, state in checkpoint.items():
        # Weight averaging has the current model beside the average one.
        if not isinstance(state, Mapping) or not any(key.g in state for key in keys):
            continue
        if callback.save_layout == "legacy":
            new = {
                old: new
                for key in keys
                for old, new in zip((key.g, key.v), key.legacy, strict=True)
            }
            checkpoint[name] = {new.get(old, old): value for old, value in state.items()}
        else:
            checkpoint[name] = stripped(state, keys)
            parts = (part for key in keys for part in (key.g, key.v) if part in state)
            exact[name] = {part: state[part] for part in parts}
    if exact:
        # w = g · v/‖v‖ does not give ‖v‖ back, nor v to the bit.
        info["exact"] = exact
    return checkpoint


def _unpack(checkpoint: dict[str, Any], pl_module: nn.Module) -> None:
    """Put g and v, bit for bit, in the place of plain weights; load hooks read other layouts."""
    info = checkpoint.get(KEY)
    if info is None:
        return
    keys = _our_keys(pl_module)
    for name, parts in info.pop("exact", {}).items():
        pairs = {key.weight: (key.g, key.v) for key in keys if key.g in parts and key.v in parts}
        whole: dict[str, Any] = {}
        for key, value in checkpoint[name].items():
            if key in pairs:
                whole |= {part: parts[part] for part in pairs[key]}
            else:
                whole[key] = value
        checkpoint[name] = whole


def _check_version(info: Mapping[str, Any], path: str) -> None:
    if info["version"] > _VERSION:
        raise wn.CheckpointMismatchError(
            f"{path} has weight-norm data of version {info['version']}, and this release of "
            f"wn-surgery reads up to {_VERSION}; install a newer one"
        )


def _check_foreign(state: Mapping[str, Any], pl_module: nn.Module, path: str) -> None:
    plain_here = {name for name, _ in pl_module.named_parameters(remove_duplicate=False)}
    for name in state:
        if match := _PAIR.fullmatch(name):
            other = name.removesuffix("0") + "1"
            weight = ".".join(part for part in match.groups() if part)
        elif name.endswith("_g"):
            weight = name.removesuffix("_g")
            other = f"{weight}_v"
        else:
            continue
        if other in state and weight in plain_here:
            raise wn.CheckpointMismatchError(
                f"{path} has weight norm on {weight}, and the rules of this run do not: add a rule "
                "that matches it, or strip the checkpoint first"
            )


def _our_keys(module: nn.Module) -> list[Keys]:
    return [key for key in keys_of(module) if key.site.ours]


def _plain(rule: wn.Rule) -> dict[str, Any]:
    # A predicate cannot be written down, and a checkpoint must not fail for it.
    return rule.to_dict() if rule.where is None else {"python": rule.describe()}
