"""Make the tutorials: run each script of docs/tutorials/ and write its page, with what it prints.

    python docs/make_tutorials.py             # all of them
    python docs/make_tutorials.py export      # one
    python docs/make_tutorials.py --check     # exit status 1 if a page is out of date

A script is a docstring (the title, then the introduction) and cells: text after `# %% [markdown]`,
code after `# %%`. What a code cell prints becomes a `text` block below it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parent / "tutorials"
CELL = re.compile(r"^# %%(?: \[(markdown)\])?\n", re.MULTILINE)
OUTPUT = re.compile(r"^```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def rendered(source: str, printed: Callable[[str, int], str]) -> str:
    """The page of a script; ``printed`` says what a cell's code, with its first line, prints."""
    title, _, introduction = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
    parts = [f"# {title.removesuffix('.')}", introduction]
    pieces = CELL.split(source)[1:]
    line = source[: source.index("# %%")].count("\n") + 2
    for kind, content in zip(pieces[::2], pieces[1::2], strict=True):
        if kind == "markdown":
            lines = [each.removeprefix("#").removeprefix(" ") for each in content.splitlines()]
            parts.append("\n".join(lines).strip())
        else:
            parts.append(f"```python\n{content.strip()}\n```")
            if output := printed(content, line):
                parts.append(f"```text\n{output}```")
        line += content.count("\n") + 1
    return "\n\n".join(parts) + "\n"


def run(script: Path) -> str:
    """The page of a script that is run for it, in a folder of its own."""
    namespace: dict[str, Any] = {"__name__": script.stem}

    def printed(code: str, line: int) -> str:
        exec(compile("\n" * (line - 1) + code, str(script), "exec"), namespace)
        output = shown.getvalue()
        shown.seek(0)
        shown.truncate()
        return output

    here = Path.cwd()
    shown = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(shown):
        os.chdir(folder)
        try:
            return rendered(script.read_text(encoding="utf-8"), printed)
        finally:
            os.chdir(here)


def with_outputs_of(page: str, source: str) -> str:
    """The page that the source makes if it prints what the page has: nothing is run."""
    outputs = {
        code.strip(): output or ""
        for code, output in re.findall(
            r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", page, re.DOTALL | re.MULTILINE
        )
    }
    return rendered(source, lambda code, _: outputs.get(code.strip(), ""))


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="all of them if none is given")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    stale = []
    for script in sorted(TUTORIALS.glob("*.py")):
        if args.names and script.stem not in args.names:
            continue
        page = script.with_suffix(".md")
        new = run(script)
        if not page.exists() or page.read_text(encoding="utf-8") != new:
            stale.append(page.name)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    print("out of date:" if args.check else "written:", *stale or ["none"])
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
