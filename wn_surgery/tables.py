"""Aligned text tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["render"]


def render(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under a rule; columns that are empty in every row are dropped.

    Example:
        >>> from wn_surgery.tables import render
        >>> print(render(["site", "dim", "note"], [["a.weight", "0", ""], ["b.weight", "1", ""]]))
        site      dim
        --------  ---
        a.weight  0
        b.weight  1
    """
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    table = [[headers[i] for i in used], *([row[i] for i in used] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(used))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
