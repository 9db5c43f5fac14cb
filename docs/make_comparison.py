"""Compare plain training, weight norm, and two ways of using it, on three of the examples.

``python docs/make_comparison.py`` trains what docs/measured/comparison.json does not have yet, and
writes the table and the picture of docs/comparison.md from it. That file is written after each
training, so you can stop the script and start it again; remove it to measure everything anew (some
ten minutes of CPU time). docs/make_recipes_table.py trains by the same functions.

Each variant gets the learning rate that serves it best: a factor of √10 up or down from 10^-2.5,
until the next ones on both sides are worse, with a seed that is not among the five.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wn_surgery as wn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "measured" / "comparison.json"
PAGE = ROOT / "docs" / "comparison.md"
PICTURE = ROOT / "docs" / "images" / "comparison.png"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
TUNING_SEED, START, FURTHEST = 100, -5, 4  # rates are 10 ** (k / 2), for k from -9 to -1
POINTS = 12  # of a curve
COLOURS = ("#6e7781", "#08519c", "#b45309", "#00695c")


# What is trained --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """An example, in small: how to build its model, and how to train and to judge it."""

    title: str
    metric: str
    steps: int
    rules: Any
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    judge: Callable[[nn.Module], float]
    batch: Callable[[torch.Generator], tuple[Tensor, ...]]  # inputs of the model


def example(name: str) -> Any:
    """A module of examples/."""
    if str(ROOT / "examples") not in sys.path:
        sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module(name)


def digits_diffusion() -> Task:
    """The denoiser of examples/digits_diffusion.py; its rows begin at norm 1, as there."""
    diffusion = example("digits_diffusion")
    train, held_out = diffusion.digits()

    def some(generator: torch.Generator) -> Tensor:
        return train[torch.randint(len(train), (128,), generator=generator)]

    def model() -> nn.Module:
        made: nn.Module = diffusion.Denoiser()
        for layer in made.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = F.normalize(layer.weight.data, dim=1)
        return made

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = some(generator)
        sigma = (torch.randn(len(images), 1, generator=generator) * 1.2 - 1.0).exp()
        return images + sigma * torch.randn(images.shape, generator=generator), sigma

    def judge(model: nn.Module) -> float:
        fixed = torch.Generator().manual_seed(2)
        return sum(float(diffusion.loss_of(model, held_out, fixed)) for _ in range(4)) / 4

    return Task(
        title="a diffusion model of digits",
        metric="held-out denoising loss",
        steps=600,
        rules="linears",
        model=model,
        loss=lambda model, generator: diffusion.loss_of(model, some(generator), generator),
        judge=judge,
        batch=batch,
    )


def sdf() -> Task:
    """The signed distances of examples/sdf.py."""
    module = example("sdf")

    def batch(generator: torch.Generator) -> tuple[Tensor]:
        return (2 * torch.rand(256, 3, generator=generator) - 1,)

    return Task(
        title="signed distances to a torus",
        metric="mean error of the distance",
        steps=200,
        rules="neus",
        model=module.SDF,
        loss=module.loss_of,
        judge=module.error_of,
        batch=batch,
    )


def digits_tcn() -> Task:
    """The classifier of examples/digits_tcn.py, with 16 channels."""
    tcn = example("digits_tcn")
    train, test = (data.tensors for data in tcn.digits(None))

    def some(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(train[0]), (32,), generator=generator)
        return train[0][chosen], train[1][chosen]

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        pixels, digit = some(generator)
        return F.cross_entropy(model(pixels), digit)

    return Task(
        title="digits, read by a TCN",
        metric="held-out cross entropy",
        steps=200,
        rules=tcn.RULES,
        model=lambda: tcn.TCN(channels=16),
        loss=loss,
        judge=lambda model: float(F.cross_entropy(model(test[0]), test[1])),
        batch=lambda generator: some(generator)[:1],
    )


TASKS = {"digits_diffusion": digits_diffusion, "sdf": sdf, "digits_tcn": digits_tcn}


@dataclass(frozen=True)
class Variant:
    """How a task is trained."""

    normed: bool = True
    from_batch: bool = False
    norm: float | None = None  # that v goes back to after each step
    optimizers: Callable[[nn.Module, float], list[Any]] | None = None  # None is Adam
    clip: Callable[[nn.Module], Any] | None = None


VARIANTS = {
    "plain": Variant(normed=False),
    "weight norm": Variant(),
    "weight norm, initialized from a batch": Variant(from_batch=True),
    "weight norm, renormalized": Variant(norm=1.0),
}


class Training:
    """One model in training, step by step."""

    def __init__(self, task: Task, variant: Variant, lr: float, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.task, self.variant = task, variant
        self.model = task.model()
        self.generator = torch.Generator().manual_seed(seed)
        if variant.normed:
            wn.apply(self.model, task.rules)
        if variant.from_batch:
            wn.initialize_from_batch(self.model, *task.batch(self.generator))
        if variant.norm is not None:
            wn.renormalize(self.model, variant.norm)
        make = variant.optimizers or (lambda model, lr: [torch.optim.Adam(model.parameters(), lr)])
        self.optimizers = make(self.model, lr)
        self.schedules = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for optimizer in self.optimizers
            if not hasattr(optimizer, "eval")  # which schedule-free optimizers have
        ]

    def _to(self, mode: str) -> None:
        for each in (self.model, *self.optimizers):
            getattr(each, mode, lambda: None)()

    def step(self, count: int) -> None:
        """Take so many steps."""
        self._to("train")
        for _ in range(count):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss: Any = self.task.loss(self.model, self.generator)
            loss.backward()
            if self.variant.clip is not None:
                self.variant.clip(self.model)
            for each in (*self.optimizers, *self.schedules):
                each.step()
            if self.variant.norm is not None:
                wn.renormalize(self.model, self.variant.norm, optimizers=self.optimizers)

    def judge(self) -> float:
        """What the task makes of the model now."""
        self._to("eval")
        with torch.no_grad():
            return self.task.judge(self.model)


def curve(training: Training, steps: int) -> list[tuple[int, float | None]]:
    """Train, and judge now and then; None stands for what is not finite."""
    ends = sorted({round(steps * i / POINTS) for i in range(POINTS + 1)})
    found: list[tuple[int, float | None]] = []
    for done, end in zip([0, *ends], ends, strict=False):
        training.step(end - done)
        value = training.judge()
        found.append((end, value if math.isfinite(value) else None))
    return found


# What is kept -----------------------------------------------------------------------------------


class Results(dict[str, Any]):
    """The file of results: it is written whenever something is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def get_or(self, keys: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """What is at these keys; it is made and written if it is missing."""
        place: dict[str, Any] = self
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        if keys[-1] not in place:
            place[keys[-1]] = json.loads(json.dumps(make()))
            self.write()
            print(*keys, flush=True)
        return place[keys[-1]]

    def write(self) -> None:
        """Put another file in the place of the one that is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        # A line for each point of a curve.
        text = re.sub(r"\[\s+(\S+),\s+(\S+)\s+\]", r"[\1, \2]", json.dumps(self, indent=1))
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.path)


def measure(
    results: Results, name: str, task: Task, variants: dict[str, Variant], seeds: int, steps: int
) -> None:
    """Train each variant with its best learning rate and with each seed."""
    results.get_or(("tasks", name, "task"), lambda: {"title": task.title, "metric": task.metric})
    for label, variant in variants.items():
        kept = ("tasks", name, "variants", label)

        def train(
            k: int, seed: int, variant: Variant = variant
        ) -> Callable[[], list[tuple[int, float | None]]]:
            return lambda: curve(Training(task, variant, 10 ** (k / 2), seed, steps), steps)

        def end(k: int, kept: tuple[str, ...] = kept, train: Any = train) -> float:
            value = results.get_or((*kept, "tuning", str(k)), train(k, TUNING_SEED))[-1][1]
            return math.inf if value is None else float(value)

        best = tuned(end)
        for seed in range(seeds):
            results.get_or((*kept, "curves", str(seed)), train(best, seed))
        results[kept[0]][name]["variants"][label]["rate"] = best
    results.write()


def tuned(end: Callable[[int], float]) -> int:
    """The k whose end is lower than those of its neighbours."""
    best = START
    while True:
        around = [k for k in (best - 1, best, best + 1) if abs(k - START) <= FURTHEST]
        lowest = min(around, key=end)
        if lowest == best:
            return best
        best = lowest


def costs(task: Task, steps: int, rounds: int = 15) -> dict[str, dict[str, float]]:
    """CPU seconds of a step: blocks of steps of every variant in turn, and ratios within a turn."""
    trained = {name: Training(task, each, 1e-4, 0, steps) for name, each in VARIANTS.items()}
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 1):
        for name, training in trained.items():
            began = time.process_time()
            training.step(4)
            if turn:  # the first is for warming up
                taken[name].append((time.process_time() - began) / 4)
    plain = taken["plain"]
    return {
        name: {
            "seconds": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, plain, strict=True)),
        }
        for name, found in taken.items()
    }


# What is shown ----------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> Iterator[tuple[int, float, float]]:
    """The steps at which a variant was judged, with the mean and the spread over the seeds."""
    for points in zip(*found["curves"].values(), strict=True):
        values = [math.inf if value is None else value for _, value in points]
        finite = all(map(math.isfinite, values))
        spread = statistics.stdev(values) if len(values) > 1 and finite else 0.0
        yield points[0][0], statistics.mean(values), spread


def shown(mean: float, spread: float) -> str:
    """A mean and a spread, or that a run diverged."""
    return f"{mean:.3g} ± {spread:.2g}" if math.isfinite(mean) else "diverged"


def against(found: dict[str, Any], other: dict[str, Any]) -> str:
    """How much higher a variant ends than another: mean and spread over pairs of the same seed."""
    pairs = [
        (found["curves"][seed][-1][1], other["curves"][seed][-1][1]) for seed in found["curves"]
    ]
    if found is other or any(value is None for pair in pairs for value in pair):
        return ""
    ratios = [mine / theirs - 1 for mine, theirs in pairs]
    spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    return f"{statistics.mean(ratios):+.1%} ± {spread:.1%}"


def rate(found: dict[str, Any]) -> str:
    """The learning rate that was chosen."""
    return f"{10 ** (found['rate'] / 2):.2g}"


def table(results: dict[str, Any]) -> str:
    """One row for each task and variant."""
    lines = [
        "| example | trained | rate | after a quarter | at the end | than plain | a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results["tasks"].values():
        for label, variant in found["variants"].items():
            points = list(summary(variant))
            quarter, end = points[len(points) // 4], points[-1]
            cost = found["costs"][label]
            title, time_of = "", f"× {cost['ratio']:.2f}"
            if label == "plain":
                title = f"{found['task']['title']}: {found['task']['metric']}, {end[0]} steps"
                time_of = f"{1000 * cost['seconds']:.1f} ms"
            values = [shown(*quarter[1:]), shown(*end[1:])]
            values.append(against(variant, found["variants"]["plain"]))
            row = [title, label, rate(variant), *values, time_of]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def written(page: str, table: str) -> str:
    """The page with the table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def draw(results: dict[str, Any], path: Path) -> None:
    """What is measured against steps and against CPU time, mean and spread."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = results["tasks"].values()
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(11, 3.4 * len(tasks)), layout="constrained", squeeze=False
    )
    for row, found in zip(axes, tasks, strict=True):
        for (label, variant), colour in zip(found["variants"].items(), COLOURS, strict=True):
            points = list(summary(variant))[1:]
            seconds = found["costs"]["plain"]["seconds"] * found["costs"][label]["ratio"]
            for axis, unit, name in (
                (row[0], 1.0, "steps"),
                (row[1], seconds, "seconds of CPU time"),
            ):
                at = [step * unit for step, _, _ in points]
                axis.plot(at, [mean for _, mean, _ in points], color=colour, label=label)
                low, high = (
                    [max(mean + sign * spread, mean / 10) for _, mean, spread in points]
                    for sign in (-1, 1)
                )
                axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
                axis.set_yscale("log")
                axis.set_ylabel(found["task"]["metric"])
                axis.set_xlabel(name)
                axis.set_title(found["task"]["title"], fontsize=11)
                axis.grid(color="#d0d7de", linewidth=0.6)
    axes[0][0].legend(fontsize=9)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, then write the page and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="for a try; the page has those of each task")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(args.results)
    results.get_or(("torch",), lambda: torch.__version__)
    for name in args.tasks:
        task = TASKS[name]()
        steps = args.steps or task.steps
        measure(results, name, task, VARIANTS, args.seeds, steps)
        results.get_or(("tasks", name, "costs"), lambda: costs(task, steps))  # noqa: B023
    page = args.page.read_text(encoding="utf-8")
    args.page.write_text(written(page, table(results)), encoding="utf-8")
    draw(results, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
