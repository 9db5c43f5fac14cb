"""Parameter groups for an optimizer: weight decay on v and on other weights, not on g."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, cast

from torch import nn

from wn_surgery.model.sites import normed
from wn_surgery.rules import fields
from wn_surgery.rules.patterns import PatternSet
from wn_surgery.tables import render

__all__ = ["ParameterGroups", "parameter_groups"]


class ParameterGroups(list[dict[str, Any]]):
    """Groups as ``torch.optim`` takes them; ``print`` it for what went where.

    Attributes:
        decayed: names of the parameters with weight decay.
        exempt: names of the parameters without, each with the reason.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], decayed: tuple[str, ...], exempt: dict[str, str]
    ) -> None:
        super().__init__(groups)
        self.decayed = decayed
        self.exempt = exempt

    def __repr__(self) -> str:
        return f"<ParameterGroups: {self._counts()}>"

    def __str__(self) -> str:
        rows = [("decay", name, "") for name in self.decayed]
        rows += [("no_decay", name, reason) for name, reason in self.exempt.items()]
        return f"{render(['group', 'parameter', 'why'], rows)}\n{self._counts()}"

    def _counts(self) -> str:
        return f"{len(self.decayed)} with weight decay, {len(self.exempt)} without"


def parameter_groups(
    model: nn.Module, *, weight_decay: float, no_decay: str | Iterable[str] = ()
) -> ParameterGroups:
    """The trainable parameters of a model in two groups: with weight decay and without.

    Without decay: the magnitudes g (torch's g has the rank of the weight, so the usual test for
    vectors misses it), parameters with fewer than two axes (biases, gains of norms), and what
    ``no_decay`` names. Decay on v does not change the function that the model computes, but it
    keeps ‖v‖, and with it the effective learning rate, from drifting.

    Args:
        model: any module tree, in any layout. Apply weight norm first. Frozen parameters are left
            out.
        weight_decay: of the first group, as the optimizer takes it.
        no_decay: patterns (docs/rules.md) over parameter names. A weight-normed weight has its
            name without weight norm: ``"**.embed.weight"``.

    Returns:
        A list of groups with the keys ``params``, ``weight_decay`` and ``name`` (``decay``,
        ``no_decay``), in the order of ``model.named_parameters()``, without empty groups.

    Raises:
        ValueError: ``weight_decay`` is negative or not finite, a pattern is not valid or matches
            no trainable parameter, or the model has no trainable parameter.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> _ = wn.apply(model, "linears")
        >>> groups = wn.parameter_groups(model, weight_decay=0.01)
        >>> print(groups)
        group     parameter                            why
        --------  -----------------------------------  -------------------
        decay     0.parametrizations.weight.original1
        no_decay  0.bias                               fewer than two axes
        no_decay  0.parametrizations.weight.original0  magnitude g
        no_decay  1.weight                             fewer than two axes
        no_decay  1.bias                               fewer than two axes
        1 with weight decay, 4 without
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if not isinstance(cast(object, weight_decay), Real) or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay!r}; expected a finite number of at least 0")
    sources = fields.strings("no_decay", no_decay, or_none=True)
    patterns = {source: PatternSet.of([source]) for source in sources}
    unused = set(sources)
    found = normed(model)
    magnitudes = {id(site.held.g) for site in found}
    plain_names = {id(part): site.name for site in found for part in (site.held.g, site.held.v)}
    params: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    decayed: list[str] = []
    exempt: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        known_as = plain_names.get(id(parameter), name)
        named = [source for source, pattern in patterns.items() if pattern.matches(known_as)]
        unused -= set(named)
        if why := _why_exempt(parameter, id(parameter) in magnitudes, named):
            exempt[name] = why
        else:
            decayed.append(name)
        params["no_decay" if why else "decay"].append(parameter)
    if unused:
        raise ValueError(
            f"no_decay={min(unused)!r} matches no trainable parameter of the model; patterns are "
            "over whole names, such as '**.embed.weight'"
        )
    if not decayed and not exempt:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    decay = {"decay": weight_decay, "no_decay": 0.0}
    groups = [
        {"params": held, "weight_decay": decay[name], "name": name}
        for name, held in params.items()
        if held
    ]
    return ParameterGroups(groups, tuple(decayed), exempt)


def _why_exempt(parameter: nn.Parameter, magnitude: bool, named: list[str]) -> str:
    if magnitude:
        return "magnitude g"
    if named:
        return f"no_decay={named[0]!r}"
    return "fewer than two axes" if parameter.ndim < 2 else ""
