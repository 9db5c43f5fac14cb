"""Converting safetensors files by streaming: a tensor at a time, in the order of the file."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wn_surgery.checkpoints.folding import all_finite, compute, fold, held_by
from wn_surgery.checkpoints.io.atomic import start_writeback
from wn_surgery.checkpoints.io.distributed import Part
from wn_surgery.checkpoints.io.header import BITS, NAMES, TORCH, written
from wn_surgery.checkpoints.io.safetensors_file import CHUNK as COPIED
from wn_surgery.checkpoints.io.safetensors_file import File, Sink, owners_of, write_tensor
from wn_surgery.checkpoints.plan import Line, plan
from wn_surgery.checkpoints.request import Request
from wn_surgery.errors import CheckpointError, CheckpointFileError
from wn_surgery.norm.math import g_shape
from wn_surgery.norm.options import dtype_name

__all__ = ["Cost", "Progress", "Stream"]

Progress = Callable[[int], object]
"""Called with the bytes written since the last call."""

CHUNK = 1 << 21
"""Bytes of rows that are folded at a time."""
WRITEBACK = 1 << 25
"""Bytes after which the disk begins with them."""


@dataclass(frozen=True)
class Cost:
    """What a conversion takes, as shapes and dtypes tell it.

    Attributes:
        read: bytes of tensors that are read.
        written: bytes of tensors that are written.
        memory: the most bytes of tensors that are in memory at once.
    """

    read: int = 0
    written: int = 0
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        memory = max(self.memory, other.memory)
        return Cost(self.read + other.read, self.written + other.written, memory)


class Stream:
    """The files of one checkpoint, or a part of a distributed one: planned together."""

    def __init__(self, files: Sequence[File] | Sequence[Part], asked: Request) -> None:
        self._asked = asked
        self._owners = owners_of(files)
        entries = {name: file.entries[name] for name, file in self._owners.items()}
        shapes = {name: entry.shape for name, entry in entries.items()}
        self.plan = plan(shapes, {k: e.kind for k, e in entries.items()}, asked, asked.known)
        lines = {f: [line for name in f.entries for line in self.plan.lines[name]] for f in files}
        self._lines = {file: _aligned(each) for file, each in lines.items()}
        self._buffer = bytearray()

    @property
    def size(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(_size(line) for lines in self._lines.values() for line in lines)

    @property
    def cost(self) -> Cost:
        """What writing all counterparts takes."""
        return sum((self._cost(line) for each in self._lines.values() for line in each), Cost())

    def _cost(self, line: Line) -> Cost:
        entries = [self._owners[source].entries[source] for source in line.sources]
        sizes, held = [entry.size for entry in entries], max(entry.held for entry in entries)
        if self._by_rows(line):
            # The rows, what they become, and in half precision three copies of twice the size.
            memory = sizes[0] + 8 * min(max(CHUNK, sizes[1] // line.shape[0]), sizes[1])
        elif line.do == "copy" and isinstance(self._owners[line.sources[0]], File):
            memory = min(sizes[0], COPIED)
        else:
            memory = max(held, held_by(line, sizes, _size(line)))
        return Cost(sum(sizes), _size(line), memory)

    def _by_rows(self, line: Line) -> bool:
        of_file = isinstance(self._owners[line.sources[-1]], File)
        return line.do == "fold" and line.options.dim == 0 and _size(line) > 0 and of_file

    def keys(self, file: File | Part) -> list[str]:
        """The keys that the counterpart of a file will have."""
        return [line.key for line in self._lines[file]]

    def check(self, made: Path, file: File | Part, verify: bool) -> None:
        """Raise unless the counterpart of a file was written whole; ``verify``: byte for byte."""
        with File(made) as found:
            head = {key: (e.dtype, e.shape, e.size) for key, e in found.entries.items()}
            if head != self._head(file):
                raise CheckpointFileError(f"{str(made)!r} was not written as planned; try again")
        if verify:
            with made.open("rb") as written_file:
                self.write(_Comparison(written_file), file)

    def write(self, out: Sink, file: File | Part, progress: Progress | None = None) -> None:
        """Write the counterpart of a file to an open one."""
        out.write(written(self._head(file), file.metadata))
        waiting = 0
        for line in self._lines[file]:
            self._write(line, out)
            waiting += _size(line)
            if waiting >= WRITEBACK:
                waiting = 0
                if isinstance(out, io.FileIO):
                    start_writeback(out)
            if progress is not None:
                progress(_size(line))

    def _head(self, file: File | Part) -> dict[str, tuple[str, tuple[int, ...], int]]:
        return {line.key: (_dtype(line), line.shape, _size(line)) for line in self._lines[file]}

    def _tensor(self, name: str) -> Tensor:
        return self._owners[name].tensor(name)

    def lines(self, file: File | Part) -> list[Line]:
        """What the counterpart of a file is made of."""
        return self._lines[file]

    def tensors(self, file: File | Part) -> dict[str, Callable[[], Tensor]]:
        """What computes each tensor of the counterpart of a file."""
        return {
            line.key: functools.partial(compute, line, self._tensor, self._asked)
            for line in self._lines[file]
        }

    def _write(self, line: Line, out: Sink) -> None:
        file = self._owners[line.sources[-1]]
        if line.do == "copy":
            file.copy(line.sources[0], out)
        elif self._by_rows(line):
            self._fold_rows(line, cast("File", file), out)
        else:
            write_tensor(out, compute(line, self._tensor, self._asked))

    def _fold_rows(self, line: Line, file: File, out: Sink) -> None:
        """Fold some rows at a time: they have norms of their own, and stay in the cache."""
        g_key, v_key = line.sources
        shape = line.shape
        entry = file.entries[v_key]
        g = self._tensor(g_key).reshape(g_shape(shape, 0))
        row = entry.size // shape[0]
        step = max(1, CHUNK // row)
        if len(self._buffer) < step * row:
            self._buffer = bytearray(step * row)
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            view = memoryview(self._buffer)[: count * row]
            file.read_into(view, entry.start + start * row)
            v = torch.frombuffer(view, dtype=torch.uint8).view(TORCH[entry.dtype])
            w = fold(g[start : start + count], v.reshape(count, *shape[1:]), line.options)
            if self._asked.non_finite == "error" and not all_finite(w):
                compute(line, self._tensor, self._asked)  # which raises, and counts them all
            write_tensor(out, w)


class _Comparison:
    """Takes what would be written, and compares it with what is there."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """Compare the next bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            expected = view[start : start + CHUNK]
            if self._file.read(len(expected)) != expected:
                raise CheckpointFileError(
                    f"what was read back from {self._file.name!r} is not what was written: the "
                    "disk or the memory is at fault; nothing was changed"
                )
        return len(view)


def _dtype(line: Line) -> str:
    if not isinstance(line.kind, torch.dtype):
        return str(line.kind)
    if line.kind not in NAMES:  # of a distributed checkpoint
        said = f"{line.key!r} is {dtype_name(line.kind)}, which a safetensors file cannot hold"
        raise CheckpointError(f"{said}; write a folder instead")
    return NAMES[line.kind]


def _size(line: Line) -> int:
    return math.prod(line.shape) * BITS[_dtype(line)] // 8


def _aligned(lines: list[Line]) -> list[Line]:
    """The lines in their order if each then begins at a multiple of its item, or by item size."""
    place = 0
    for line in lines:
        if place % max(1, BITS[_dtype(line)] // 8):
            return sorted(lines, key=lambda each: -BITS[_dtype(each)])
        place += _size(line)
    return lines
