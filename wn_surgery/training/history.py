"""How g and ‖v‖ went during training, and a picture of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wn_surgery.training.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History"]

_PANELS = (("g", "g", "linear"), ("v_norm", "‖v‖", "log"), ("effective_lr", "lr/‖v‖²", "log"))


class History:
    """Statistics of a model over training: numbers alone, no tensors.

    Attributes:
        steps: when, in optimizer steps.
        records: what :class:`wn_surgery.Statistics` said then: for each site, the means of g and
            ‖v‖ and the effective learning rate.

    Example:
        >>> import torch, wn_surgery as wn
        >>> from wn_surgery.training.history import History
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
        self.records.append(
            {
                site.name: {"g": site.g[1], "v_norm": site.v_norm[1]}
                | ({} if site.effective_lr is None else {"effective_lr": site.effective_lr})
                for site in statistics.sites
            }
        )

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
                points = [
                    (step, record[name][key])
                    for step, record in zip(self.steps, self.records, strict=True)
                    if key in record.get(name, ())
                ]
                if points:
                    shade = 0.9 * number / max(1, len(names) - 1)
                    axes.plot(*zip(*points, strict=True), color=colours(shade), lw=1, label=name)
            axes.set_xlabel("optimizer step")
            axes.set_title(label)
            if axes.lines:
                axes.set_yscale(scale)
        first = figure.axes[0]
        lines = first.get_lines()
        # Beyond a dozen the first and the last say which way the colours go.
        shown = lines if len(lines) <= 12 else [lines[0], lines[-1]]
        figure.legend(handles=shown, loc="outside right center", fontsize="small")
        return figure
