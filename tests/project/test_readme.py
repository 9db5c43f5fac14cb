"""The documentation is true: its Python runs, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torch_facts.versions import OLD
from wn_surgery import errors

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MORE_PAGES = [
    ROOT / name
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


NEWER_PAGES = {
    "docs/checkpoints.md": "dcp.save takes no no_dist",
    "docs/scaling.md": "FSDP2 does not run on the CPU",
    "docs/troubleshooting.md": "torch's errors have other texts",
}
"""Pages with code that an older torch does not run."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """The fenced blocks: language, number of the first line, content."""
    for fence in FENCE.finditer(text):
        yield fence[1], text.count("\n", 0, fence.start(2)) + 1, fence[2]


def anchors(text: str) -> set[str]:
    """What a heading can be linked by."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


# What Lightning and transformers tell everyone, about the size of the examples and themselves.
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*The number of training batches",
    "ignore:.*`tensorboardX` has been removed",
    "ignore:The .grad attribute of a Tensor",  # torch.compile looks at it
    "ignore:torch.distributed is disabled",
    "ignore:FSDP2-wrapped module .* returned a view",  # of what tensor parallelism returns
    "ignore:FSDP is switching to use `NO_SHARD`",  # in one process
)
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_the_python_of_a_page_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One namespace for the page. A YAML block that starts with a file's name is that file, and
    a text block is what the Python before it prints.
    """
    if OLD and (why := NEWER_PAGES.get(relative(page))):
        pytest.skip(why)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    printed = ""
    for language, line, block in blocks(page.read_text(encoding="utf-8")):
        if language == "yaml" and (name := re.match(r"# (\w+\.yaml)\n", block)):
            Path(name[1]).write_text(block, encoding="utf-8")
        elif language == "python":
            # Empty lines in front give tracebacks the page's own line numbers.
            exec(compile("\n" * (line - 1) + block, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif language == "text":
            assert block == printed


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path).resolve()
        assert there.exists(), f"{relative(page)} links to {target}"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def test_the_page_of_errors_has_every_exception() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(errors.__all__)
    kinds = dict(re.findall(r'^\| `"(\w+)"` \| `(\w+)` \|', page, re.MULTILINE))
    family = errors.WeightNormError.__subclasses__()
    others = {
        error.__name__: error.kind
        for each in family
        for error in [each, *each.__subclasses__()]
        if error.__name__ not in errors.__all__ and error.__module__ == errors.__name__
    }
    assert {name: kind for kind, name in kinds.items()} == others


def test_the_page_of_the_design_has_every_room() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(ROOT / "docs" / "make_rooms_table.py"))
    assert script["updated"](page) == page, "run python docs/make_rooms_table.py"
    folders = {path.parent.name for path in (ROOT / "wn_surgery").glob("*/__init__.py")}
    assert {*script["ROOMS"]} == folders | {"callbacks"}


def test_the_table_of_engines_is_that_of_its_results() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(ROOT / "docs" / "make_engines_table.py"))
    assert script["updated"](page) == page, "run python docs/make_engines_table.py"


def test_the_files_that_the_design_names_are_there() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    start = page.partition("## The rooms")[0] + page.partition("## Where to look")[2]
    named = set(re.findall(r"`(\w+/[\w/]+\.py)`", start.partition("## Why rooms")[0]))
    assert len(named) > 10
    for name in named:
        assert (ROOT / "wn_surgery" / name).is_file(), name


@pytest.mark.parametrize("name", ["export", "huggingface", "lightning"])
def test_a_tutorial_is_what_its_script_makes(name: str) -> None:
    """Its text and code here; test_the_python_of_a_page_runs compares what the code prints."""
    script = runpy.run_path(str(ROOT / "docs" / "make_tutorials.py"))
    page = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    source = (ROOT / "docs" / "tutorials" / f"{name}.py").read_text(encoding="utf-8")
    made = script["with_outputs_of"](page, source)
    assert made == page, f"run python docs/make_tutorials.py {name}"
    assert "```text\n" in page


def test_the_page_of_messages_shows_each_message_and_a_cure() -> None:
    """Its code runs in test_the_python_of_a_page_runs, which also compares what it prints."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.split(r"^### ", page, flags=re.MULTILINE)[1:]
    assert len(sections) > 15
    for section in sections:
        heading = re.search(r"^`+(.*?)`+$", section.splitlines()[0])
        assert heading is not None, section.splitlines()[0]
        languages = [language for language, _, _ in blocks(section)]
        shown = languages.index("text")
        printed = [block for _, _, block in blocks(section)][shown]
        for piece in heading[1].split("..."):
            assert piece.rstrip(")") in printed, heading[1]
        # After the message comes what to write, and it is checked.
        cures = [block for language, _, block in blocks(section) if language == "python"][1:]
        assert languages[:shown] == ["python"] and cures, heading[1]
        assert re.search(r"assert|backward\(\)|load_state_dict", "".join(cures)), heading[1]
