"""Draw the pictures of the pages: a plan, a training, and a report.

Run ``python docs/make_images.py`` from a clone (about a minute). It needs the extra ``demo``. The
plan is what ``wn.plan`` prints for examples/digits_tcn.py. The curves are what the Lightning
callback records while that example trains on the digits of scikit-learn, and the report is the page
that it writes then. It needs Chromium or Chrome; without one it is not drawn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TypeAlias

import lightning as L
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch.utils.data import DataLoader

import wn_surgery as wn
from wn_surgery.callbacks.lightning import WeightNorm

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

import digits_tcn  # noqa: E402 - it is found by the line above

from tests.browser import Browser, chromium  # noqa: E402

INK, FAINT, LINE = "#1f2328", "#6e7781", "#d0d7de"
CHANGED, SKIPPED = "#dafbe1", "#f3f4f6"
# The optimizer steps, and the values of each layer at each of them.
Curves: TypeAlias = tuple[list[int], list[dict[str, dict[str, float]]]]
COLOURS = ["#08519c", "#3182bd", "#00695c", "#26a69a", "#b45309", "#f59e0b"]
LEFT, TOP, CHARACTER, ROW = 0.35, 0.75, 0.0945, 0.27  # in inches


def plan() -> Figure:
    """Draw the printed plan: a band under each parameter, green where it changes."""
    rules = digits_tcn.RULES
    made = wn.plan(digits_tcn.TCN(), rules)
    lines = str(made).replace(str(rules), rules.name).splitlines()
    width = LEFT * 2 + max(map(len, lines)) * CHARACTER
    height = TOP + len(lines) * ROW + 0.3
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.add_patch(_box(0.08, 0.08, width - 0.16, height - 0.16, "white", LINE))
    call = 'print(wn.plan(model, "digits_tcn_rules.yaml"))'
    axes.text(LEFT, 0.45, call, family="monospace", size=11, color=FAINT, va="center")
    header, _, *rest = lines
    rows, notes = rest[: len(made.steps)], rest[len(made.steps) :]
    _line(axes, 0, header, "bold")
    axes.plot([LEFT, width - LEFT], [TOP + ROW] * 2, color=LINE, lw=1.2)
    for number, (text, step) in enumerate(zip(rows, made.steps, strict=True), start=1):
        colour = CHANGED if step.action == "apply" else SKIPPED
        y = TOP + ROW * number + 0.05
        axes.add_patch(_box(LEFT - 0.1, y, width - 2 * LEFT + 0.2, ROW - 0.03, colour, "none"))
        _line(axes, number, text, colour=INK if step.action == "apply" else FAINT, down=0.05)
    for number, text in enumerate(notes, start=len(rows) + 1):
        _line(axes, number, text, colour=INK if number == len(rows) + 1 else FAINT, down=0.12)
    return figure


def _box(x: float, y: float, width: float, height: float, face: str, edge: str) -> FancyBboxPatch:
    style = "round,pad=0,rounding_size=0.06"
    return FancyBboxPatch((x, y), width, height, boxstyle=style, fc=face, ec=edge, lw=1.2)


def _line(
    axes: Axes, row: int, text: str, weight: str = "normal", colour: str = INK, down: float = 0.0
) -> None:
    y = TOP + ROW * (row + 0.5) + down
    style = {"family": "monospace", "size": 10.8, "va": "center", "color": colour}
    axes.text(LEFT, y, text, weight=weight, **style)  # type: ignore[arg-type]


def train(epochs: int, page: Path) -> Curves:
    """Train the example with the callback; return the steps, and what it recorded at each.

    The callback writes its report to ``page``.
    """
    digits_tcn.quiet()
    L.seed_everything(0, workers=True, verbose=False)
    data, _ = digits_tcn.digits(None)
    callback = WeightNorm(digits_tcn.RULES, log_every_n_steps=2, report_to=page)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    trainer.fit(digits_tcn.Classifier(digits_tcn.TCN()), loader)
    assert callback.history is not None
    return callback.history.steps, callback.history.records


def training(curves: Curves) -> Figure:
    """Draw g and the effective learning rate of each layer over the training."""
    steps, records = curves
    figure = Figure(figsize=(11.5, 4.6), layout="constrained", facecolor="white")
    names = list(records[0])
    panels = [
        ("g", "g, mean over the channels"),
        ("effective_lr", "effective learning rate, lr / ‖v‖²"),
    ]
    for axes, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, colour in zip(names, COLOURS, strict=True):
            values = [record[name][key] for record in records]
            label = name.removeprefix("model.").removesuffix(".weight")
            axes.plot(steps, values, color=colour, lw=2, label=label)
        axes.set_title(title, fontsize=14, color=INK, loc="left", pad=10)
        axes.set_xlabel("optimizer step", fontsize=12, color=INK)
        axes.tick_params(labelsize=11, colors=INK)
        axes.grid(color=LINE, lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.set_xlim(0, steps[-1])
    figure.axes[1].set_ylim(0)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.06)  # type: ignore[union-attr]
    handles = figure.axes[0].get_lines()
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=6,
        fontsize=11,
        columnspacing=1.2,
        handlelength=1.4,
        frameon=False,
    )
    return figure


def screenshot(page: Path, target: Path) -> None:
    """Take a picture of the page's upper part in a browser."""
    found = chromium()
    if found is None:
        print(f"no Chromium was found, so {target} is not drawn")
        return
    profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with profile as folder, Browser(found, Path(folder)) as browser:
        browser.look(1200, 1280)
        browser.open(page)
        browser.picture(target)
    print(target)


def main(argv: list[str] | None = None) -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where the PNG files go")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        for name, figure in (("plan", plan()), ("training", training(train(args.epochs, page)))):
            figure.savefig(args.folder / f"{name}.png", dpi=150)
            print(args.folder / f"{name}.png")
        screenshot(page, args.folder / "report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
