"""What to watch while weight-normed layers train: g, ‖v‖ and the effective learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wn_surgery.model.sites import NormedSite, normed
from wn_surgery.norm.math import norm_except
from wn_surgery.surgery.optimizers import all_unwrapped
from wn_surgery.tables import render

__all__ = ["SiteStatistics", "Statistics", "statistics"]

_PARTS = ("min", "mean", "max")
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SiteStatistics:
    """Of one weight-normed parameter.

    Attributes:
        name: the site's name.
        g: least, mean and greatest magnitude.
        v_norm: least, mean and greatest ‖v‖, one for each slice that has a g.
        effective_lr: mean of lr/‖v‖² over the slices; None where no optimizer holds v.
        g_values: every magnitude, float32 on the CPU, one axis.
        v_norm_values: every ‖v‖, likewise.
    """

    name: str
    g: tuple[float, float, float]
    v_norm: tuple[float, float, float]
    effective_lr: float | None
    g_values: Tensor = field(repr=False, compare=False)
    v_norm_values: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Statistics:
    """Of every weight-normed parameter of a model; ``print`` it.

    Attributes:
        sites: in the order of the model.
    """

    sites: tuple[SiteStatistics, ...]

    def summary(self) -> dict[str, float]:
        """Over all slices of all sites: ``g_min``, ``v_norm_mean``, ``effective_lr_max`` and so on.

        Empty without sites; without ``effective_lr`` where no optimizer holds a v.
        """
        if not self.sites:
            return {}
        values = {
            "g": torch.cat([site.g_values for site in self.sites]),
            "v_norm": torch.cat([site.v_norm_values for site in self.sites]),
        }
        rates = [site.effective_lr for site in self.sites if site.effective_lr is not None]
        if rates:
            values["effective_lr"] = torch.tensor(rates)
        return {
            f"{name}_{part}": value
            for name, tensor in values.items()
            for part, value in zip(_PARTS, _three(tensor).tolist(), strict=True)
        }

    def metrics(self, prefix: str = "weight_norm/") -> dict[str, float]:
        """The summary, and each site's means, under names for a logger.

        Args:
            prefix: what every name begins with.

        Returns:
            ``weight_norm/g_mean`` and so on for the summary, and
            ``weight_norm/<site>/g``, ``.../v_norm`` and ``.../effective_lr``.
        """
        found = {f"{prefix}{name}": value for name, value in self.summary().items()}
        for site in self.sites:
            found[f"{prefix}{site.name}/g"] = site.g[1]
            found[f"{prefix}{site.name}/v_norm"] = site.v_norm[1]
            if site.effective_lr is not None:
                found[f"{prefix}{site.name}/effective_lr"] = site.effective_lr
        return found

    def __str__(self) -> str:
        rows = [
            (
                site.name,
                *(f"{value:.4g}" for value in (*site.g, *site.v_norm)),
                "" if site.effective_lr is None else f"{site.effective_lr:.4g}",
            )
            for site in self.sites
        ]
        names = [f"{name} {part}" for name in ("g", "‖v‖") for part in _PARTS]
        return render(["site", *names, "lr/‖v‖²"], rows)


def statistics(model: nn.Module, optimizers: Optimizer | Iterable[Any] = ()) -> Statistics:
    """g, ‖v‖ and the effective learning rate of every weight-normed parameter.

    Gradient descent on v turns it without changing its scale's meaning: ‖v‖ only grows, and
    the direction moves by lr/‖v‖², the effective learning rate (Salimans & Kingma 2016,
    arXiv:1602.07868, section 2.1; van Laarhoven 2017, arXiv:1706.05350).

    Args:
        model: any module tree, in any layout. Sharded parameters are gathered, so every rank
            has to call it.
        optimizers: ``torch.optim.Optimizer`` objects, or what keeps one under ``.optimizer``, or
            a single one; for the effective learning rate.

    Returns:
        The statistics, in float32, with one transfer from the device.

    Raises:
        TypeError: ``model`` is no module, or an optimizer is none.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> _ = torch.nn.init.constant_(model[0].weight, 3.0)
        >>> _ = wn.apply(model, "linears")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.9)
        >>> print(wn.statistics(model, [optimizer]))
        site      g min  g mean  g max  ‖v‖ min  ‖v‖ mean  ‖v‖ max  lr/‖v‖²
        --------  -----  ------  -----  -------  --------  -------  -------
        0.weight  4.243  4.243   4.243  4.243    4.243     4.243    0.05
    """
    rates = {
        id(parameter): float(group["lr"])
        for optimizer in all_unwrapped(optimizers)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if "lr" in group
    }
    found = [site for site in normed(model) if site.shape and 0 not in site.shape]
    with torch.no_grad():
        return Statistics(tuple(_of_sites(found, rates)))


def _of_sites(found: list[NormedSite], rates: dict[int, float]) -> Iterator[SiteStatistics]:
    values: list[Tensor] = []
    for site in found:
        held, norm = site.held, site.norm
        g, v = _whole(held.g), _whole(held.v)
        # In bfloat16 a sum of squares stops growing at 256 equal terms.
        v_norm = norm_except(v.float() if v.dtype in _HALVES else v, norm.dim)
        values += [g.float().flatten(), v_norm.float().flatten()]
    # Everything at once: a transfer for each site would stop a GPU hundreds of times.
    sizes = [value.numel() for value in values]
    whole = torch.cat([value.to(values[0].device) for value in values]).cpu() if values else None
    parts = iter(() if whole is None else torch.split(whole, sizes))
    for site in found:
        g, v_norm = next(parts), next(parts)
        lr = rates.get(id(site.held.v))
        yield SiteStatistics(
            site.name,
            _triple(g),
            _triple(v_norm),
            None if lr is None else float((lr / v_norm.square()).mean()),
            g,
            v_norm,
        )


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _three(values: Tensor) -> Tensor:
    return torch.stack([values.min(), values.mean(), values.max()])


def _triple(values: Tensor) -> tuple[float, float, float]:
    low, mean, high = _three(values).tolist()
    return low, mean, high
