"""What is in a checkpoint, and what would go wrong with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wn_surgery.checkpoints.pairs import Axes, Pair, Shape, examine
from wn_surgery.checkpoints.plan import unfoldable
from wn_surgery.checkpoints.reading import State, opened
from wn_surgery.checkpoints.spectral import axes_of_spectral, find_spectral, spectral_weight
from wn_surgery.errors import CheckpointError
from wn_surgery.norm.math import norm_except, real_dtype
from wn_surgery.norm.options import dtype_name
from wn_surgery.tables import render

__all__ = ["CheckpointFinding", "Finding", "Inspection", "NormedTensor", "inspect"]


@dataclass(frozen=True)
class NormedTensor:
    """One weight-normed or spectral-normed tensor.

    Attributes:
        name: its plain key; before it, where there are several state dicts, which one.
        norm: ``"weight"`` or ``"spectral"``.
        layout: ``"legacy"`` or ``"parametrized"``.
        dtype: v's, without ``torch.``.
        shape: the weight's.
        dim: the axes that keep a norm of their own; for spectral norm the axis of the rows, or
            None where shapes do not tell.
        g: least, mean and greatest magnitude; None for spectral norm and without elements.
        zero_slices: slices of v with no direction.
        non_finite: NaN and infinite numbers in g and v.
        g_values: every magnitude, float32, one axis; None where ``g`` is.
        v_norm_values: every ‖v‖, likewise.
    """

    name: str
    norm: Literal["weight", "spectral"]
    layout: str
    dtype: str
    shape: tuple[int, ...]
    dim: Any
    g: tuple[float, float, float] | None = None
    zero_slices: int = 0
    non_finite: int = 0
    g_values: Tensor | None = field(default=None, repr=False, compare=False)
    v_norm_values: Tensor | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, without the values."""
        names = [each.name for each in dataclasses.fields(self) if each.compare]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class CheckpointFinding:
    """Something that goes wrong, or may.

    Attributes:
        severity: ``"error"`` where stripping is refused or gives NaN, else ``"warning"``.
        kind: ``"orphan"``, ``"shape"``, ``"ambiguous"``, ``"stacked"``, ``"twice"``,
            ``"record"``, ``"zero"``, ``"non-finite"``, ``"dtype"``, ``"layouts"`` or
            ``"spectral"``.
        name: the tensor.
        message: a sentence.
    """

    severity: Literal["error", "warning"]
    kind: str
    name: str
    message: str


Finding = CheckpointFinding
"""The public name; :mod:`wn_surgery.export` has findings of its own."""


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint; ``print`` it.

    Attributes:
        tensors: the normed ones.
        plain: how many other tensors there are.
        findings: what goes wrong, or may.
        others: the shapes of the other tensors, by their names.
    """

    tensors: tuple[NormedTensor, ...]
    plain: int
    findings: tuple[CheckpointFinding, ...]
    others: Mapping[str, Shape] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sound(self) -> bool:
        """Whether nothing is an error."""
        return all(each.severity != "error" for each in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, without ``others``."""
        return {
            "tensors": [each.to_dict() for each in self.tensors],
            "plain": self.plain,
            "findings": [dataclasses.asdict(each) for each in self.findings],
        }

    def __str__(self) -> str:
        rows = [
            (
                each.name,
                each.norm if each.norm != "weight" else "",
                each.layout,
                "×".join(map(str, each.shape)) or "scalar",
                each.dtype,
                str(each.dim),
                *("" if each.g is None else f"{part:.4g}" for part in each.g or (0, 0, 0)),
                str(each.zero_slices or ""),
                str(each.non_finite or ""),
            )
            for each in self.tensors
        ]
        headers = ["tensor", "norm", "layout", "shape", "dtype", "dim"]
        headers += ["g min", "g mean", "g max", "zero slices", "non-finite"]
        table = [render(headers, rows)] if rows else []
        spectral = sum(each.norm == "spectral" for each in self.tensors)
        more = f", {spectral} spectral-normed" if spectral else ""
        weight = f"{len(self.tensors) - spectral} weight-normed"
        return "\n".join([*table, f"{weight}{more}, {self.plain} others"])


