"""Write the table of docs/versions.md from the results that ``make matrix`` leaves in docs/matrix/.

``python docs/make_versions_table.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("versions.md")
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->\n"
COLUMNS = ("python", "torch", "lightning", "transformers", "numpy")


def updated(page: str) -> str:
    """The page with the table, and the failures below it, as the results are now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(Path(__file__).with_name("matrix").glob("*.json"))
    }
    return before + BEGIN + "\n" + _table(results) + "\n" + END + after


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"| cell | {' | '.join(COLUMNS)} | folders | passed | failed | skipped | last run |",
        "|" + "---|" * (len(COLUMNS) + 6),
    ]
    failures = []
    for cell, result in results.items():
        folders = result["folders"]
        versions = [result["versions"].get(name, "–") for name in COLUMNS]
        passed, skipped = (sum(f[what] for f in folders.values()) for what in ("passed", "skipped"))
        failed = [name for f in folders.values() for name in f["failed"]]
        last = max((f["date"] for f in folders.values() if "date" in f), default="–")
        row = [cell, *versions, ", ".join(folders), passed, len(failed), skipped, last]
        lines.append(f"| {' | '.join(map(str, row))} |")
        failures += [f"- {cell}: `{name}`" for name in failed]
    return "\n".join([*lines, *(["", "Failed:", "", *failures] if failures else [])]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
