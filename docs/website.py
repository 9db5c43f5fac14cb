"""What turns the repository's pages into a site: a hook of mkdocs and an extension of griffe.

The pages are written to be read where the repository is, so README.md links to docs/rules.md, and
docs/torch.md to a test. On the site README.md is the first page, and a link to a file that is no
page is the file's name. The pages of the API are made here, from each face's ``__all__``.
"""

from __future__ import annotations

import ast
import posixpath
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# docs/index.md is the list of pages, which the site's navigation shows.
ADDED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
REPLACED = {"docs/index.md": "index.md"}

# The line above a module's names.
FACES = {
    "wn_surgery.errors": "What to do about each kind: [Errors](../errors.md).",
    "wn_surgery": "What you call on a model. Each example on these pages runs as a test.",
    "wn_surgery.rules": "Guide: [Rules](../rules.md).",
    "wn_surgery.training.statistics": "Guide: [Lightning](../lightning.md).",
    "wn_surgery.export": "Guide: [Export](../export.md).",
    "wn_surgery.checkpoints": "Guide: [Checkpoints](../checkpoints.md).",
    "wn_surgery.huggingface": "Guide: [Hugging Face](../huggingface.md).",
    "wn_surgery.callbacks.lightning": "Guide: [Lightning](../lightning.md).",
    "wn_surgery.callbacks.transformers": "Guide: [Hugging Face](../huggingface.md#the-trainer).",
    "wn_surgery.compat": "Guide: [From your own loops](../migration.md).",
    "wn_surgery.fused": "Guide: [Fused weights](../fused.md).",
    "wn_surgery.norm": "The arithmetic by itself.",
}

LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s]+)\)")
CELL_CODE = re.compile(r"`[^`\n]*`")
ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):`~?([\w.]+)`")
ROOM = re.compile(r"\n\nIn: .*\nOut: .*\nImports: .*\Z", re.DOTALL)


# --- The pages --------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, target in ADDED.items():
        if (there := files.get_file_from_path(target)) is not None:
            files.remove(there)
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=text))
    for face, line in FACES.items():
        names = [name for name in names_of(face) if known()[f"{face}.{name}"] == f"{face}.{name}"]
        names.sort(key=lambda name: (name[0].isupper(), name))  # what you call, then what it gives
        hidden = filter(None, (hidden_of(face, name) for name in names))
        options = f"\n    options: {{members: {names}}}"
        apart = "\n    options: {show_root_heading: true}"
        blocks = [f"::: {face}{options}", *(f"::: {path}{apart}" for path in hidden)]
        text = "\n\n".join([f"# {face}", f"[](){{ #{face} }} {line}", *blocks])
        files.append(File.generated(config, page_of(face), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a page's links to where the pages are on the site."""
    path = page.file.src_uri
    if path.startswith("api/"):
        return markdown
    if path == "index.md":
        page.meta["hide"] = ["navigation"]
    titles = dict(titled(config.nav))
    source = next((old for old, new in ADDED.items() if new == path), f"docs/{path}")

    def moved(link: re.Match[str]) -> str:
        text, (target, _, anchor) = link[1], link[2].partition("#")
        if not target or "://" in target:
            return link[0]
        old = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        new = {**ADDED, **REPLACED}.get(old, old.removeprefix("docs/"))
        if files.get_file_from_path(new) is None:
            return f"`{text}`" if text == old else text
        if text in (target, old):  # a file's name; the site has titles
            text = titles.get(new, text)
        new = posixpath.relpath(new, posixpath.dirname(path) or ".")
        return f"[{text}]({new}{'#' + anchor if anchor else ''})"

    # Code is left as it is: a line of it may look like a link.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    for index in range(0, len(parts), 2):
        text = LINK.sub(moved, parts[index])
        # Where a table is read elsewhere, a bar in its code is escaped.
        parts[index] = re.sub(
            r"^\|.*$",
            lambda row: CELL_CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0]),
            text,
            flags=re.MULTILINE,
        )
    text = "".join(parts)
    if path == "troubleshooting.md":
        page.meta["search"] = {"boost": 4}  # whoever pastes a message wants this page
        # Messages are long lines, and no tables.
        text = text.replace("\n```text\n", "\n``` { .text .wrap }\n")
    return text


def titled(nav: Any) -> Iterator[tuple[str, str]]:
    """Each page of the navigation with its title."""
    for entry in nav:
        ((title, value),) = entry.items()
        if isinstance(value, str):
            yield value, title
        else:
            yield from titled(value)


# --- The API ----------------------------------------------------------------------------------


def page_of(face: str) -> str:
    """Where the page of a module is."""
    return f"api/{face.removeprefix('wn_surgery.')}.md"


@cache
def tree_of(face: str) -> ast.Module:
    """The code of a module, which is not imported for it."""
    path = ROOT.joinpath(*face.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def names_of(face: str) -> list[str]:
    """The ``__all__`` of a module."""
    for node in tree_of(face).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{face} has no __all__")


def hidden_of(face: str, name: str) -> str | None:
    """What a name is that griffe does not show with its face: a module, or hidden by one."""
    for node in tree_of(face).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            if node.module == f"{face}.{name}":
                return f"{face}.{name}.{name}"
            if node.module == face and f"{face}.{name}" not in FACES:
                return f"{face}.{name}"
    return None


@cache
def known() -> dict[str, str]:
    """Every public name, short and in full, and what it is called in a link."""
    found: dict[str, str] = {}
    for face in FACES:
        for name in names_of(face):
            # Errors are shown apart, and what `wn_surgery` has is shown there.
            homes = [home for home in list(FACES)[:2] if name in names_of(home)]
            found[f"{face}.{name}"] = full = f"{[*homes, face][0]}.{name}"
            found.setdefault(name, full)
    return found


class Docstrings(griffe.Extension):
    """Turns Sphinx's roles into links, and leaves out what a room says about its imports."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of whatever griffe has read."""
        if obj.docstring is not None:
            text = ROOM.sub("", obj.docstring.value)
            # A section of griffe's has this name.
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = ROLE.sub(linked, text)


def linked(role: re.Match[str]) -> str:
    """A link to a public name or to what belongs to one; otherwise code."""
    name = role[1]
    for end in range(len(parts := name.split(".")), 0, -1):
        if (full := known().get(".".join(parts[:end]))) is not None:
            face, _, last = full.rpartition(".")
            full = hidden_of(face, last) or full
            return f"[`{name}`][{'.'.join([full, *parts[end:]])}]"
    return f"[`{name}`][{name}]" if name in FACES else f"`{name}`"
