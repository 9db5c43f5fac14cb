"""Write the table of docs/recipes.md: what the recipes do to one small training.

A multilayer perceptron learns scikit-learn's digits, with five seeds for each recipe. The table has
the mean and the spread of the loss on held-out digits, and what became of ‖v‖ and of the effective
learning rate. Run ``python docs/make_recipes_table.py``; it takes a minute or two.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import wn_surgery as wn

PAGE = Path(__file__).with_name("recipes.md")
MARKERS = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
SEEDS, EPOCHS, BATCH = range(5), 10, 64


class Recipe(NamedTuple):
    """A row: rules, and a function that makes the optimizers of the weight-normed model."""

    rules: dict[str, Any] | None
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]
    from_batch: bool = False


def adamw(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    """AdamW, with decay on v alone."""
    return [torch.optim.AdamW(wn.parameter_groups(model, weight_decay=0.01, **options), lr=1e-3)]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for v, AdamW for the rest."""
    matrices, others = wn.parameter_groups(model, weight_decay=0.01).split_matrices()
    by_muon = torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    return [by_muon, torch.optim.AdamW(others, lr=1e-3)]


NORMED: dict[str, Any] = {"types": "Linear"}
RMS = {**NORMED, "renormalize": "rms"}
RECIPES = {
    "plain, AdamW": Recipe(None, adamw),
    "weight norm, AdamW": Recipe(NORMED, adamw),
    "the same, initialized from a batch": Recipe(NORMED, adamw, from_batch=True),
    "the same, g_lr = 10 lr": Recipe(NORMED, lambda m: adamw(m, g_lr=1e-2)),
    "renormalized to norm 1, AdamW": Recipe({**NORMED, "renormalize": True}, adamw),
    "renormalized to rms 1, AdamW": Recipe(RMS, adamw),
    "weight norm, Muon and AdamW": Recipe(NORMED, muon),
    "renormalized to rms 1, Muon and AdamW": Recipe(RMS, muon),
}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three quarters of the digits to train on, and the rest."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images).float().div(16).sub(0.5)[order]
    y = torch.from_numpy(labels).long()[order]
    cut = len(y) * 3 // 4
    return x[:cut], y[:cut], x[cut:], y[cut:]


def train(recipe: Recipe, seed: int, data: tuple[Tensor, ...]) -> dict[str, float]:
    """Train once, and measure."""
    x, y, held_out, labels = data
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    )
    if recipe.rules is not None:
        wn.apply(model, recipe.rules)
        if recipe.from_batch:
            wn.initialize_from_batch(model, x[:BATCH])
    optimizers = recipe.optimizers(model)
    renormalized = recipe.rules is not None and "renormalize" in recipe.rules
    if renormalized:
        wn.renormalize(model)
    found = {}
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            for optimizer in optimizers:
                optimizer.step()
            if renormalized:
                wn.renormalize(model)
        if recipe.rules is not None and epoch in (0, EPOCHS - 1):
            when = "first" if epoch == 0 else "last"
            found[when] = wn.statistics(model, optimizers).summary()["effective_lr_mean"]
    with torch.no_grad():
        logits = model(held_out)
    found["loss"] = float(F.cross_entropy(logits, labels))
    found["error"] = float((logits.argmax(1) != labels).float().mean())
    return found


def table() -> str:
    """One row for each recipe."""
    lines = [
        "| recipe | held-out loss | error | lr/‖v‖² after the first epoch, the last | |",
        "|---|---|---|---|---|",
    ]
    data = digits()
    for name, recipe in RECIPES.items():
        runs = [train(recipe, seed, data) for seed in SEEDS]
        loss, error = ([run[key] for run in runs] for key in ("loss", "error"))
        rates = ""
        change = ""
        if recipe.rules is not None:
            first, last = (statistics.mean(run[key] for run in runs) for key in ("first", "last"))
            rates, change = f"{first:.2e}, {last:.2e}", f"× {last / first:.2f}"
        spread = f"{statistics.mean(loss):.3f} ± {statistics.stdev(loss):.3f}"
        wrong = f"{statistics.mean(error):.1%} ± {statistics.stdev(error):.1%}"
        lines.append(f"| {name} | {spread} | {wrong} | {rates} | {change} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = MARKERS
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n{table()}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
