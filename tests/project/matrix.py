"""Run the tests on other versions of torch, Lightning, transformers and Python.

``python tests/project/matrix.py [CELL ...]`` makes an environment for each cell in ``.matrix/``,
runs each folder of tests by itself, and writes ``docs/matrix/CELL.json`` and the table of
docs/versions.md after each of them. So a run may be stopped, and ``--only norm model`` runs again
what those folders hold. ``--python`` names an interpreter that is not on the path. It needs no
package: any Python 3.11 runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "matrix"
PACKAGES = ("torch", "lightning", "pytorch-lightning", "transformers")
SHOWN = (*PACKAGES, "peft", "numpy", "triton")
# Not `dev`, whose triton is one that an old torch does not allow, and whose linters are not needed.
EXTRAS = "yaml,lightning,plot,transformers,cli,export,demo"
TOOLS = (
    "hypothesis", "jsonargparse[signatures]", "peft", "pytest", "pytest-xdist", "setuptools>=77",
    "tensorboard", "coverage",
)  # fmt: skip


class Cell(NamedTuple):
    """One environment."""

    python: str
    torch: list[str]  # what pip is asked for, torch first
    others: list[str]
    constraints: tuple[str, ...] = ()


def declared() -> dict[str, str]:
    """The oldest version of each package that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(each for extra in extras for each in extra)]
    found = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(wanted), re.MULTILINE))
    return {name: found[name] for name in PACKAGES}


def cells() -> dict[str, Cell]:
    """The environments by name."""
    oldest = [f"{name}=={version}" for name, version in declared().items()]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch = re.findall(r"^torch==\S+", pinned, re.MULTILINE)
    fixed = ("-c", str(ROOT / "constraints.txt"))
    newest = list(PACKAGES)
    return {
        "oldest": Cell("3.11", oldest[:1], oldest[1:]),
        "pinned": Cell("3.11", torch, newest[1:], fixed),
        "pinned-python-3.13": Cell("3.13", torch, newest[1:], fixed),
        "newest": Cell("3.13", newest[:1], newest[1:]),
    }


def interpreter(version: str, given: Iterable[str]) -> str | None:
    """A Python of this version that runs."""
    for candidate in (*given, f"python{version}"):
        path = shutil.which(candidate)
        asked = path and subprocess.run(
            [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if path and asked and asked.stdout.strip() == version:
            return path
    return None


def install(cell: Cell, folder: Path, python: str, torch_arguments: list[str]) -> None:
    """Make the environment, unless it is there: torch by itself first, and then what keeps it."""
    done = folder / ".installed"
    if done.exists():
        return
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    models = ROOT / "tests" / "models" / "requirements.txt"
    for arguments in (
        [*torch_arguments, *cell.torch],
        [*cell.constraints, "-e", f"{ROOT}[{EXTRAS}]", *cell.torch, *cell.others, *TOOLS],
        ["--no-deps", "-r", str(models)],
    ):
        subprocess.run([*pip, *arguments], check=True)
    done.touch()


def versions(python: Path) -> dict[str, str]:
    """What is installed."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "held = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: held[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(held))"
    )
    run = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(run.stdout)
    return found


def folders() -> list[str]:
    """Each folder of tests, and the doctests."""
    tests = sorted(path.parent.name for path in (ROOT / "tests").glob("*/__init__.py"))
    return [*(name for name in tests if name != "gpu"), "doctests"]


def tested(python: Path, folder: str, strict: bool, report: Path) -> dict[str, object]:
    """The counts of one folder, and the names of the tests that failed."""
    # Other versions have other deprecations: there, a warning is not an error.
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [] if strict else ["-W", "default"]
    command.append("wn_surgery" if folder == "doctests" else f"tests/{folder}")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
    report.unlink(missing_ok=True)
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if not report.exists():
        return {"passed": 0, "skipped": 0, "failed": [f"pytest ended with exit code {code}"]}
    return counted(report) | {"date": datetime.now(UTC).date().isoformat()}


def counted(report: Path) -> dict[str, object]:
    """What pytest's XML file says."""
    failed, skipped, passed = [], 0, 0
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": sorted(set(failed))}


def record(file: Path, held: dict[str, str], folder: str, found: dict[str, object]) -> None:
    """Write a result beside those of other folders, unless they are of other versions."""
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if result.get("versions") != held:
        result = {"versions": held, "folders": {}}
    result["folders"][folder] = found
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    """Run what is asked for; 1 where a test failed or an interpreter is missing."""
    known = cells()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(known))
    parser.add_argument("--only", nargs="+", metavar="FOLDER", help=", ".join(folders()))
    parser.add_argument("--python", action="append", default=[], help="an interpreter")
    parser.add_argument("--torch-arguments", default="", help="for torch's own install")
    asked = parser.parse_args()
    if unknown := {*asked.cells} - {*known} | {*(asked.only or ())} - {*folders()}:
        parser.error(f"no cell or folder is called {', '.join(sorted(unknown))}")
    bad = False
    for name in asked.cells or known:
        cell = known[name]
        python = interpreter(cell.python, asked.python)
        if python is None:
            print(f"{name}: no Python {cell.python} was found; name one with --python")
            bad = True
            continue
        place = ROOT / ".matrix" / name
        install(cell, place, python, asked.torch_arguments.split())
        there = place / "bin" / "python"
        for folder in asked.only or folders():
            strict = bool(cell.constraints)
            found = tested(there, folder, strict, place / f"{folder}.xml")
            bad |= bool(found["failed"])
            record(RESULTS / f"{name}.json", versions(there), folder, found)
            # A test compares the two.
            subprocess.run([sys.executable, ROOT / "docs" / "make_versions_table.py"], check=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
