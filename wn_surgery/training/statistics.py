"""What to watch while weight-normed layers train: g, ‖v‖ and the effective learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wn_surgery.model.sites import NormedSite, whole
from wn_surgery.norm.cuts import gathered
from wn_surgery.norm.math import magnitude
from wn_surgery.surgery.optimizers import all_unwrapped
from wn_surgery.tables import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History", "SiteStatistics", "Statistics", "measured", "statistics"]

_PARTS = ("min", "mean", "max")
_HALVES = (torch.bfloat16, torch.float16)
_PANELS = (("g", "g", "linear"), ("v_norm", "‖v‖", "log"), ("effective_lr", "lr/‖v‖²", "log"))


@dataclass(frozen=True)
class SiteStatistics:
    """Of one weight-normed parameter.

    Attributes:
        name: the site's name.
        g: smallest, mean and largest magnitude.
        v_norm: smallest, mean and largest ‖v‖, one for each slice that has a g.
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

    def means(self) -> dict[str, float]:
        """The means of ``g`` and ``v_norm``, and ``effective_lr`` where it is known."""
        rate = {} if self.effective_lr is None else {"effective_lr": self.effective_lr}
        return {"g": self.g[1], "v_norm": self.v_norm[1], **rate}


@dataclass(frozen=True)
class Statistics:
    """Of every weight-normed parameter of a model, in the order of the model; ``print`` it."""

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
            for part, value in zip(_PARTS, _three(tensor), strict=True)
        }

    def metrics(self, prefix: str = "weight_norm/") -> dict[str, float]:
        """The summary and each site's means, under names for a logger.

        Returns:
            ``weight_norm/g_mean`` and so on for the summary, and
            ``weight_norm/<site>/g``, ``.../v_norm`` and ``.../effective_lr``.
        """
        found = {f"{prefix}{name}": value for name, value in self.summary().items()}
        for site in self.sites:
            found |= {f"{prefix}{site.name}/{name}": value for name, value in site.means().items()}
        return found

    def __repr__(self) -> str:
        return f"<Statistics of {len(self.sites)} sites>"

    def __str__(self) -> str:
        names = [f"{name} {part}" for name in ("g", "‖v‖") for part in _PARTS]
        rows = []
        for site in self.sites:
            rate = "" if site.effective_lr is None else f"{site.effective_lr:.4g}"
            rows.append((site.name, *(f"{x:.4g}" for x in (*site.g, *site.v_norm)), rate))
        return render(["site", *names, "lr/‖v‖²"], rows)


def statistics(model: nn.Module, optimizers: Optimizer | Iterable[Any] = ()) -> Statistics:
    """g, ‖v‖ and the effective learning rate of every weight-normed parameter.

    Under gradient descent on v its scale has no meaning: ‖v‖ only grows, and the direction moves
    by lr/‖v‖², the effective learning rate (Salimans & Kingma 2016, arXiv:1602.07868, section
    2.1; van Laarhoven 2017, arXiv:1706.05350).

    Args:
        model: any module tree, in any layout. Of sharded parameters the norms are gathered, so
            every rank has to call it.
        optimizers: for the effective learning rate: a ``torch.optim.Optimizer``, a wrapper that
            keeps one under ``.optimizer``, or several of them.

    Returns:
        The statistics, in float32, with one transfer from the device.

    Raises:
        TypeError: ``model`` is not a module, or an optimizer is not an optimizer.

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
    return measured(whole(model), optimizers)


def measured(sites: Iterable[NormedSite], optimizers: Optimizer | Iterable[Any] = ()) -> Statistics:
    """The statistics of these sites; those without elements are left out."""
    rates = {
        id(parameter): float(group["lr"])
        for optimizer in all_unwrapped(optimizers)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if "lr" in group
    }
    found = [site for site in sites if site.shape and 0 not in site.shape]
    with torch.no_grad():
        return Statistics(tuple(_of_sites(found, rates)))


def _of_sites(found: list[NormedSite], rates: dict[int, float]) -> Iterator[SiteStatistics]:
    if not found:
        return
    values: list[Tensor] = []
    for site in found:
        g, v = gathered(site.held.g.detach()), site.held.v.detach()
        # In bfloat16 a sum of squares stops growing at 256 equal terms.
        v_norm = gathered(magnitude(v.float() if v.dtype in _HALVES else v, site.dim))
        values += [g.float().flatten(), v_norm.float().flatten()]
    # Everything at once: a transfer for each site would stop a GPU hundreds of times.
    whole = torch.cat([value.to(values[0].device) for value in values]).cpu()
    parts = iter(torch.split(whole, [value.numel() for value in values]))
    for site in found:
        g, v_norm = next(parts), next(parts)
        lr = rates.get(id(site.held.v))
        rate = None if lr is None else float((lr / v_norm.square()).mean())
        yield SiteStatistics(site.name, _three(g), _three(v_norm), rate, g, v_norm)


def _three(values: Tensor) -> tuple[float, float, float]:
    low, mean, high = torch.stack([values.min(), values.mean(), values.max()]).tolist()
    return low, mean, high


class History:
    """Statistics of a model over training: only numbers, no tensors.

    Attributes:
        steps: when, in optimizer steps.
        records: for each step and site, the means of g and ‖v‖ and the effective learning rate.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.history import History
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> _ = wn.apply(model, "linears")
        >>> history = History()
        >>> history.add(10, wn.statistics(model))
        >>> history.steps, list(history.records[0])
        ([10], ['0.weight'])
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.records: list[dict[str, dict[str, float]]] = []

    def add(self, step: int, statistics: Statistics) -> None:
        """Keep what was measured at a step."""
        self.steps.append(step)
        self.records.append({site.name: site.means() for site in statistics.sites})

    def plot(self) -> Figure:
        """One figure for the whole model: a line for each site, from the first (dark) to the last.

        Returns:
            A matplotlib figure of three panels: g, ‖v‖ and the effective learning rate, each the
            mean over a site's slices. ``figure.savefig(path)`` writes it.

        Raises:
            ValueError: nothing has been recorded.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if not self.records:
            raise ValueError("nothing has been recorded yet; give log_every_n_steps and train")
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plotting needs matplotlib: pip install 'wn-surgery[plot]'", name=error.name
            ) from error
        names = list(dict.fromkeys(name for record in self.records for name in record))
        colours: Any = colormaps["viridis"]
        figure = Figure(figsize=(12, 4), layout="constrained")
        for axes, (key, label, scale) in zip(figure.subplots(1, 3), _PANELS, strict=True):
            for number, name in enumerate(names):
                steps = zip(self.steps, self.records, strict=True)
                points = [(at, held[name][key]) for at, held in steps if key in held.get(name, ())]
                if points:
                    shade = 0.9 * number / max(1, len(names) - 1)
                    axes.plot(*zip(*points, strict=True), color=colours(shade), lw=1, label=name)
            axes.set_xlabel("optimizer step")
            axes.set_title(label)
            if axes.lines:
                axes.set_yscale(scale)
        lines = figure.axes[0].get_lines()
        # With more than a dozen, the first and the last show which way the colours go.
        shown = lines if len(lines) <= 12 else [lines[0], lines[-1]]
        figure.legend(handles=shown, loc="outside right center", fontsize="small")
        return figure
