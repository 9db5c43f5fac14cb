"""The page of ``wn.report`` in headless Chromium: sorted, searched, without scripts, attacked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import wn_surgery as wn
from tests.browser import Browser, chromium
from tests.reporting.pages import HOSTILE, named
from wn_surgery.training.statistics import History

FOUND = chromium()
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        FOUND is None,
        reason="no Chromium or Chrome is installed (Debian: chromium-headless-shell), and CHROMIUM "
        "does not name one",
    ),
]

ROWS = "[...document.querySelectorAll('tbody tr')]"
SHOWN = f"""{ROWS}.filter(row => row.checkVisibility())
    .map(row => row.querySelector('code').textContent)"""
TREE = """[...document.querySelectorAll('.tree code')]
    .filter(code => code.checkVisibility({contentVisibilityAuto: false}))
    .map(code => code.innerText)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert FOUND is not None
    with Browser(FOUND, tmp_path_factory.mktemp("profile")) as made:
        made.look()
        yield made


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with blocks: g is larger in each than in the one before; the head is plain."""
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(12)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(4, 9)})
    rules = [{"types": "Linear"}, {"action": "skip", "names": "head"}]
    wn.apply(model, rules)
    with torch.no_grad():
        for number, block in enumerate(blocks):
            block[0].parametrizations.weight.original0.fill_(12.0 - number)
    history = History()
    for step in range(5):
        history.add(step, wn.statistics(model))
    folder = tmp_path_factory.mktemp("report")
    return wn.report(model, folder / "a.html", rules=rules, history=history)


def names(browser: Browser) -> list[str]:
    """The rows that are shown, by the names of their modules."""
    shown: list[str] = browser.run(SHOWN)
    return [row.removesuffix(".weight") for row in shown]


def write(browser: Browser, field: str, text: str) -> str:
    """Write into a search field, and press Enter; return what it says then."""
    browser.run(
        f"(() => {{ const field = document.querySelector('{field} input');"
        f"field.value = {text!r}; field.dispatchEvent(new Event('change')); }})()"
    )
    said: str = browser.run(f"document.querySelector('{field} output').textContent")
    return said


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({selector!r}).click()")


def test_columns_sort_up_down_and_back(browser: Browser, report: Path) -> None:
    browser.open(report)
    blocks = [f"blocks.{number}.0" for number in range(12)]
    assert names(browser) == [*blocks, "head"]
    click(browser, "th.g button")
    assert names(browser) == [*reversed(blocks), "head"]  # without a value: last
    assert browser.run("document.querySelector('th.g').ariaSort") == "ascending"
    click(browser, "th.g button")
    assert names(browser) == [*blocks, "head"]
    click(browser, "th.name button")
    assert browser.run("document.querySelectorAll('[aria-sort]').length") == 1
    assert names(browser)[:3] == blocks[:3]  # 2 comes before 10
    click(browser, "th.name button")
    assert names(browser)[:2] == ["head", "blocks.11.0"]
    click(browser, "th.name button")
    assert names(browser) == [*blocks, "head"]
    assert browser.problems == []


def test_weights_are_searched_and_filtered(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert write(browser, "#weights", "RULE 2") == "1 of 13 rows"
    assert names(browser) == ["head"]
    assert write(browser, "#weights", "1.0.weight") == "2 of 13 rows"
    assert names(browser) == ["blocks.1.0", "blocks.11.0"]
    assert write(browser, "#weights", "") == "13 rows"
    click(browser, "[data-layout=plain]")
    assert names(browser) == ["head"]
    click(browser, ".legend [data-layout=plain]")
    assert len(names(browser)) == 13


def test_the_tree_is_searched_also_for_blocks_that_it_shows_once(
    browser: Browser, report: Path
) -> None:
    browser.open(report)
    assert browser.run(TREE) == ["ModuleDict", "blocks", "0 … 11", "head"]
    assert write(browser, "#tree", "blocks.7.0") == "1 found"
    assert browser.run(TREE) == ["ModuleDict", "blocks", "0 … 11", "0"]
    assert write(browser, "#tree", "blocks.70") == "0 found"
    assert browser.run(TREE) == ["ModuleDict"]
    assert write(browser, "#tree", "relu") == "1 found"
    assert browser.run(TREE) == ["ModuleDict", "blocks", "0 … 11", "1"]
    assert write(browser, "#tree", "") == ""
    assert browser.run(TREE) == ["ModuleDict", "blocks", "0 … 11", "head"]


def test_it_can_be_read_without_scripts(browser: Browser, report: Path) -> None:
    browser.scripts(allowed=False)
    try:
        browser.open(report)
        assert len(names(browser)) == 13
        assert browser.run("document.querySelector('.tools').checkVisibility()") is False
        assert "0 … 11" in browser.run(TREE)
        click(browser, ".tree details details summary")
        assert "0 … 11" not in browser.run(TREE)
        assert browser.run("document.querySelectorAll('.cell').length") == 24
    finally:
        browser.scripts(allowed=True)


@pytest.mark.parametrize("width", [320, 768, 1121, 1280])
def test_it_fits_every_width(browser: Browser, report: Path, width: int) -> None:
    try:
        browser.look(width)
        browser.open(report)
        assert browser.run("document.documentElement.scrollWidth") == width
    finally:
        browser.look()


def test_it_is_light_or_dark(browser: Browser, report: Path) -> None:
    colours = []
    for dark in (False, True):
        browser.look(dark=dark)
        browser.open(report)
        colours.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    browser.look()
    light, dark_one = (sum(map(int, each[4:-1].split(","))) for each in colours)
    assert light > 700 and dark_one < 100


def test_hostile_names_run_nothing(browser: Browser, tmp_path: Path) -> None:
    model = named(HOSTILE)
    wn.apply(model, types=nn.Linear)
    page = wn.report(model, tmp_path / "a.html", rules={"types": nn.Linear}, title=HOSTILE[0])
    browser.problems.clear()
    browser.open(page)
    assert browser.problems == []
    assert browser.run("typeof pwned") == "undefined"
    assert browser.run("document.querySelectorAll('script, style, img, b b').length") == 2
    assert browser.run("document.querySelector('h1').textContent") == HOSTILE[0]
    assert len(browser.run(SHOWN)) == len(HOSTILE)
    assert write(browser, "#weights", "<script>pwned=1</script>") == f"2 of {len(HOSTILE)} rows"
    assert write(browser, "#tree", "<script>pwned=1</script>") == "2 found"
    assert browser.run("typeof pwned") == "undefined"


def test_the_page_s_policy_refuses_scripts_and_requests(browser: Browser, report: Path) -> None:
    """A second lock: if a name were not escaped after all, the browser would not run it."""
    text = report.read_text(encoding="utf-8")
    attacked = report.with_name("attacked.html")
    attack = "<script>pwned=1</script><img src='a.png' onerror='pwned=1'><b onclick='pwned=1'>x</b>"
    attacked.write_text(text.replace("<main>", f"<main>{attack}"), encoding="utf-8")
    browser.problems.clear()
    browser.open(attacked)
    click(browser, "b[onclick]")
    assert browser.run("typeof pwned") == "undefined"
    assert len(browser.problems) >= 3
    assert all("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()
