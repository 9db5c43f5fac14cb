"""The saved state of an optimizer: its parameters are numbers there, and get names here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from wn_surgery.errors import CheckpointMismatchError
from wn_surgery.model.contexts import writable
from wn_surgery.model.state_keys import keys_of
from wn_surgery.surgery.optimizers import unwrapped

__all__ = ["names_in", "names_in_layout", "remap"]

Names = Sequence[Sequence[str]]
"""Parameter names of an optimizer, group by group, in the order of its state dict."""


def names_in(optimizer: Any, model: nn.Module) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or a wrapper that keeps one under ``.optimizer``.
        model: whose ``named_parameters()`` gives the names.

    Returns:
        A list for each group. A parameter that is not the model's is ``""``.

    Example:
        >>> import torch
        >>> from wn_surgery.training.optimizer_states import names_in
        >>> model = torch.nn.Linear(2, 3)
        >>> names_in(torch.optim.SGD(model.parameters(), lr=0.1), model)
        [['weight', 'bias']]
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names.get(id(parameter), "") for parameter in group["params"]]
        for group in unwrapped(optimizer).param_groups
    ]


def names_in_layout(
    held: Names, model: nn.Module, legacy: Collection[str] = (), parametrized: Collection[str] = ()
) -> list[list[str]]:
    """What :func:`names_in` would have given for the same model in another layout.

    It is taken that the optimizer was built in the same way: each group in the order of the
    model's ``parameters()``, and a weight in the group of its v.

    Args:
        held: the names in the optimizer of ``model``.
        model: weight-normed; its g and v are not changed.
        legacy: names of the sites that had ``weight_g`` and ``weight_v`` then.
        parametrized: names of the sites that had what they have now. Others were plain.

    Returns:
        The names then, group by group.
    """
    parts, order = _parts(model), _order(model, set(legacy), set(parametrized))
    whose = {part: site for site, both in parts.items() for part in both}
    whose |= {f"{site}_{end}": site for site in legacy for end in "gv"}
    result: list[list[str]] = []
    for group in held:
        here = set(group)
        # g may be in a group of its own, without weight decay; the weight follows v.
        ends = {(site, "g") for site, (g, _) in parts.items() if g in here}
        ends |= {(site, "v") for site, (_, v) in parts.items() if v in here}
        kept = []
        for name in order:
            site = whose.get(name, name)
            if site not in parts:
                belongs = name in here
            elif name == site:
                belongs = (site, "v") in ends
            else:
                belongs = (site, "g" if name in (f"{site}_g", parts[site][0]) else "v") in ends
            if belongs:
                kept.append(name)
        result.append(kept)
    return result


def remap(
    state: Mapping[str, Any], old: Names, new: Names, model: nn.Module
) -> tuple[dict[str, Any], list[str]]:
    """An optimizer's saved state, renumbered by name for an optimizer with other parameters.

    ``weight_g`` and ``weight_v`` go to ``parametrizations.weight.original0`` and ``original1``,
    with which they are one. Of a plain weight's state there is no exact counterpart for g and v
    (Adam's second moment of a projection is not known from that of the whole), so they start
    without, as new parameters do.

    Args:
        state: an ``optimizer.state_dict()``, not changed.
        old: names of its parameters, group by group.
        new: names of the parameters of the optimizer that is to load it.
        model: the weight-normed model, whose shapes the state has to fit.

    Returns:
        The state dict to load, and the names of the sites whose g and v start without state.

    Raises:
        CheckpointMismatchError: the groups do not have the sizes or the state the shapes that the
            names say.
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
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    renamed: dict[str, Any] = {}
    numbers = [number for group in groups for number in group["params"]]
    for number, name in zip(numbers, (name for group in old for name in group), strict=True):
        now = _name_now(name, parts)
        if number in state["state"] and now is not None:
            _check_shape(name, state["state"][number], shapes[now])
            renamed[now] = state["state"][number]
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
    listed = {name for group in old for name in group}
    fresh = [site for site in parts if site in listed]
    return result, fresh


def _order(model: nn.Module, legacy: set[str], parametrized: set[str]) -> list[str]:
    """All parameter names in the order of ``parameters()``, where those sites are so stored."""
    parts = {part: site for site, both in _parts(model).items() for part in both}
    modules = [path for path, _ in model.named_modules()]
    own: dict[str, list[str]] = {}
    for name in parts:
        own.setdefault(name.rpartition(".")[0], []).append(name)
    lists = dict(own)
    with writable(model):
        # Inside, every weight is a Parameter again, and in its old place.
        own = {}
        for name, _ in model.named_parameters():
            own.setdefault(name.rpartition(".")[0], []).append(name)
    order: list[str] = []
    for path in modules:
        if path in lists and ".parametrizations." in f".{path}.":
            order += [name for name in lists[path] if parts[name] in parametrized]
            continue
        members = own.get(path, [])
        order += [name for name in members if name not in legacy | parametrized]
        # The legacy function deletes the parameter and registers its parts behind the others.
        order += [f"{name}_{end}" for name in members if name in legacy for end in "gv"]
    return order


def _name_now(name: str, parts: Mapping[str, tuple[str, str]]) -> str | None:
    if name in parts:
        return None  # a weight that was plain
    site, _, end = name.rpartition("_")
    if site in parts and end in ("g", "v"):
        return parts[site]["gv".index(end)]
    return name


def _check_shape(name: str, state: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != shape:
            raise CheckpointMismatchError(
                f"the checkpoint's optimizer has {key} of shape {tuple(value.shape)} where {name} "
                f"would be, of shape {shape}: its parameters are in another order than the "
                "model's. Load the weights alone: wn_surgery converts them in "
                "model.load_state_dict()"
            )


def _parts(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The names of g and v of each site, under the name of its weight."""
    names = {name for name, _ in model.named_parameters()}
    return {key.weight: (key.g, key.v) for key in keys_of(model) if key.v in names}
