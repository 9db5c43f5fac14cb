"""Parameter groups for an optimizer: weight decay on v and on other weights, not on g."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from numbers import Real
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from wn_surgery.errors import ModelError
from wn_surgery.model.holders import FSDP1, holder, whole_shape
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
        self,
        groups: Iterable[dict[str, Any]],
        decayed: tuple[str, ...],
        exempt: dict[str, str],
        matrices: Collection[int] = (),
    ) -> None:
        super().__init__(groups)
        self.decayed = decayed
        self.exempt = exempt
        self._matrices = matrices

    def split_matrices(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The groups of the directions v that are matrices, and those of everything else.

        For ``torch.optim.Muon``, which takes parameters with two axes only and is meant for hidden
        layers: the v of an embedding is with the rest, as are g, biases, and convolutions.

        Raises:
            ValueError: no v is a matrix.

        Example:
            >>> import torch, wn_surgery as wn
            >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Linear(4, 8))
            >>> _ = wn.apply(model, [torch.nn.Conv1d, torch.nn.Linear])
            >>> groups = wn.parameter_groups(model, weight_decay=0.01)
            >>> for_muon, others = groups.split_matrices()
            >>> [len(group["params"]) for group in (*for_muon, *others)]
            [1, 1, 4]
            >>> adamw = torch.optim.AdamW(others)
        """
        if not self._matrices:
            raise ValueError(
                "no weight-normed layer has a v with two axes that trains, so that there is "
                "nothing for Muon; apply weight norm to linear layers first"
            )
        matrices, others = (
            [
                {**group, "params": kept}
                for group in self
                if (kept := [p for p in group["params"] if (id(p) in self._matrices) is wanted])
            ]
            for wanted in (True, False)
        )
        return matrices, others

    def __repr__(self) -> str:
        return f"<ParameterGroups: {self._counts()}>"

    def __str__(self) -> str:
        rows = [("decay", name, "") for name in self.decayed]
        rows += [("no_decay", name, reason) for name, reason in self.exempt.items()]
        return f"{render(['group', 'parameter', 'why'], rows)}\n{self._counts()}"

    def _counts(self) -> str:
        return f"{len(self.decayed)} with weight decay, {len(self.exempt)} without"


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    no_decay: str | Iterable[str] = (),
    g_lr: float | None = None,
) -> ParameterGroups:
    """The trainable parameters of a model in groups: with weight decay and without.

    Without decay: the magnitudes g (torch's g has the rank of the weight, so the usual test for
    vectors misses it), parameters with fewer than two axes (biases, gains of norms), and what
    ``no_decay`` names. Decay on v does not change the function that the model computes, but it
    keeps ‖v‖, and with it the effective learning rate, from drifting. Where a rule says
    ``renormalize``, v does not decay: :func:`wn_surgery.renormalize` does more.

    Args:
        model: any module tree, in any layout. Apply weight norm first. Frozen parameters are left
            out.
        weight_decay: of the first group, as the optimizer takes it.
        no_decay: patterns (docs/rules.md) over parameter names. A weight-normed weight has its
            name without weight norm: ``"**.embed.weight"``.
        g_lr: a learning rate for g alone, which then is a group by itself. The others have that of
            the optimizer. A schedule scales each group's own.

    Returns:
        A list of groups with the keys ``params``, ``weight_decay`` and ``name`` (``decay``,
        ``no_decay``, and ``magnitudes`` with a key ``lr``), in the order of
        ``model.named_parameters()``, without empty groups.

    Raises:
        ModelError: FSDP1 holds the model, and has made every parameter one-dimensional. Make the
            groups before: with ``use_orig_params=True`` it keeps the Parameters.
        ValueError: ``weight_decay`` or ``g_lr`` is negative or not finite, a pattern is not valid
            or matches no trainable parameter, or the model has no trainable parameter.

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
    given = {"weight_decay": weight_decay, **({} if g_lr is None else {"g_lr": g_lr})}
    for argument, value in given.items():
        if not isinstance(cast(object, value), Real) or not 0 <= value < math.inf:
            raise ValueError(f"{argument}={value!r}; expected a finite number of at least 0")
    sources = fields.strings("no_decay", no_decay, or_none=True)
    patterns = {source: PatternSet.of([source]) for source in sources}
    unused = set(sources)
    found = normed(model)
    flat = {name: p.ndim for name, p in model.named_parameters() if holder(p) == FSDP1}
    if flat and max(flat.values()) < 2:
        first = next(iter(flat))
        raise ModelError(
            f"{first} is held by {FSDP1}, which has made every parameter one-dimensional, so that "
            "nothing tells v from a bias; make the groups before the model is wrapped, and wrap "
            "it with use_orig_params=True, which keeps the Parameters",
            kind="wrapped",
            site=first,
        )
    magnitudes = {id(site.held.g) for site in found} | _traced(model)
    plain_names = {id(part): site.name for site in found for part in (site.held.g, site.held.v)}
    put_back = {id(site.held.v) for site in found if site.held.renormalize is not None}
    params: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "magnitudes": []}
    decayed: list[str] = []
    exempt: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        known_as = plain_names.get(id(parameter), name)
        named = [source for source, pattern in patterns.items() if pattern.matches(known_as)]
        unused -= set(named)
        magnitude = id(parameter) in magnitudes
        if why := _why_exempt(parameter, magnitude, named, id(parameter) in put_back):
            exempt[name] = why
        else:
            decayed.append(name)
        apart = magnitude and g_lr is not None
        params["magnitudes" if apart else "no_decay" if why else "decay"].append(parameter)
    if unused:
        raise ValueError(
            f"no_decay={min(unused)!r} matches no trainable parameter of the model; patterns are "
            "over whole names, such as '**.embed.weight'"
        )
    if not decayed and not exempt:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    groups = [
        {"params": held, "weight_decay": weight_decay if name == "decay" else 0.0, "name": name}
        for name, held in params.items()
        if held
    ]
    for group in groups:
        if group["name"] == "magnitudes":
            group["lr"] = g_lr
    matrices = {
        id(site.held.v)
        for site in found
        if len(site.shape) == 2
        and site.held.v.requires_grad
        and not site.held.v.is_complex()
        and not isinstance(site.module, nn.Embedding | nn.EmbeddingBag)
    }
    return ParameterGroups(groups, tuple(decayed), exempt, matrices)


def _traced(model: nn.Module) -> set[int]:
    """The ids of g in what a tracer has made of a model: a stage of a pipeline, for example.

    There nothing computes a weight but the graph, and the names are left.
    """
    return {
        id(module._parameters["original0"])
        for module in model.modules()
        if {"original0", "original1"} <= module._parameters.keys()
        and not isinstance(module, ParametrizationList)
    }


def _why_exempt(parameter: nn.Parameter, magnitude: bool, named: list[str], put_back: bool) -> str:
    if magnitude:
        return "magnitude g"
    if named:
        return f"no_decay={named[0]!r}"
    if put_back:
        return "renormalized"
    return "fewer than two axes" if len(whole_shape(parameter)) < 2 else ""
