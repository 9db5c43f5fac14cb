"""safetensors files: headers that may be hostile, and conversion by streaming."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wn_surgery.errors import CheckpointError

from .atomic import atomic
from .convert import fold
from .pairs import Pair, keys_for

__all__ = ["Entry", "File", "convert_opened", "open_file"]

MAX_HEADER = 100_000_000
CHUNK = 1 << 24
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor's line in a header; ``start`` and ``end`` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass
class File:
    """An open file whose header has been checked.

    Attributes:
        path: where it is.
        descriptor: open for reading.
        entries: the tensors, in the order of the header.
        metadata: the header's ``__metadata__``, or None.
    """

    path: Path
    descriptor: int
    entries: dict[str, Entry]
    metadata: dict[str, str] | None
    _map: mmap.mmap | None = field(default=None, repr=False)

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``; its memory is the file's, mapped privately.

        Returns:
            In the dtype and shape of the header.
        """
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY)
        raw = torch.frombuffer(
            self._map, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start
        )
        if entry.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(entry.shape)

    def close(self) -> None:
        """Close the descriptor; the map lives as long as the tensors of it."""
        os.close(self.descriptor)


def open_file(path: Path) -> File:
    """Open a file and check its header.

    Args:
        path: a safetensors file, from anywhere.

    Returns:
        The open file.

    Raises:
        CheckpointError: it cannot be read, or its header is not what the format allows.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    try:
        entries, metadata = _header(descriptor)
    except CheckpointError as error:
        os.close(descriptor)
        raise CheckpointError(f"{str(path)!r} is no sound safetensors file: {error}") from None
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    return File(path, descriptor, entries, metadata)


def _header(descriptor: int) -> tuple[dict[str, Entry], dict[str, str] | None]:
    size = os.fstat(descriptor).st_size
    first = os.pread(descriptor, 8, 0)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(MAX_HEADER, size - 8):
        raise CheckpointError(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(
            os.pread(descriptor, length, 8).decode(), object_pairs_hook=_no_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise CheckpointError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError("__metadata__ has to be text by text")
    try:
        json.dumps([list(header), metadata], ensure_ascii=False).encode()
    except UnicodeError:
        raise CheckpointError("a name in its header is no Unicode text") from None
    entries = {name: _entry(name, line, 8 + length) for name, line in header.items()}
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != place:
            raise CheckpointError(f"{name!r} begins at {entry.start}, where {place} was expected")
        place = entry.end
    if place != size:
        raise CheckpointError(f"its tensors end at {place}, the file at {size}")
    return entries, metadata


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a key is there twice")
    return found


def _entry(name: str, line: Any, base: int) -> Entry:
    if not isinstance(line, dict) or set(line) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = line["dtype"], line["shape"], line["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number < 1 << 62 for number in numbers
        ):
            raise CheckpointError(f"{name!r} has a shape or offsets that are no sizes")
    if len(offsets) != 2 or len(shape) > 64:
        raise CheckpointError(f"{name!r} needs two offsets and at most 64 axes")
    start, end = offsets
    if math.prod(size for size in shape if size) >= 1 << 62:
        raise CheckpointError(f"{name!r} has a shape that no memory holds")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f"{name!r} has {end - start} bytes, which is not its shape's size")
    return Entry(dtype, tuple(shape), base + start, base + end)


Writer = Callable[[int], None]


def convert_opened(
    file: File,
    target: Path,
    pairs: list[Pair],
    to: str,
    others: dict[str, File],
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Write one file in another layout, a tensor at a time.

    Args:
        file: the source.
        target: the file to write; see :func:`wn_surgery.checkpoints.atomic.atomic`.
        pairs: those of the whole checkpoint.
        to: the layout.
        others: the file of every tensor of the checkpoint: g may lie in another shard than v.
        progress: called with the bytes written since the last call.

    Returns:
        The keys of the new file. A weight goes where its v was.

    Raises:
        CheckpointError: a key is taken, or the file cannot be written.
    """
    by_g = {pair.g: pair for pair in pairs}
    by_v = {pair.v: pair for pair in pairs}
    lines: dict[str, Any] = {} if file.metadata is None else {"__metadata__": file.metadata}
    writers: list[tuple[Writer, int]] = []
    place = 0
    for name, entry in sorted(file.entries.items(), key=lambda item: item[1].start):
        new, writer = name, _copier(file.descriptor, entry)
        if name in by_g:
            if to == "plain":
                continue
            new = keys_for(by_g[name].weight, to)[0]
        elif name in by_v:
            pair = by_v[name]
            new = pair.weight if to == "plain" else keys_for(pair.weight, to)[1]
            if to == "plain":
                writer = _folder(others[pair.g], file, pair)
        if new in lines:
            raise CheckpointError(f"two tensors would be called {new!r}; rename one of them")
        size = entry.end - entry.start
        lines[new] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [place, place + size],
        }
        writers.append((writer, size))
        place += size
    text = json.dumps(lines, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(target, like=file.path) as out:
        _write(out, memoryview(len(text).to_bytes(8, "little") + text))
        for writer, size in writers:
            writer(out)
            if progress is not None:
                progress(size)
    return [name for name in lines if name != "__metadata__"]


def _write(out: int, data: memoryview) -> None:
    while data:
        data = data[os.write(out, data) :]


def _copier(descriptor: int, entry: Entry) -> Writer:
    def copy(out: int) -> None:
        place = entry.start
        while place < entry.end:
            count = os.sendfile(out, descriptor, place, min(CHUNK, entry.end - place))
            if count == 0:
                raise CheckpointError("the input became shorter while it was read")
            place += count

    return copy


def _folder(g_file: File, v_file: File, pair: Pair) -> Writer:
    def compute(out: int) -> None:
        weight = fold(g_file.tensor(pair.g), v_file.tensor(pair.v), pair.dim).contiguous()
        size = weight.numel() * weight.itemsize
        if size:
            # torch gives bytes only through numpy, which the core does without.
            array = (ctypes.c_char * size).from_address(weight.data_ptr())
            _write(out, memoryview(array).cast("B"))

    return compute
