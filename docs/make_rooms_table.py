"""Write the table of rooms in docs/design.md from what the ``__init__`` of each room says.

Run ``python docs/make_rooms_table.py`` after a change to one. With ``--check`` it writes nothing,
and its exit status is 1 if the page is out of date.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- rooms: begin -->\n", "<!-- rooms: end -->\n"
ROOMS = ["norm", "rules", "model", "surgery", "training", "fused", "export", "checkpoints"]
ROOMS += ["compat", "reporting", "huggingface", "callbacks", "cli"]


def row(room: str) -> str:
    """One line of the table."""
    folder = ROOT / "callbacks" if room == "callbacks" else ROOT / "wn_surgery" / room
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    found = re.search(r"^In: (.+)\.\nOut: (.+)\.\nImports: (.+)\.$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{folder / '__init__.py'} says In:, Out: and Imports:"
    cells = [" ".join(each.split()) for each in found.groups()]
    cells = [re.sub(r":\w+:`(\w+)`", r"`\1`", each).replace("``", "`") for each in cells]
    ground = "errors", "tables", "differences"
    cells[2] = ", ".join(name for name in cells[2].split(", ") if name not in ground) or "–"
    return f"| `{room}/` | {' | '.join(cells)} |"


def updated(page: str) -> str:
    """Put the table between its markers in the page."""
    head = "| room | takes in | gives out | may import |\n|---|---|---|---|\n"
    table = head + "\n".join(map(row, ROOMS)) + "\n"
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the page, or check it; the exit status is 1 if it was out of date under --check."""
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page)
    if "--check" in arguments:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
