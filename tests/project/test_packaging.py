"""What is in the wheel, the sdist and an editable install.

The folder ``callbacks/`` is installed as ``wn_surgery.callbacks``, by ``package-dir`` and a
symlink: nothing named ``callbacks`` may reach site-packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import wn_surgery

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
MODULES = {
    f"wn_surgery/{path.relative_to(ROOT / 'wn_surgery').as_posix()}"
    for path in (ROOT / "wn_surgery").rglob("*.py")
    if "callbacks" not in path.parts
} | {
    f"wn_surgery/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "callbacks").rglob("*.py")
}

NAME = f"wn_surgery-{wn_surgery.__version__}"
FILES = [
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "mkdocs.yml",
    "pyproject.toml",
]
FOLDERS = [".ci", "benchmarks", "callbacks", "docs", "examples", "tests", "wn_surgery"]
# Those of each kind: with makers of their own, with data files, with scripts of docs/.
COLLECTED = ["tests/norm", "tests/written", "tests/rules/test_sources.py", "tests/checkpoints"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, since builds leave folders behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


def build(source: Path, hook: str, out: Path) -> Path:
    """Call a hook of the build backend as pip does, offline and without isolation."""
    code = f"import sys, setuptools.build_meta as b; print(b.{hook}(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return out / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "build_wheel", tmp_path_factory.mktemp("wheel"))


def test_the_version_has_one_source(wheel: Path) -> None:
    assert wheel.name.startswith(f"{NAME}-")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == wn_surgery.__version__
    assert f"## [{wn_surgery.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_has_what_its_format_asks_for() -> None:
    """Of version 1.2.0 (https://citation-file-format.github.io): cffconvert accepts it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in project["authors"]
    ]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_the_hooks_before_a_commit_are_those_of_make_lint() -> None:
    """`make lint` runs the file; nothing in it comes from elsewhere or has a version of its own."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy", "pyright"]
    for hook in hooks:
        assert hook["entry"].startswith(".venv/bin/"), hook["entry"]
        # `make lint` runs this stage; a hook without stages is of every one.
        assert "pre-push" in hook.get("stages", ["pre-push"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lint = makefile.partition("\nlint:")[2].partition("\n\n")[0]
    assert lint.splitlines()[1:] == ["\t$(BIN)/pre-commit run --all-files --hook-stage pre-push"]
    assert "make lint" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE")]
    page = {f"wn_surgery/reporting/page.{kind}" for kind in ("css", "js")}
    compiled = {
        f"wn_surgery/fused/native/{path.name}"
        for path in (ROOT / "wn_surgery/fused/native").iterdir()
        if path.suffix in (".cpp", ".h")
    }
    assert names == MODULES | page | compiled | {"wn_surgery/py.typed"}
    assert "License-Expression: BSD-3-Clause" in metadata
    assert len(licenses) == 1


def test_a_checkout_without_symlinks_imports_the_callbacks(source: Path, tmp_path: Path) -> None:
    """Where git cannot make a symlink, it writes a file that holds the link's target."""
    checkout = shutil.copytree(source, tmp_path / "checkout", symlinks=True)
    link = checkout / "wn_surgery" / "callbacks"
    target = link.readlink()
    link.unlink()
    link.write_text(str(target))
    code = "import wn_surgery.callbacks.holding as h; print(h.__name__, h.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    name, file = run.stdout.split()
    assert name == "wn_surgery.callbacks.holding"
    assert Path(file) == checkout / "callbacks" / "holding.py"


@pytest.fixture(scope="module")
def unpacked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(source, "build_sdist", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


def test_the_sdist_builds_the_same_wheel(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    again = build(unpacked, "build_wheel", tmp_path)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_the_sdist_holds_what_its_tests_need(source: Path, unpacked: Path) -> None:
    files = {
        path.relative_to(source).as_posix()
        for name in [*FILES, *FOLDERS]
        for path in [source / name, *(source / name).rglob("*")]
        if path.is_file() and path.suffix != ".pyc"
    }
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert not files - held
    callbacks = unpacked / "wn_surgery" / "callbacks"
    assert callbacks.is_dir() and not callbacks.is_symlink()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *COLLECTED],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "tests/norm/test_math.py::" in run.stdout


def test_the_callbacks_are_where_the_package_looks() -> None:
    """A checkout without symlinks has a small text file instead: its callbacks go unchecked."""
    advice = "run: git config core.symlinks true && git checkout -- wn_surgery/callbacks"
    inside = ROOT / "wn_surgery" / "callbacks"
    assert inside.is_dir(), advice
    for path in (ROOT / "callbacks").rglob("*.py"):
        seen = inside / path.relative_to(ROOT / "callbacks")
        assert seen.read_bytes() == path.read_bytes(), advice


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_install_imports_the_callbacks(
    source: Path, wheel: Path, tmp_path: Path, kind: str
) -> None:
    site = tmp_path / "site"
    built = wheel if kind == "wheel" else build(source, "build_editable", tmp_path)
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    assert not (site / "callbacks").exists()
    # addsitedir runs the .pth file of an editable install. The package itself imports torch,
    # so only the finders are asked.
    code = (
        "import importlib.machinery as m, importlib.util as u, site, sys\n"
        "site.addsitedir(sys.argv[1])\n"
        "spec = u.find_spec('callbacks')\n"
        "assert spec is None, spec\n"
        "top = next(s for f in sys.meta_path if (s := f.find_spec('wn_surgery', None)))\n"
        "part = next(s for f in sys.meta_path\n"
        "    if (s := f.find_spec('wn_surgery.callbacks', top.submodule_search_locations)))\n"
        "print(top.origin, part.origin, sep='\\n')\n"
    )
    # -S: not this environment's own install of the package.
    run = subprocess.run(
        [sys.executable, "-S", "-c", code, str(site)],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    package, callbacks = map(Path, run.stdout.split())
    where = site if kind == "wheel" else source
    assert package == where / "wn_surgery" / "__init__.py"
    assert callbacks.resolve() in {
        where / "wn_surgery" / "callbacks" / "__init__.py",
        where / "callbacks" / "__init__.py",
    }
