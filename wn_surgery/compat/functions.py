"""torch's four functions for weight norm, with torch's arguments, on every layout."""

from __future__ import annotations

import re
from types import FunctionType
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from wn_surgery.errors import ModelError
from wn_surgery.model.layouts import Foreign, Normed, carried, drop_load_hooks, put_load_hook
from wn_surgery.model.sites import as_module
from wn_surgery.norm.naming import NormedLayout
from wn_surgery.rules.rule import Rule
from wn_surgery.surgery.checks import before_hook
from wn_surgery.surgery.execution import execute
from wn_surgery.surgery.planning import build

__all__ = [
    "parametrized_weight_norm", "remove_parametrizations", "remove_weight_norm", "weight_norm",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


def weight_norm(module: M, name: str = "weight", dim: int | None = 0) -> M:
    """Put weight norm on a parameter in torch's legacy layout, and return the module.

    It takes the place of ``torch.nn.utils.weight_norm``: the state dict has ``weight_g`` and
    ``weight_v``, and torch's own hook computes the weight before each forward. Unlike torch's, it
    keeps the weight's bits and its ``requires_grad``, gives no deprecation warning, and loads
    checkpoints of every layout.

    Args:
        module: the layer.
        name: its parameter.
        dim: the axis with a norm of its own; None or -1 for one norm of the whole tensor, as in
            torch, where other negative numbers count from the end.

    Raises:
        ModelError: the parameter has weight norm (also a RuntimeError), is not there (also an
            AttributeError and a ValueError), has no such axis (also an IndexError), or cannot have
            weight norm for one of the reasons in docs/errors.md. The module is as it was.
        TypeError: ``dim`` is not an integer, or ``module`` not a module.

    Example:
        >>> from torch import nn
        >>> from wn_surgery.compat import weight_norm
        >>> layer = weight_norm(nn.Linear(4, 8))
        >>> list(layer.state_dict())
        ['bias', 'weight_g', 'weight_v']
    """
    _apply(module, name, dim, "legacy")
    put_load_hook(module, name)
    return module


def parametrized_weight_norm(module: M, name: str = "weight", dim: int | None = 0) -> M:
    """Put weight norm on a parameter in the parametrized layout, and return the module.

    It takes the place of ``torch.nn.utils.parametrizations.weight_norm``: the state dict has
    ``parametrizations.weight.original0`` and ``original1``. It is what ``wn_surgery.apply`` puts
    on a layer: it keeps the weight's bits, loads every layout, and can be copied and pickled.

    Args:
        module: the layer.
        name: its parameter.
        dim: as in :func:`weight_norm`.

    Raises:
        ModelError: as in :func:`weight_norm`. torch's accepts a second weight norm on the same
            parameter, and the first forward fails.

    Example:
        >>> import pickle
        >>> from torch import nn
        >>> from wn_surgery.compat.parametrizations import weight_norm
        >>> list(pickle.loads(pickle.dumps(weight_norm(nn.Linear(4, 8)))).state_dict())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    _apply(module, name, dim, "parametrized")
    return module


def remove_weight_norm(module: M, name: str = "weight") -> M:
    """Take weight norm off a parameter, in whatever layout it is, and return the module.

    It takes the place of ``torch.nn.utils.remove_weight_norm``, which knows only the legacy hook.
    The weight keeps its bits, its place among the parameters and its ``requires_grad``.

    Args:
        module: the layer itself. For all layers of a model there is ``wn_surgery.remove(model)``.
        name: its parameter.

    Raises:
        ModelError: the parameter has no weight norm (also a ValueError, as in torch), or another
            parametrization beside it. The module is as it was.

    Example:
        >>> from torch import nn
        >>> from wn_surgery.compat import remove_weight_norm
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
        >>> [name for name, _ in remove_weight_norm(layer).named_parameters()]
        ['weight', 'bias']
    """
    held = carried(as_module(module)).get(name)
    if held is None or (isinstance(held, Foreign) and "WeightNorm" not in held.maker):
        raise ModelError(
            f"weight_norm of '{name}' not found in {type(module).__name__}, in any layout; to take "
            "it off all layers of a model, call wn_surgery.remove(model)",
            kind="missing",
            site=name,
        )
    execute(build(module, (_rule(name, action="remove"),)))
    return module


def remove_parametrizations(
    module: nn.Module, tensor_name: str, leave_parametrized: bool = True
) -> nn.Module:
    """Take the parametrizations off a tensor, and return the module.

    It takes the place of ``torch.nn.utils.parametrize.remove_parametrizations``, and does the same
    for whatever is not weight norm. Weight norm is taken off in every layout, as by
    :func:`remove_weight_norm`, and its load hook with it.

    Args:
        module: the layer.
        tensor_name: its parameter.
        leave_parametrized: False is for parametrizations of one tensor, which weight norm is not.

    Raises:
        ValueError: the tensor has no parametrization, or ``leave_parametrized=False`` is given for
            weight norm.

    Example:
        >>> import pickle
        >>> from torch import nn
        >>> from wn_surgery.compat.parametrize import remove_parametrizations
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
        >>> _ = pickle.dumps(remove_parametrizations(layer, "weight"))
    """
    if not isinstance(carried(as_module(module)).get(tensor_name), Normed):
        plain: nn.Module = _torchs_own(module, tensor_name, leave_parametrized)
        drop_load_hooks(plain, tensor_name)
        return plain
    if not leave_parametrized:
        raise ValueError(
            f"leave_parametrized=False: weight norm computes {tensor_name} from two tensors, g and "
            "v, and there is no single one to go back to; leave it at True"
        )
    return remove_weight_norm(module, tensor_name)


def _copy_of(function: Any) -> Any:
    """A function that goes on doing what ``function`` does now, though its code is exchanged."""
    if not isinstance(function, FunctionType):
        return function
    parts = function.__code__, function.__globals__, function.__name__
    return FunctionType(*parts, function.__defaults__, function.__closure__)


_torchs_own = _copy_of(parametrize.remove_parametrizations)


def _apply(module: nn.Module, name: str, dim: int | None, layout: NormedLayout) -> None:
    held = carried(as_module(module)).get(name)
    if isinstance(held, Normed):
        raise ModelError(
            f"Cannot register two weight_norm hooks on the same parameter {name}: "
            f"{type(module).__name__}.{name} already carries weight norm with {held.norm}, "
            f"in the layout {held.layout!r}; remove it first",
            kind="existing",
            site=name,
        )
    if held is None and module._parameters.get(name) is None:
        has = ", ".join(key for key, value in module._parameters.items() if value is not None)
        raise ModelError(
            f"{type(module).__name__} has no parameter {name!r}; its own parameters are "
            f"{has or 'none'}",
            kind="missing",
            site=name,
        )
    plan = build(module, (_rule(name, dim=_axis(module, name, dim)),))
    if layout == "legacy":
        for step in plan.changes:
            step.after = layout
            plan.problems += before_hook(step.site)
    execute(plan)


def _rule(name: str, **options: Any) -> Rule:
    """A rule for one parameter of the module itself."""
    return Rule(names="", params=f"re:{re.escape(name)}", **options)


def _axis(module: nn.Module, name: str, dim: int | None) -> int | None:
    """The axis that torch means by ``dim``."""
    if dim is None or dim == -1:
        return None
    if type(dim) is not int:  # a bool is one to isinstance
        raise TypeError(f"dim={dim!r}: expected an integer or None; wn_surgery.apply takes more")
    if dim >= 0:
        return dim
    weight = module._parameters.get(name)
    if weight is None or nn.parameter.is_lazy(weight):
        return 0  # the plan has another reason to refuse it
    if -dim > weight.ndim:
        raise ModelError(
            f"dim={dim} is out of range for {name} of shape {tuple(weight.shape)}; expected "
            f"-{weight.ndim} to {weight.ndim - 1}, or None for the whole tensor",
            kind="dim",
            site=name,
        )
    return dim + weight.ndim
