"""The table in docs/scaling.md: what weight norm adds to memory and to what is sent, by engine.

    python -m benchmarks.scaling            # writes the table; --check only compares

Computed from the library's own plan of Llamas on meta: shapes say what g takes, which computed
weights autograd keeps, and which tensors collectives are given. ``tests/distributed/test_costs.py``
compares the same functions with what two processes keep and send in a step of a small model.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import wn_surgery as wn
from benchmarks.report import ROOT
from benchmarks.scale import LLAMAS, llama
from wn_surgery.norm.math import g_shape
from wn_surgery.norm.options import kept_axes

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- costs: begin -->\n", "<!-- costs: end -->\n"
RULES = {"types": "Linear", "names": "model.layers.**"}
STYLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}
"""The axis along which tensor parallelism cuts a weight, by the last part of its module's name."""
TOKENS = 8192
STATE = 4 * 4
"""Bytes an element: the parameter, its gradient and AdamW's two moments, in float32."""


@dataclass(frozen=True)
class Engine:
    """How a model is spread.

    Attributes:
        name: as in the table.
        tp: the ranks that tensor parallelism cuts weights for.
        shards: the ranks of FSDP2; 1 without it.
        ddp: whether DDP averages gradients.
        width: bytes an element of what forwards compute with.
    """

    name: str
    tp: int = 1
    shards: int = 1
    ddp: bool = False
    width: int = 4


ENGINES = (
    Engine("DDP", ddp=True),
    Engine("FSDP2, 64 ranks, bfloat16", shards=64, width=2),
    Engine("TP 8", tp=8),
    Engine("TP 8 × FSDP2 64, bfloat16", tp=8, shards=64, width=2),
)


@dataclass(frozen=True)
class Cost:
    """Bytes of a rank: kept, and given to collectives in a step (forward and backward)."""

    state: float = 0.0
    sent: float = 0.0
    weights: float = 0.0
    weights_of_a_block: float = 0.0


def block_of(name: str) -> str:
    """The unit that is sharded, and checkpointed, by itself: what is in a numbered list."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def costs(
    model: nn.Module,
    rules: Any,
    engine: Engine,
    styles: Mapping[str, int] = STYLES,
    tokens: int = TOKENS,
) -> tuple[Cost, Cost]:
    """What a step of the plain model takes on each rank, and what weight norm adds.

    Activations of data are not in it: they are the same with weight norm and without. What is sent
    is counted by the tensor that a collective is given: the whole one of an all-gather or a
    reduce-scatter, and the tensor of an all-reduce.
    """
    steps = {step.site.name: step for step in wn.plan(model, rules).changes}
    plain: dict[str, float] = defaultdict(float)
    added: dict[str, float] = defaultdict(float)
    blocks: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        module, _, _ = name.rpartition(".")
        axis = styles.get(module.rpartition(".")[2]) if parameter.ndim == 2 else None
        own = parameter.numel() / (1 if axis is None else engine.tp)
        if parameter.ndim == 1 and styles.get(module.rpartition(".")[2]) == 0:
            own /= engine.tp  # a bias, cut with the rows
        block = block_of(name)
        _count(plain, own, block, engine)
        if axis is not None and engine.tp > 1:
            # Rows: the gradients of the input are summed. Columns: the outputs are.
            plain["sent"] += engine.width * tokens * parameter.shape[1 - axis]
        if (step := steps.get(name)) is None:
            continue
        assert step.norm is not None
        kept = axis is None or axis in kept_axes(step.norm.dim)
        g = math.prod(g_shape(step.site.shape, step.norm.dim))
        own_g = g / (engine.tp if kept and axis is not None else 1)
        _count(added, own_g, block, engine)
        if not kept and engine.tp > 1:
            added["sent"] += 2 * 4 * g  # forward and backward, in float32
        added["weights"] += engine.width * own
        blocks[block] += engine.width * own
    root = blocks.pop("", 0.0)
    added["weights_of_a_block"] = root + max(blocks.values(), default=0.0)
    return Cost(**plain), Cost(**added)


def _count(cost: dict[str, float], own: float, block: str, engine: Engine) -> None:
    """Add a parameter of which a rank of tensor parallelism has ``own`` elements."""
    cost["state"] += STATE * own / engine.shards
    if engine.ddp:
        cost["sent"] += 4 * own
    if engine.shards > 1:
        # Gathered for the forward and, but for the root, again for the backward; then reduced.
        cost["sent"] += engine.width * own * (3 if block else 2)


def rows() -> Iterable[str]:
    """The lines of the table."""
    columns = "Llama", "engine", "state", "g's", "weights", "a block's", "sent", "added"
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for size, config in LLAMAS.items():
        model = llama(**config)
        for engine in ENGINES:
            plain, added = costs(model, RULES, engine)
            numbers = (
                plain.state, added.state, added.weights, added.weights_of_a_block,
                plain.sent, added.sent,
            )  # fmt: skip
            yield f"| {size} | {engine.name} | {' | '.join(map(readable, numbers))} |"


def readable(size: float) -> str:
    """Bytes in the unit that leaves up to four digits."""
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000 or unit == "GB":
            break
    return f"{size:,.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"


def updated(page: str) -> str:
    """Put the table between its markers in the page."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(rows())
    return f"{before}{BEGIN}\n{table}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or check it; the exit status is 1 if it was out of date under --check."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    page = args.page.read_text(encoding="utf-8")
    new = updated(page)
    if args.check:
        return int(new != page)
    args.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
