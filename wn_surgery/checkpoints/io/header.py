"""The header of a safetensors file, which may be hostile.

8 bytes with the length N of the header, N bytes of JSON, then the tensors without a gap
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from wn_surgery.errors import CheckpointError

__all__ = ["BITS", "NAMES", "TORCH", "Entry", "read_header", "written"]

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""

TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TORCH.items()}
# Those that only some releases of torch have are copied, never computed with.
BITS = {name: 8 * dtype.itemsize for name, dtype in TORCH.items()}
BITS |= {"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class Entry:
    """One tensor's line in a header; its places count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def held(self) -> int:
        """Bytes of memory that reading it takes."""
        return self.size

    @property
    def kind(self) -> torch.dtype | str:
        """The dtype of torch, or where torch has none the name that the format gives it."""
        return TORCH.get(self.dtype, self.dtype)


def read_header(file: io.FileIO) -> tuple[dict[str, Entry], dict[str, str] | None]:
    """The tensors in the order of their bytes, and ``__metadata__`` if any.

    The header is not trusted: its tensors must fill the file, without gaps or overlaps.
    """
    size = file.seek(0, os.SEEK_END)
    first = _read(file, 8, 0)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise CheckpointError(
            f"it is cut off, or of another kind: a header of {length} bytes in {size}"
        )
    if length > MAX_HEADER:
        raise CheckpointError(f"its header of {length} bytes is over the limit of {MAX_HEADER}")
    try:
        header = json.loads(_read(file, length, 8).decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise CheckpointError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    _check_texts(header, metadata)
    lines = {name: _entry(name, line, 8 + length) for name, line in header.items()}
    entries = dict(sorted(lines.items(), key=lambda item: (item[1].start, item[1].end)))
    place = 8 + length
    for name, entry in entries.items():
        if entry.start != place:
            raise CheckpointError(f"{name!r} begins at {entry.start}: expected {place}")
        place = entry.end
    if place != size:
        raise CheckpointError(f"its tensors end at byte {place}, and the file at {size}")
    return entries, metadata


def written(
    lines: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str] | None
) -> bytes:
    """The first bytes of a file, for the dtype, shape and bytes of each tensor in their order.

    Their count is a multiple of 8, so that the tensors after them are aligned.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    place = 0
    for name, (dtype, shape, size) in lines.items():
        offsets = [place, place + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        place += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(file: io.FileIO, count: int, offset: int) -> bytes:
    file.seek(offset)
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a key is there twice")
    return found


def _check_texts(header: dict[str, Any], metadata: Any) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(each, str) for each in metadata.values())
    ):
        raise CheckpointError("__metadata__ must map text to text")
    try:  # JSON can spell half a surrogate pair
        json.dumps([list(header), metadata], ensure_ascii=False).encode()
    except UnicodeError:
        raise CheckpointError("a name in its header is not Unicode text") from None


def _entry(name: str, line: Any, base: int) -> Entry:
    if not isinstance(line, dict) or set(line) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = line["dtype"], line["shape"], line["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number < 1 << 62 for number in numbers
        ):
            raise CheckpointError(f"{name!r} has a shape or offsets that are not sizes")
    if len(offsets) != 2 or len(shape) > 64:
        raise CheckpointError(f"{name!r} needs two offsets and at most 64 axes")
    start, end = offsets
    if math.prod(size for size in shape if size) >= 1 << 62:
        raise CheckpointError(f"{name!r} has a shape too large for any memory")
    if 8 * (end - start) != math.prod(shape) * BITS[dtype]:
        raise CheckpointError(
            f"{name!r} has {end - start} bytes, which is not what {shape} of {dtype} take"
        )
    return Entry(dtype, tuple(shape), base + start, base + end)
