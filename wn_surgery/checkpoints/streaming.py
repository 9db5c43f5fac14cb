"""Converting safetensors files by streaming: a tensor at a time, in the order of the file."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wn_surgery.checkpoints.atomic import atomic, start_writeback
from wn_surgery.checkpoints.convert import written_shape
from wn_surgery.checkpoints.folding import (
    all_finite,
    computable,
    fold,
    magnitude_of,
    refuse_non_finite,
)
from wn_surgery.checkpoints.header import (
    BITS,
    TORCH,
    name_of,
    written,
)
from wn_surgery.checkpoints.pairs import (
    Options,
    Pair,
    Shape,
    find_pairs,
    keys_for,
)
from wn_surgery.checkpoints.request import Request, unmatched
from wn_surgery.checkpoints.safetensors_file import File, Sink
from wn_surgery.checkpoints.selection import select
from wn_surgery.checkpoints.spectral import Spectral, find_spectral, spectral_weight
from wn_surgery.errors import CheckpointError, CheckpointFileError, UnmatchedRuleError
from wn_surgery.norm.math import g_shape

__all__ = ["Progress", "Stream"]

Progress = Callable[[int], object]
"""Called with the bytes written since the last call."""

CHUNK = 1 << 21
"""Bytes of rows that are folded at a time."""
WRITEBACK = 1 << 25
"""Bytes after which the disk begins with them."""

Maker = Callable[[Sink], None]


@dataclass(frozen=True)
class _Line:
    """One tensor of the output: its line in the header, and what writes its bytes."""

    key: str
    dtype: str
    shape: Shape
    size: int
    write: Maker


class Stream:
    """The files of one checkpoint, to be written in another layout.

    Args:
        files: open; a single one, or the shards.
        asked: what to do.

    Attributes:
        weights: the plain keys of what is converted.
        spectral: those of spectral-normed tensors that become plain.
        kept_spectral: those of spectral-normed tensors that stay as they are.
        kept: those of weight-normed tensors that stay as they are because ``asked.keep`` says so.

    Raises:
        CheckpointError: what is in the files cannot be read for certain.
        UnmatchedRuleError: the rules match nothing.
    """

    def __init__(self, files: Sequence[File], asked: Request) -> None:
        self._asked = asked
        self._owners: dict[str, File] = {}
        for file in files:
            for name in file.entries:
                if name in self._owners:
                    raise CheckpointError(
                        f"{name!r} is in {str(self._owners[name].path)!r} and in {str(file.path)!r}"
                    )
                self._owners[name] = file
        entries = {name: file.entries[name] for name, file in self._owners.items()}
        shapes = {name: entry.shape for name, entry in entries.items()}
        pairs = find_pairs(shapes, dim=asked.dim, known=asked.known, orphans=asked.orphans)
        self.kept = [pair.weight for pair in pairs if pair.weight in asked.keep]
        changed = [pair for pair in pairs if pair.weight not in asked.keep]
        for pair in changed:
            for part in (pair.g, pair.v):
                if not _computable(entries[part].dtype, complex_too=part == pair.v):
                    raise CheckpointError(
                        f"{part!r} is {entries[part].dtype}: expected floating-point; was the "
                        "checkpoint quantized before its weight norm was stripped?"
                    )
        self._pairs = {part: pair for pair in changed for part in (pair.g, pair.v)}
        spectral = find_spectral(shapes)
        strip = "spectral_norm" in asked.also
        self._spectral = (
            {part: one for one in spectral for part in (one.original, one.u, one.v)}
            if strip
            else {}
        )
        paired = {part for pair in pairs for part in (pair.g, pair.v)}
        taken = paired | {part for one in spectral for part in (one.original, one.u, one.v)}
        self._chosen: dict[str, Options] = {}
        if asked.rules is not None:
            free = {
                key: entry.shape
                for key, entry in entries.items()
                if key not in taken
                and ".parametrizations." not in f".{key}"
                and _computable(entry.dtype, complex_too=True)
            }
            self._chosen = select(free, asked.rules, asked.ranks)
        self.weights = [pair.weight for pair in changed] + list(self._chosen)
        self.spectral = [one.weight for one in spectral] if strip else []
        self.kept_spectral = [] if strip else [one.weight for one in spectral]
        if asked.rules is not None and not self.weights:
            raise UnmatchedRuleError(unmatched(asked))
        self._buffer = bytearray()
        self._plans = {file: _aligned(self._lines(file)) for file in files}
        _refuse_doubles([line.key for plan in self._plans.values() for line in plan])

    @property
    def size(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(line.size for plan in self._plans.values() for line in plan)

    def keys(self, file: File) -> list[str]:
        """The keys that the counterpart of a file will have."""
        return [line.key for line in self._plans[file]]

    def write(
        self, file: File, target: Path, progress: Progress | None = None, verify: bool = False
    ) -> None:
        """Write the counterpart of a file; see :func:`wn_surgery.checkpoints.atomic.atomic`.

        Args:
            file: one of the files.
            target: what to write.
            progress: called with the bytes written.
            verify: read it back, and compare each byte with what it should be.

        Raises:
            CheckpointError: the source is not what its header says, or the target cannot be
                written.
            ZeroNormError: a weight that gets weight norm has a slice without a direction.
        """
        with atomic(
            target, like=file.path, check=lambda made: self.check(made, file, verify)
        ) as out:
            self.write_to(out, file, progress)

    def check(self, made: Path, file: File, verify: bool) -> None:
        """Raise unless the counterpart of a file was written whole.

        Args:
            made: the counterpart.
            file: one of the files.
            verify: compare each byte, not only the header and the length.

        Raises:
            CheckpointFileError: it was not.
        """
        with File(made) as found:
            entries = {key: (e.dtype, e.shape, e.size) for key, e in found.entries.items()}
            if entries != {
                line.key: (line.dtype, line.shape, line.size) for line in self._plans[file]
            }:
                raise CheckpointFileError(f"{str(made)!r} was not written as planned; try again")
        if verify:
            with made.open("rb") as written_file:
                self.write_to(_Comparison(written_file), file)

    def write_to(self, out: Sink, file: File, progress: Progress | None = None) -> None:
        """Write the counterpart of a file to an open one.

        Raises:
            CheckpointError: the source is not what its header says.
            OSError: the output cannot be written.
            ZeroNormError: a weight would not be a number.
        """
        plan = self._plans[file]
        head = {line.key: (line.dtype, line.shape, line.size) for line in plan}
        out.write(written(head, file.header.metadata))
        waiting = 0
        for line in plan:
            line.write(out)
            waiting += line.size
            if waiting >= WRITEBACK:
                waiting = 0
                if isinstance(out, io.FileIO):
                    start_writeback(out)
            if progress is not None:
                progress(line.size)

    def _lines(self, file: File) -> Iterator[_Line]:
        for name in file.entries:
            if name in self._pairs:
                yield from self._of_pair(self._pairs[name], name, file)
            elif name in self._spectral:
                yield from self._of_spectral(self._spectral[name], name, file)
            elif name in self._chosen:
                yield from self._split(name, file, self._chosen[name])
            else:
                yield _copied(name, name, file)

    def _of_pair(self, pair: Pair, name: str, file: File) -> Iterator[_Line]:
        if self._asked.to == "plain":
            # The weight takes v's place: of the same size, while g may lie in another file.
            if name == pair.v:
                line = replace(_copied(name, name, file), key=pair.weight)
                if pair.dim == 0 and line.size:
                    yield replace(line, write=lambda out: self._fold_rows(pair, file, out))
                else:
                    yield _computed(pair.weight, line, lambda: self._folded(pair))
            return
        line = _copied(name, keys_for(pair.weight, self._asked.to)[name == pair.v], file)
        if name == pair.g:
            v = self._owners[pair.v].entries[pair.v].shape
            line = replace(line, shape=written_shape(line.shape, v, pair))
        yield line

    def _fold_rows(self, pair: Pair, file: File, out: Sink) -> None:
        """Fold some rows at a time: they have norms of their own, and stay in the cache."""
        entry = file.entries[pair.v]
        dtype, shape = TORCH[entry.dtype], entry.shape
        g = self._owners[pair.g].tensor(pair.g).reshape(g_shape(shape, 0))
        row = entry.size // shape[0]
        step = max(1, CHUNK // row)
        if len(self._buffer) < step * row:
            self._buffer = bytearray(step * row)
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            view = memoryview(self._buffer)[: count * row]
            file.read_into(view, entry.start + start * row)
            v = torch.frombuffer(view, dtype=torch.uint8).view(dtype).reshape(count, *shape[1:])
            part = g[start : start + count]
            w = fold(part, v, pair.options)
            if self._asked.non_finite == "error" and not all_finite(w):
                self._folded(pair)  # which raises, and counts them all
            _write_tensor(out, w)

    def _folded(self, pair: Pair) -> Tensor:
        g, v = (self._owners[part].tensor(part) for part in (pair.g, pair.v))
        w = fold(g, v, pair.options)
        if self._asked.non_finite == "error":
            refuse_non_finite(w, g, v, pair)
        return w

    def _of_spectral(self, one: Spectral, name: str, file: File) -> Iterator[_Line]:
        if name != one.original:
            return

        def weight() -> Tensor:
            u, v = (self._owners[part].tensor(part) for part in (one.u, one.v))
            return spectral_weight(file.tensor(name), u, v, name, self._asked.dim)

        yield _computed(one.weight, _copied(name, name, file), weight)

    def _split(self, name: str, file: File, options: Options) -> Iterator[_Line]:
        entry = file.entries[name]
        g, v = keys_for(name, self._asked.to)
        dtype = name_of(TORCH[entry.dtype].to_real())
        shape = g_shape(entry.shape, options.dim)
        size = BITS[dtype] // 8
        for length in shape:
            size *= length
        yield _computed(
            g,
            _Line(g, dtype, shape, size, _nothing),
            lambda: magnitude_of(file.tensor(name), name, options),
        )
        yield _copied(name, v, file)


class _Comparison:
    """Takes what would be written, and compares it with what is there."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """Compare the next bytes.

        Raises:
            CheckpointFileError: they are other ones.
        """
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            expected = view[start : start + CHUNK]
            if self._file.read(len(expected)) != expected:
                raise CheckpointFileError(
                    f"what was read back from {self._file.name!r} is not what was written: the "
                    "disk or the memory is at fault; nothing was changed"
                )
        return len(view)


def _computable(dtype: str, complex_too: bool) -> bool:
    return dtype in TORCH and computable(TORCH[dtype], complex_too=complex_too)


def _copied(name: str, key: str, file: File) -> _Line:
    entry = file.entries[name]
    return _Line(key, entry.dtype, entry.shape, entry.size, lambda out: file.copy(name, out))


def _computed(key: str, like: _Line, make: Callable[[], Tensor]) -> _Line:
    return replace(like, key=key, write=lambda out: _write_tensor(out, make()))


def _nothing(_out: Sink) -> None:
    """Stands in a line that gets its bytes from elsewhere."""


def _write_tensor(out: Sink, tensor: Tensor) -> None:
    tensor = tensor.contiguous()
    if tensor.nbytes:
        # torch gives bytes only through numpy, which the core does without.
        array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        out.write(memoryview(array).cast("B"))


def _aligned(lines: Iterator[_Line]) -> list[_Line]:
    """The lines in their order if each then begins at a multiple of its item, or by item size."""
    plan, place = list(lines), 0
    for line in plan:
        if place % max(1, BITS[line.dtype] // 8):
            return sorted(plan, key=lambda each: -BITS[each.dtype])
        place += line.size
    return plan


def _refuse_doubles(keys: list[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise CheckpointError(f"two tensors would be called {key!r}; rename one of them")
        seen.add(key)
