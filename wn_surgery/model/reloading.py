"""What ``from_pretrained`` builds, and a state dict in which it finds every weight.

The libraries of Hugging Face build a model by its class, and read into it what fits by name. What
does not fit they leave as it was drawn, and at most log. Here the class is asked beforehand, by
building it once more without memory.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from importlib import import_module
from types import FrameType
from typing import Any, Literal, cast

import torch
from torch import nn

from wn_surgery.errors import CheckpointMismatchError, ZeroNormError
from wn_surgery.model import records
from wn_surgery.model.state_keys import Keys, keys_of
from wn_surgery.norm import savers
from wn_surgery.norm.module_class import base_class
from wn_surgery.norm.parametrization import parts_of
from wn_surgery.norm.savers import Layouts

__all__ = ["AsBuilt", "built_keys", "fitting", "is_model_of", "match", "save_as_built"]

UNNAMED = "() builds no weight norm on"
"""In the warning of what is saved plain."""

# Compared as text, so that nothing needs to be imported to know them.
_BASES = {
    "transformers.modeling_utils.PreTrainedModel": "transformers",
    "diffusers.models.modeling_utils.ModelMixin": "diffusers",
    "huggingface_hub.hub_mixin.ModelHubMixin": "hub",
}


def is_model_of(model: object) -> str | None:
    """Which library's ``save_pretrained`` a model has: transformers, diffusers, hub, or None."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__)
    return next((_BASES[name] for name in names if name in _BASES), None)


def built_keys(model: nn.Module) -> dict[str, Keys]:
    """Where the class of a model puts weight norm itself: the keys in a new one, by weight.

    It raises whatever the constructor raises, on the meta device and on the CPU.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Whoever built the model the first time has seen them.
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                built = _built(model)
        except Exception:
            if is_model_of(model) == "transformers":
                raise
            # It looks at its own values; the library builds it on the CPU.
            built = _built(model)
    return {key.weight: key for key in keys_of(built)}


def fitting(frame: FrameType) -> Layouts:
    """The layouts in which a running ``save_pretrained`` has to write our g and v."""
    model = frame.f_locals["self"]
    library = is_model_of(model)
    ours = [key for key in keys_of(model) if key.site.ours]
    if library is None or not ours:
        return {}
    if library == "transformers":
        # Its config can say where weight norm is. Not imported above: that needs transformers.
        saving = import_module("wn_surgery.huggingface.saving")
        return cast(Layouts, saving.note(model, frame.f_locals, ours))
    built = _asked(model, frame)
    if built is None:
        return {}
    if library == "diffusers":
        noted = _noted(model)
        ours = [key for key in ours if key.weight not in noted]
    plain = [key for key in ours if key.weight not in built]
    if plain:
        name = base_class(model).__name__
        first = plain[0].weight + (f" and {len(plain) - 1} more" if len(plain) > 1 else "")
        savers.warn(
            frame,
            f"{name}{UNNAMED} {first}, and {name}.from_pretrained would not find g and v: they "
            "are saved as plain weights, which it reads. "
            + (
                "To keep g and v, use wn_surgery.huggingface.patch_model(model, rules) instead of "
                "wn_surgery.apply"
                if library == "diffusers"
                else "To keep g and v, call wn_surgery.apply(self, rules) in the constructor of a "
                "class of your own; to have weight norm again after from_pretrained, apply the "
                "rules to what it returns"
            ),
        )
    return {**match(model, ours, built), **{_holder(key): "plain" for key in plain}}


def _noted(model: Any) -> set[str]:
    """The weights of which the config of a model of diffusers says how they are normed."""
    get = getattr(model.config.get("quantization_config"), "get", None)
    sites = records.bare((get("sites") if get else None) or ())
    there = records.bare(records.record(model))
    return {name for name in there if sites.get(name) == there[name]}


def match(model: nn.Module, ours: Iterable[Keys], built: Mapping[str, Keys]) -> Layouts:
    """The layouts of weight norm in what a model's class builds, where they differ from ours."""
    layouts: dict[int, Literal["plain", "legacy"]] = {}
    for key in ours:
        there = built.get(key.weight)
        if there is None:
            continue
        if there.site.norm != key.site.norm:
            raise CheckpointMismatchError(
                f"{base_class(model).__name__}() builds weight norm on {key.weight} with "
                f"{there.site.norm}, and the model to save has {key.site.norm}: give both the same "
                "options, or call wn_surgery.huggingface.unpatch_model(model) before saving"
            )
        if there.site.layout == "legacy":
            layouts[_holder(key)] = "legacy"
    return layouts


