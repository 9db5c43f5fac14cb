"""The measured tables of docs/comparison.md and docs/recipes.md are those of their result files."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    path = [*sys.path]
    sys.path.insert(0, str(DOCS))
    comparison = importlib.import_module("make_comparison")
    yield comparison, importlib.import_module("make_recipes_table")
    sys.path[:] = path
    for name in ("make_comparison", "make_recipes_table"):
        del sys.modules[name]


@pytest.mark.parametrize("number", [0, 1], ids=["comparison", "recipes"])
def test_the_page_has_what_was_measured(scripts: Any, number: int) -> None:
    script = scripts[number]
    results = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    page = script.PAGE.read_text(encoding="utf-8")
    made = scripts[0].written(page, script.table(results))
    assert made == page, f"run python docs/{script.__name__}.py"
    assert page.count("±") > 20


def test_everything_was_measured(scripts: Any) -> None:
    comparison, recipes = scripts
    for script, tasks in ((comparison, comparison.TASKS), (recipes, [recipes.NAME])):
        found = json.loads(script.RESULTS.read_text(encoding="utf-8"))["tasks"]
        assert {*found} == {*tasks}
        for task in found.values():
            assert [*task["variants"]] == [*script.VARIANTS]
            for variant in task["variants"].values():
                assert [*variant["curves"]] == ["0", "1", "2", "3", "4"]
                # The rate that was used is the best of those that were tried.
                ends = {int(k): c[-1][1] for k, c in variant["tuning"].items()}
                ends = {k: math.inf if end is None else end for k, end in ends.items()}
                assert min(ends, key=ends.__getitem__) == variant["rate"]
    assert comparison.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_it_measures_only_what_is_missing(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, _ = scripts
    page, results, picture = (tmp_path / name for name in ("page.md", "new/r.json", "p.png"))
    page.write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(comparison, "FURTHEST", 0)
    monkeypatch.setattr(comparison, "POINTS", 2)
    arguments = ["--tasks", "digits_diffusion", "--seeds", "2", "--steps", "2"]
    arguments += ["--results", str(results), "--page", str(page), "--picture", str(picture)]
    assert comparison.main(arguments) == 0
    first = page.read_text(encoding="utf-8")
    assert first.startswith("before") and first.endswith("after\n") and "old" not in first
    assert first.count("\n| ") == 1 + len(comparison.VARIANTS)
    assert "held-out denoising loss, 2 steps" in first and "× " in first
    kept = json.loads(results.read_text(encoding="utf-8"))
    curves = kept["tasks"]["digits_diffusion"]["variants"]["weight norm"]["curves"]
    assert [step for step, _ in curves["0"]] == [0, 1, 2]
    assert curves["0"] != curves["1"]

    trained = []
    real = comparison.Training.__init__

    def noted(self: Any, task: Any, variant: Any, lr: float, seed: int, steps: int) -> None:
        trained.append((variant, seed))
        real(self, task, variant, lr, seed, steps)

    monkeypatch.setattr(comparison.Training, "__init__", noted)
    del curves["1"]
    results.write_text(json.dumps(kept), encoding="utf-8")
    assert comparison.main(arguments) == 0
    assert trained == [(comparison.VARIANTS["weight norm"], 1)]
    assert page.read_text(encoding="utf-8") == first  # the same seed gives the same


def test_the_recipes_train(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, recipes = scripts
    available = {"weight norm, Lion": "lion_pytorch", "weight norm, schedule-free": "schedulefree"}
    chosen = ["weight norm, AdamW, `g_lr` = 10 lr", "weight norm, AdamW, `clip_gradients`, 1.0"]
    chosen += ["weight norm, Muon"] if hasattr(recipes.torch.optim, "Muon") else []
    chosen += [name for name, module in available.items() if importlib.util.find_spec(module)]
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(comparison, "FURTHEST", 0)
    monkeypatch.setattr(comparison, "POINTS", 2)
    results = tmp_path / "r.json"
    arguments = ["--seeds", "1", "--steps", "4", "--results", str(results)]
    assert recipes.main([*arguments, "--page", str(page), "--recipes", *chosen]) == 0
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if "±" in line]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == chosen
    trained = json.loads(results.read_text(encoding="utf-8"))["tasks"][recipes.NAME]["variants"]
    assert len({each["curves"]["0"][-1][1] for each in trained.values()}) == len(chosen)


def test_the_rate_is_the_best_of_its_neighbours(scripts: Any) -> None:
    comparison, _ = scripts
    tried = []

    def valley(bottom: int) -> Any:
        def end(k: int) -> float:
            tried.append(k)
            return float(abs(k - bottom))

        return end

    assert [comparison.tuned(valley(k)) for k in (-5, -3, -7)] == [-5, -3, -7]
    assert comparison.tuned(lambda k: math.inf if k > -8 else float(-k)) == -8
    assert comparison.tuned(valley(5)) == comparison.START + comparison.FURTHEST
    assert max(tried) == comparison.START + comparison.FURTHEST


def test_what_is_said_of_a_run_that_diverged(scripts: Any) -> None:
    comparison, _ = scripts
    found = {"curves": {"0": [[0, 1.0], [5, 2.0]], "1": [[0, 3.0], [5, None]]}}
    (start, end) = comparison.summary(found)
    assert start == (0, 2.0, pytest.approx(math.sqrt(2)))
    assert end == (5, math.inf, 0.0)
    assert comparison.shown(*start[1:]) == "2 ± 1.4"
    assert comparison.shown(*end[1:]) == "diverged"


def test_the_difference_is_that_of_pairs(scripts: Any) -> None:
    comparison, _ = scripts
    found, other = (
        {"curves": {str(i): [[9, end]] for i, end in enumerate(ends)}}
        for ends in ([1.1, 2.6], [1.0, 2.0])
    )
    assert comparison.against(found, other) == "+20.0% ± 14.1%"
    assert comparison.against(other, other) == ""
    other["curves"]["0"][0][1] = None
    assert comparison.against(found, other) == ""
