"""Make the table in docs/huggingface.md: whose own ``remove_weight_norm()`` works.

    python docs/make_removers_table.py            # print it
    python docs/make_removers_table.py --write    # put it into the page

The models are the small random ones of tests/models/zoo.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from torch import nn

import wn_surgery as wn
from wn_surgery import compat
from wn_surgery.huggingface import unpatch_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "huggingface.md"
START, END = "<!-- removers: start -->", "<!-- removers: end -->"
sys.path.insert(0, str(ROOT / "tests"))

from models.zoo import TRANSFORMERS  # noqa: E402 - it is found by the line above


@torch.no_grad()
def row(family: str) -> tuple[str, ...] | None:
    """What happens to one family; None if the class applies weight norm itself."""
    entry = TRANSFORMERS[family]
    if entry.own is None:
        return None
    model = entry.normed()
    said = own_remover(entry.owners(model))
    model = entry.normed()
    expected = entry.run(model)
    with compat.installed():
        repaired = own_remover(entry.owners(model))
    if repaired == "works":
        repaired = told(torch.equal(entry.run(model), expected))
    model = entry.normed()
    count = len(unpatch_model(model).changed)
    same = torch.equal(entry.run(model), expected) and not any(s.normed for s in wn.sites(model))
    return family, str(count), said, repaired, told(same)


def told(same: bool) -> str:
    """What to say of the outputs after a removal."""
    return "the same bits" if same else "not the same"


def own_remover(owners: list[nn.Module]) -> str:
    """What the model's own method does."""
    try:
        for owner in owners:
            owner.remove_weight_norm()  # type: ignore[operator]
    except ValueError as error:
        return f"`{type(error).__name__}: {str(error).partition('(')[0]}`"
    return "works"


def table() -> str:
    """The table in markdown."""
    head = (
        f"| transformers {transformers.__version__} | weights | its own "
        "| its own in `compat.installed()` | `unpatch_model` |"
    )
    rows = [found for family in TRANSFORMERS if (found := row(family)) is not None]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def main() -> int:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into the page")
    args = parser.parse_args()
    made = table()
    if not args.write:
        print(made)
        return 0
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{made}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
