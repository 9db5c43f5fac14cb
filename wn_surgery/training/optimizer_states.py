"""The saved state of an optimizer: its parameters are numbers there, and get names here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from wn_surgery.errors import CheckpointMismatchError
from wn_surgery.model.layouts import plain_order
from wn_surgery.model.sites import NormedSite, normed
from wn_surgery.model.state_keys import keys_of
from wn_surgery.norm.naming import keys_for
from wn_surgery.surgery.optimizers import unwrapped

__all__ = ["names_in", "names_in_layout", "remap"]

Names = Sequence[Sequence[str]]
"""Parameter names of an optimizer, group by group, in the order of its state dict."""


def names_in(optimizer: Any, model: nn.Module) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer; ``""`` if not the model's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names.get(id(parameter), "") for parameter in group["params"]]
        for group in unwrapped(optimizer).param_groups
    ]


def names_in_layout(
    held: Names, model: nn.Module, legacy: Collection[str] = (), parametrized: Collection[str] = ()
) -> list[list[str]]:
    """The names if ``model``'s sites were ``legacy``, ``parametrized`` as now, or else plain.

    Assumes that the optimizer is built in the same way: each group in the order of the model's
    ``parameters()``, and a weight in the group of its v. No weight is computed or copied.
    """
    parts = _parts(model)
    order = _order(model, parts, set(legacy), set(parametrized))
    whose = {part: site for site, both in parts.items() for part in both}
    whose |= {part: site for site in legacy for part in keys_for(site, "legacy")}
    magnitudes = {g for g, _ in parts.values()} | {keys_for(site, "legacy")[0] for site in legacy}
    # g may be in a group of its own, without weight decay; the weight follows v.
    now = dict.fromkeys(order, "")
    for name in order:
        site = whose.get(name, name)
        now[name] = parts[site][0 if name in magnitudes else 1] if site in parts else name
    return [[name for name in order if now[name] in group] for group in map(set, held)]


def remap(
    state: Mapping[str, Any], old: Names, new: Names, model: nn.Module
) -> tuple[dict[str, Any], list[str]]:
    """An optimizer's saved state, renumbered from ``old`` to ``new`` names, and the sites without.

    The states of ``weight_g`` and ``weight_v`` go to ``parametrizations.weight.original0`` and
    ``original1``. The state of a plain weight has no exact counterpart for g and v (Adam's second
    moment of a projection is not known from that of the whole), so they start without a state, as
    new parameters do. Raises CheckpointMismatchError where sizes or shapes do not fit the names.
    """
    groups = state["param_groups"]
    sizes, expected = [len(group["params"]) for group in groups], [len(group) for group in old]
    if sizes != expected:
        raise CheckpointMismatchError(
            f"the checkpoint's optimizer has groups of {sizes} parameters; without this run's "
            f"weight norm they would be of {expected}. Build the optimizer as it was built then, "
            "or load the weights alone: wn_surgery converts them in model.load_state_dict()"
        )
    parts = _parts(model)
    now: dict[str, str] = {}
    for weight, both in parts.items():
        now |= zip(keys_for(weight, "legacy"), both, strict=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    listed = [name for group in old for name in group]
    renamed: dict[str, Any] = {}
    numbers = [number for group in groups for number in group["params"]]
    for number, name in zip(numbers, listed, strict=True):
        if number in state["state"] and name not in parts:
            key = now.get(name, name)
            renamed[key] = state["state"][number]
            _check_shapes(name, renamed[key], shapes[key])
    result: dict[str, Any] = {**state, "state": {}, "param_groups": []}
    count = 0
    for group, names in zip(groups, new, strict=True):
        moved = {**group, "params": list(range(count, count + len(names)))}
        if "param_names" in group:
            moved["param_names"] = list(names)
        result["param_groups"].append(moved)
        for name in names:
            if name in renamed:
                result["state"][count] = renamed[name]
            count += 1
    return result, [site for site in parts if site in set(listed)]


def _order(
    model: nn.Module, parts: Mapping[str, tuple[str, str]], legacy: set[str], parametrized: set[str]
) -> list[str]:
    """All parameter names in the order of ``parameters()``, with those sites in those layouts."""
    whose = {part: site for site, both in parts.items() for part in both}
    sites: dict[int, list[NormedSite]] = {}
    for site in normed(model):
        sites.setdefault(id(site.module), []).append(site)
    order: list[str] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [prefix + key for key in module._parameters]
        if ".parametrizations." in f".{path}." and any(name in whose for name in own):
            order += [name for name in own if whose.get(name) in parametrized]
            continue
        members: list[str] = []
        for key, parameter in _plain_parameters(module, sites.get(id(module), [])):
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                members.append(prefix + key)
        order += [name for name in members if name not in legacy | parametrized]
        # The legacy function deletes the parameter and registers its parts after the others.
        order += [part for name in members if name in legacy for part in keys_for(name, "legacy")]
    return order


def _plain_parameters(
    module: nn.Module, found: Sequence[NormedSite]
) -> list[tuple[str, nn.Parameter | None]]:
    """The module's parameters as they are without weight norm, with v for the weight."""
    entries = dict(module._parameters)
    for site in found:
        rank = {key: i for i, key in enumerate(plain_order(module, site.param, entries))}
        if site.layout == "legacy":
            for part in keys_for(site.param, "legacy"):
                del entries[part]
        entries[site.param] = site.held.v
        entries = dict(sorted(entries.items(), key=lambda entry: rank.get(entry[0], len(rank))))
    return list(entries.items())


def _check_shapes(name: str, state: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != shape:
            raise CheckpointMismatchError(
                f"the checkpoint's optimizer has {key} of shape {tuple(value.shape)} where {name} "
                f"would be, of shape {shape}: it orders its parameters differently. Load the "
                "weights alone: wn_surgery converts them in model.load_state_dict()"
            )


def _parts(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The names of g and v of each site, under the name of its weight."""
    names = {name for name, _ in model.named_parameters()}
    return {key.weight: (key.g, key.v) for key in keys_of(model) if key.v in names}
