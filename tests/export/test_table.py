"""The table of docs/export.md is what its script finds: a part of it is made again here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.torch_facts.versions import OLD

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path = ROOT / "docs" / "make_export_table.py"
    spec = importlib.util.spec_from_file_location("make_export_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    "rows",
    [
        ("TCN", "torch.export", "torchscript-trace", "torchscript-script", "torch-quantize"),
        ("TCN", "ort-quantize"),
    ],
    ids="-".join,
)
def test_the_page_says_what_is_found(
    script: ModuleType, rows: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    model, *targets = rows
    if OLD and "ort-quantize" in targets:
        pytest.skip("the page is of a newer ONNX exporter")
    assert script.main(["--check", "--models", model, "--targets", *targets]) == 0
    assert capsys.readouterr().out.count("\n") >= len(targets)


def test_the_page_has_every_row(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    every = {(target, model) for target in script.TARGETS for model in script.MODELS}
    assert script.listed(page).keys() == every


def test_a_page_that_is_wrong_is_noticed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    row = script.listed(page)["torch-quantize", "TCN"]
    wrong = tmp_path / "export.md"
    wrong.write_text(page.replace(row, row.replace("| breaks |", "| ok |")), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", wrong)
    arguments = ["--models", "TCN", "--targets", "torch-quantize"]
    assert script.main(["--check", *arguments]) == 1
    assert script.main(arguments) == 0
    assert wrong.read_text(encoding="utf-8") == page


def test_what_counts_as_the_same(script: ModuleType) -> None:
    line = "| onnx | TCN | bloats | yes | 37 → 19 | – | 0.54 MB → 0.52 MB | 4e-07 → 2e-07 |\n"
    for old, new, same in [
        ("", "", True),
        ("0.54 MB", "0.55 MB", True),
        ("0.54 MB", "0.60 MB", False),
        ("4e-07", "6e-07", True),
        ("4e-07", "4e-02", False),
        ("37", "36", False),
        ("yes", "no", False),
        ("4e-07 → 2e-07", "3e-07", True),
        ("4e-07 → 2e-07", "–", False),
        ("0.54 MB → 0.52 MB", "0.53 MB", True),
    ]:
        assert script.same(line, line.replace(old, new) if old else line) is same, (old, new)
