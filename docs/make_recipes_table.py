"""Write the table of docs/recipes.md: optimizers and options, on the examples' diffusion model.

``python docs/make_recipes_table.py`` trains what docs/measured/recipes.json does not have yet, and
writes the table from it. It trains, chooses learning rates and keeps results as
docs/make_comparison.py does; remove the file to measure everything anew (a few minutes of CPU
time). It needs the packages lion-pytorch and schedulefree, and torch 2.9 for Muon.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import make_comparison as comparison
from make_comparison import Variant

import wn_surgery as wn

RESULTS = comparison.ROOT / "docs" / "measured" / "recipes.json"
PAGE = comparison.ROOT / "docs" / "recipes.md"
NAME, STEPS = "digits_diffusion", 300
DECAY = 0.01


def adamw(model: nn.Module, lr: float, g: float | None = None) -> list[Any]:
    """AdamW by groups; ``g`` is the learning rate of g in units of the others'."""
    g_lr = None if g is None else g * lr
    return [torch.optim.AdamW(wn.parameter_groups(model, weight_decay=DECAY, g_lr=g_lr), lr=lr)]


def lion(model: nn.Module, lr: float) -> list[Any]:
    """Lion by groups, with more weight decay, as its authors advise for its smaller rates."""
    from lion_pytorch import Lion

    return [Lion(wn.parameter_groups(model, weight_decay=10 * DECAY), lr=lr)]


def muon(model: nn.Module, lr: float) -> list[Any]:
    """Muon for v, with steps as long as AdamW's, and AdamW for the rest."""
    matrices, others = wn.parameter_groups(model, weight_decay=DECAY).split_matrices()
    by_muon = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
    return [by_muon, torch.optim.AdamW(others, lr=lr)]


def schedule_free(model: nn.Module, lr: float) -> list[Any]:
    """Schedule-free AdamW, with a tenth of the steps for warming up."""
    from schedulefree import AdamWScheduleFree

    groups = wn.parameter_groups(model, weight_decay=DECAY)
    return [AdamWScheduleFree(groups, lr=lr, warmup_steps=STEPS // 10)]


def plain_clip(model: nn.Module) -> None:
    """Clip as torch does."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip(model: nn.Module) -> None:
    """Clip by direction."""
    wn.clip_gradients(model, 1.0)


VARIANTS = {
    "plain, AdamW": Variant(normed=False, optimizers=adamw),
    "weight norm, AdamW": Variant(optimizers=adamw),
    "weight norm, AdamW, `g_lr` = 10 lr": Variant(optimizers=lambda m, lr: adamw(m, lr, 10.0)),
    "weight norm, AdamW, `g_lr` = lr / 10": Variant(optimizers=lambda m, lr: adamw(m, lr, 0.1)),
    "weight norm, AdamW, `clip_grad_norm_` of torch, 1.0": Variant(
        optimizers=adamw, clip=plain_clip
    ),
    "weight norm, AdamW, `clip_gradients`, 1.0": Variant(optimizers=adamw, clip=clip),
    "renormalized, AdamW": Variant(norm=1.0, optimizers=adamw),
    "weight norm, Lion": Variant(optimizers=lion),
    "renormalized, Lion": Variant(norm=1.0, optimizers=lion),
    "weight norm, Muon": Variant(optimizers=muon),
    "renormalized, Muon": Variant(norm=1.0, optimizers=muon),
    "weight norm, schedule-free": Variant(optimizers=schedule_free),
}


def table(results: dict[str, Any]) -> str:
    """One row for each recipe."""
    lines = [
        "| recipe | learning rate | held-out loss after a quarter | at the end | than plain |",
        "|---|---|---|---|---|",
    ]
    variants = results["tasks"][NAME]["variants"]
    for label, found in variants.items():
        points = list(comparison.summary(found))
        quarter, end = (comparison.shown(*points[i][1:]) for i in (len(points) // 4, -1))
        difference = comparison.against(found, next(iter(variants.values())))
        lines.append(f"| {label} | {comparison.rate(found)} | {quarter} | {end} | {difference} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = comparison.Results(args.results)
    results.get_or(("torch",), lambda: torch.__version__)
    chosen = {label: VARIANTS[label] for label in args.recipes}
    task = comparison.TASKS[NAME]()
    comparison.measure(results, NAME, task, chosen, args.seeds, args.steps)
    page = args.page.read_text(encoding="utf-8")
    args.page.write_text(comparison.written(page, table(results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