def inspect(
    path: str | os.PathLike[str], *, dim: Axes = "auto", full_pickle: bool = False
) -> Inspection:
    """Look at every tensor that has weight norm, and for what would go wrong with it.

    Args:
        path: as in :func:`wn_surgery.checkpoints.convert_file`.
        dim: the axes to take where g's shape fits several.
        full_pickle: as in :func:`wn_surgery.checkpoints.convert_file`.

    Returns:
        What is there. Pairs that cannot be read are findings, and do not raise.

    Raises:
        CheckpointError: the file itself cannot be read, or is not sound.

    Example:
        >>> import tempfile, torch
        >>> import wn_surgery as wn
        >>> state = {"weight_g": torch.tensor([[5.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(state, f"{folder}/a.pt")
        ...     print(wn.checkpoints.inspect(f"{folder}/a.pt"))
        tensor  layout  shape  dtype    dim  g min  g mean  g max
        ------  ------  -----  -------  ---  -----  ------  -----
        weight  legacy  1×2    float32  0    5      5       5
        1 weight-normed, 0 others
    """
    tensors: list[NormedTensor] = []
    findings: list[CheckpointFinding] = []
    others: dict[str, Shape] = {}
    with opened(Path(path), full_pickle=full_pickle) as states:
        for state in states:
            pairs, problems = examine(state.shapes, dim=dim, known=state.known)
            findings += [_error(e.kind, state.path + e.key, e.message) for e in problems]
            findings += _of_state(state, pairs)
            for pair in pairs:
                row, said = _look(state, pair)
                tensors.append(row)
                findings += said
            spectral, parts, said = _spectral(state, dim)
            tensors += spectral
            findings += said
            parts |= {key for pair in pairs for key in (pair.g, pair.v)}
            others |= {state.path + k: shape for k, shape in state.shapes.items() if k not in parts}
    return Inspection(tuple(tensors), len(others), tuple(findings), others)


def _error(kind: str, name: str, message: str) -> CheckpointFinding:
    return CheckpointFinding("error", kind, name, message)


def _of_state(state: State, pairs: list[Pair]) -> Iterator[CheckpointFinding]:
    layouts = {pair.layout: pair for pair in pairs}
    if len(layouts) > 1:
        one, other = layouts.values()
        said = " and ".join(f"{pair.weight!r} is {pair.layout}" for pair in (one, other))
        message = f"{said}, as after an interrupted migration; convert it to one of them"
        yield CheckpointFinding("warning", "layouts", state.path + other.weight, message)
    there = {pair.weight for pair in pairs}
    for weight in state.known if state.is_model else ():
        if weight not in there and weight not in state.shapes:
            message = f"{weight!r} is in the record, but not in the checkpoint, which is not whole"
            yield _error("record", state.path + weight, message)


def _look(state: State, pair: Pair) -> tuple[NormedTensor, list[CheckpointFinding]]:
    name = state.path + pair.weight
    g_kind, v_kind = state.kinds[pair.g], state.kinds[pair.v]
    dtype = str(v_kind).removeprefix("torch.")
    row = NormedTensor(name, "weight", pair.layout, dtype, state.shapes[pair.v], pair.dim)
    if said := unfoldable(g_kind, v_kind):
        return row, [_error("dtype", name, f"g and v of {name!r} {said}")]
    g, v = state.read(pair.g), state.read(pair.v)
    if g.is_meta or v.is_meta:
        message = f"g or v of {name!r} is on the meta device, without values"
        return row, [_error("dtype", name, message)]
    found: list[CheckpointFinding] = []
    if g.dtype != real_dtype(v.dtype):
        message = (
            f"g of {name!r} is {dtype_name(g.dtype)}, v is {dtype}: stripping computes in the "
            "wider one, a live model promotes or raises"
        )
        found.append(CheckpointFinding("warning", "dtype", name, message))
    if count := _not_finite(g) + _not_finite(v):
        message = f"{name!r} has {count} numbers that are NaN or infinite, and would keep them"
        found.append(_error("non-finite", name, message))
    wide = v if v.dtype in (torch.float32, torch.float64) or v.is_complex() else v.float()
    norms = norm_except(wide, pair.dim) if v.numel() else torch.empty(0)
    zero = int((norms == 0).sum())
    if zero and pair.options.eps == 0.0:
        message = f"{name!r} has {zero} slices along dim={pair.dim} where v/‖v‖ is not a number"
        found.append(_error("zero", name, message))
    three = (float(g.min()), float(g.double().mean()), float(g.max())) if g.numel() else None
    row = dataclasses.replace(row, g=three, zero_slices=zero, non_finite=count)
    if three is None:
        return row, found
    values = g.float().flatten(), norms.float().flatten()
    return dataclasses.replace(row, g_values=values[0], v_norm_values=values[1]), found


def _not_finite(tensor: Tensor) -> int:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return int((~torch.isfinite(tensor)).sum())


def _spectral(
    state: State, dim: Axes
) -> tuple[list[NormedTensor], set[str], list[CheckpointFinding]]:
    try:
        found = find_spectral(state.shapes)
    except CheckpointError as error:
        return [], set(), [_error("spectral", state.path, str(error))]
    rows: list[NormedTensor] = []
    said: list[CheckpointFinding] = []
    for one in found:
        name, shape = state.path + one.weight, state.shapes[one.original]
        axes = axes_of_spectral(*(state.shapes[part] for part in one.parts))
        only = axes[0] if len(axes) == 1 else None
        dtype = str(state.kinds[one.original]).removeprefix("torch.")
        rows.append(NormedTensor(name, "spectral", one.layout, dtype, shape, only))
        try:
            spectral_weight(map(state.read, one.parts), one.original, dim)
        except CheckpointError as error:
            said.append(_error("spectral", name, str(error)))
    return rows, {key for one in found for key in one.parts}, said
