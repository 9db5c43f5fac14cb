"""The documentation as a site: it builds without a warning, is complete, and loads nothing else."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wn_surgery

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; mkdocs.yml is strict, so a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def faces() -> list[str]:
    """Every module that has public names: the rooms, and the callbacks of each framework."""
    rooms = [
        path.parent.relative_to(ROOT)
        for path in (ROOT / "wn_surgery").rglob("__init__.py")
        if "__all__ = [" in path.read_text(encoding="utf-8")
    ]
    callbacks = (ROOT / "callbacks").glob("*/__init__.py")
    names = {".".join(room.parts) for room in rooms} - {"wn_surgery.cli", "wn_surgery.surgery"}
    names |= {f"wn_surgery.callbacks.{path.parent.name}" for path in callbacks}
    return sorted(names | {"wn_surgery.callbacks.transformers", "wn_surgery.errors"})


def test_every_public_name_is_on_a_page(site: Path) -> None:
    anchors = {
        anchor
        for page in (site / "api").glob("*.html")
        for anchor in re.findall(r'\bid="([\w.]+)"', page.read_text(encoding="utf-8"))
    }
    missing = []
    for face in faces():
        module = importlib.import_module(face)
        for name in module.__all__:
            # Where one object has several names, one of them is enough.
            value = getattr(module, name)
            shown = {f"{face}.{name}", getattr(value, "__name__", "")}
            shown.add(f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}")
            if getattr(wn_surgery, name, None) is value:
                shown.add(f"wn_surgery.{name}")
            if not anchors & shown:
                missing.append(f"{face}.{name}")
    assert len(anchors) > 100
    assert not missing


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]*)\"", text)
        assert loaded
        away = [each for each in loaded if re.match(r"(?:\w+:)?//", each)]
        assert not away, f"{page.name} loads {away}"
        # No role of Sphinx, and no link in Markdown, is left over as text.
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.search(r":(?:class|func|meth|mod):|\]\(|\]\[", prose), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_search_finds_a_message_that_people_paste(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    where = {
        doc["location"].partition("#")[0] for doc in index["docs"] if "not found in" in doc["title"]
    }
    assert where == {"troubleshooting.html"}