class AsBuilt:
    """A state-dict hook of a model without weight norm whose class puts it on when it is built.

    ``save_pretrained`` gets g and v where they will be looked for; all others get plain weights.
    """

    def __call__(
        self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, _metadata: Any
    ) -> None:
        """After the module and what is below it have been written into the state dict."""
        frame = savers.asking()
        if frame is None:
            return
        model = frame.f_locals["self"]
        paths = [path for path, part in model.named_modules() if part is module]
        if is_model_of(model) is None or not paths:
            return
        # From the model's names to those in this state dict, which may be that of a part.
        owner = f"{paths[0]}." if paths[0] else ""
        for key in (_asked(model, frame) or {}).values():
            weight = prefix + key.weight.removeprefix(owner)
            value = state.get(weight) if key.weight.startswith(owner) else None
            # What is on disk is on meta here; transformers' own conversions read it.
            if value is None or value.is_meta:
                continue
            try:
                with torch.no_grad():
                    parts = parts_of(value, key.site.norm)
            except ZeroNormError as error:
                raise ZeroNormError(
                    f"{base_class(model).__name__}() builds weight norm on {key.weight}, which "
                    f"cannot be saved as g and v: {error}"
                ) from error
            for name, part in zip((key.g, key.v), parts, strict=True):
                state[prefix + name.removeprefix(owner)] = part
            del state[weight]


def save_as_built(module: nn.Module) -> None:
    """Give a module the hook :class:`AsBuilt`, once."""
    if not any(isinstance(hook, AsBuilt) for hook in module._state_dict_hooks.values()):
        # Not by a number: see wn_surgery.model.layouts.put_legacy.
        module._state_dict_hooks[cast(int, "wn_surgery.as_built")] = AsBuilt()


def _holder(key: Keys) -> int:
    """The list that holds g and v, as :mod:`savers` knows it."""
    lists: Any = key.site.module.parametrizations
    return id(lists[key.site.param])


def _asked(model: nn.Module, frame: FrameType) -> dict[str, Keys] | None:
    """:func:`built_keys`; None, and a warning, where the class cannot be asked."""
    try:
        return built_keys(model)
    except Exception as error:  # noqa: BLE001 - the constructor is not ours
        name = base_class(model).__name__
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        savers.warn(
            frame,
            f"{name} cannot be built again from its config to see whether it builds the weight "
            f"norm that is saved ({said}). If {name}.from_pretrained does not give the same "
            "weights, call wn_surgery.huggingface.unpatch_model(model) before saving, or make the "
            "file plain: wn_surgery.checkpoints.convert_file(file, new_file)",
        )
        return None


def _built(model: Any) -> nn.Module:
    cls: Any = base_class(model)
    library = is_model_of(model)
    if library == "transformers":
        return cast(nn.Module, cls(copy.deepcopy(model.config)))
    if library == "diffusers":
        return cast(nn.Module, cls.from_config(copy.deepcopy(dict(model.config))))
    return cast(nn.Module, cls(**_arguments(cls, copy.deepcopy(model._hub_mixin_config))))


def _arguments(cls: Any, config: Any) -> dict[str, Any]:
    """What ``ModelHubMixin.from_pretrained`` calls a class with."""
    if dataclasses.is_dataclass(config):
        return {"config": config}
    config = config or {}
    parameters = cls._hub_mixin_init_parameters.values()
    given = [each for each in parameters if each.name in config]
    found = {each.name: cls._decode_arg(each.annotation, config[each.name]) for each in given}
    if "config" in cls._hub_mixin_init_parameters and "config" not in found:
        annotation = cls._hub_mixin_init_parameters["config"].annotation
        found["config"] = cls._decode_arg(annotation, config)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        found = {**config, **found}
    return found
