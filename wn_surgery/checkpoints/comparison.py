"""Whether two checkpoints hold the same weights, whatever their layouts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from wn_surgery.checkpoints.folding import compute
from wn_surgery.checkpoints.io.torch_file import not_dense, same_bits
from wn_surgery.checkpoints.pairs import Axes
from wn_surgery.checkpoints.plan import plan
from wn_surgery.checkpoints.reading import State, opened
from wn_surgery.checkpoints.request import Request
from wn_surgery.differences import Difference, difference
from wn_surgery.errors import CheckpointError
from wn_surgery.tables import render

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ; ``print`` it.

    Attributes:
        same: how many weights have the same bits.
        differing: those that have not.
        shapes: those of other shapes: name, the one, the other.
        only_first: names that the second does not have.
        only_second: names that the first does not have.
    """

    same: int
    differing: tuple[Difference, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def equal(self, atol: float = 0.0) -> bool:
        """Whether both hold the same weights, up to ``atol``; with 0 every bit counts."""
        return not (self.shapes or self.only_first or self.only_second) and all(
            each.max_abs <= atol and atol > 0 for each in self.differing
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "same": self.same,
            "differing": [each.to_dict() for each in self.differing],
            "shapes": [[name, list(one), list(other)] for name, one, other in self.shapes],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
        }

    def __str__(self) -> str:
        rows = []
        for each in self.differing:
            shape = "×".join(map(str, each.shape))
            sizes = f"{each.max_abs:.3g}", f"{each.max_ulp:.3g}", str(each.differing)
            rows.append((each.name, shape, each.dtype, *sizes))
        headers = ["tensor", "shape", "dtype", "max abs", "max ulp", "differing"]
        lines = [render(headers, rows)] if rows else []
        lines += [
            f"{name}: {one} in the first, {other} in the second" for name, one, other in self.shapes
        ]
        lines += [f"{name}: only in the first" for name in self.only_first]
        lines += [f"{name}: only in the second" for name in self.only_second]
        lines.append(f"{self.same} the same, {len(self.differing)} differing")
        return "\n".join(lines)


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    dim: Axes = "auto",
    full_pickle: bool = False,
) -> Comparison:
    """Compare the weights of two checkpoints, bit by bit.

    g and v are folded, spectral norm is taken off, and the names are those of plain weights. Of
    containers, the state dicts of models are compared: where each side has but one, whatever it
    is called there; otherwise by their names in the container.

    Args:
        first: as in :func:`wn_surgery.checkpoints.convert_file`.
        second: the same.
        dim: the axes to take where g's shape fits several.
        full_pickle: as in :func:`wn_surgery.checkpoints.convert_file`.

    Returns:
        What differs, and by how much.

    Raises:
        CheckpointError: one of them cannot be read.

    Example:
        >>> import tempfile, torch
        >>> import wn_surgery as wn
        >>> state = {"weight_g": torch.tensor([[10.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": state}, f"{folder}/a.ckpt")
        ...     torch.save({"weight": torch.tensor([[6.0, 8.0]])}, f"{folder}/b.pt")
        ...     print(wn.checkpoints.compare(f"{folder}/a.ckpt", f"{folder}/b.pt"))
        1 the same, 0 differing
    """
    with (
        opened(Path(first), full_pickle=full_pickle) as one_states,
        opened(Path(second), full_pickle=full_pickle) as other_states,
    ):
        both = one_states, other_states
        alone = all(sum(state.is_model for state in states) == 1 for states in both)
        one, other = (_readers(states, alone, dim) for states in both)
        same = 0
        differing: list[Difference] = []
        shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        for name in one:
            if name not in other:
                continue
            a, b = one[name](), other[name]()
            if a.shape != b.shape:
                shapes.append((name, tuple(a.shape), tuple(b.shape)))
            elif same_bits(a, b):
                same += 1
            else:
                differing.append(difference(name, a, b))
        return Comparison(
            same,
            tuple(differing),
            tuple(shapes),
            tuple(name for name in one if name not in other),
            tuple(name for name in other if name not in one),
        )


def _readers(states: list[State], alone: bool, dim: Axes) -> dict[str, Callable[[], Tensor]]:
    """What computes each plain weight, by its name."""
    asked = Request(dim=dim, also=frozenset({"spectral_norm"}), orphans="keep", non_finite="keep")
    return {
        ("" if alone else state.path) + line.key: partial(
            compute, line, partial(_read, state), asked
        )
        for state in states
        if state.is_model or not any(each.is_model for each in states)
        for place in plan(state.shapes, state.kinds, asked, state.known).lines.values()
        for line in place
    }


def _read(state: State, name: str) -> Tensor:
    tensor = state.read(name)
    if what := not_dense(tensor):
        raise CheckpointError(
            f"{state.path}{name!r} is {what}: its values cannot be compared; leave it out of both"
        )
    return tensor
