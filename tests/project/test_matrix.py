"""The results of ``make matrix``: what they say, and that they are of the versions declared."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from . import matrix

ROOT = Path(__file__).parents[2]
REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/>
<testcase classname="tests.a" name="two"><failure>x</failure></testcase>
<testcase classname="tests.a" name="three"><skipped/></testcase>
<testcase classname="tests.b" name=""><error/></testcase>
</testsuite></testsuites>"""


def test_what_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT, encoding="utf-8")
    failed = ["tests.a::two", "tests.b::"]
    assert matrix.counted(report) == {"passed": 1, "skipped": 1, "failed": failed}


def test_results_of_other_versions_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "matrix" / "cell.json"
    for versions, folder in (("1", "a"), ("1", "b"), ("2", "c")):
        matrix.record(file, {"torch": versions}, folder, {"passed": 1})
    held = json.loads(file.read_text(encoding="utf-8"))
    assert held == {"versions": {"torch": "2"}, "folders": {"c": {"passed": 1}}}


def test_an_interpreter_of_another_version_is_not_taken() -> None:
    assert matrix.interpreter("2.4", ["python3.11"]) is None


def test_the_oldest_cell_is_what_is_declared() -> None:
    declared = matrix.declared()
    assert set(declared) == {"torch", "lightning", "pytorch-lightning", "transformers"}
    ran = json.loads((matrix.RESULTS / "oldest.json").read_text(encoding="utf-8"))["versions"]
    for name, version in declared.items():
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*(\+\w+)?", ran[name]), (name, ran[name])


@pytest.mark.parametrize("cell", sorted(path.stem for path in matrix.RESULTS.glob("*.json")))
def test_a_result_is_of_a_cell(cell: str) -> None:
    assert cell in matrix.cells()
    result = json.loads((matrix.RESULTS / f"{cell}.json").read_text(encoding="utf-8"))
    assert result["folders"].keys() <= set(matrix.folders())
    assert result["versions"]["python"].startswith(matrix.cells()[cell].python)


def test_the_table_is_made_from_the_results() -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(ROOT / "docs" / "make_versions_table.py"))
    assert script["updated"](page) == page, "run python docs/make_versions_table.py"
