"""PyTorch files: read as plain data within bounds, and checked after they were written.

A pickle of a few hundred bytes can name a list twice in a list that is named twice, forty times
over, or a tensor of terabytes with a stride of 0. Reading it is quick; walking its content, or
computing with it, would not end.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wn_surgery.checkpoints.io.atomic import PREFIX, SUFFIX
from wn_surgery.checkpoints.io.safetensors_file import reading
from wn_surgery.errors import CheckpointError, CheckpointFileError

__all__ = [
    "SUFFIXES",
    "Parking",
    "check_written",
    "load",
    "not_dense",
    "same_bits",
    "tensors_of",
]

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_BLOCK = 1 << 25
_ALIGNED = 64
MOST_ITEMS = 10_000_000
"""The most items that the containers may have, each counted as often as it is named."""
MOST_EXPANDED = 1 << 28
"""The most bytes that tensors may have beyond those that are stored for them."""
# As torch's weights_only unpickler names what it refuses.
_GLOBAL = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+)")


def load(path: Path, *, full_pickle: bool = False) -> Any:
    """What a PyTorch file holds; its tensors stay on the disk until they are needed.

    Files in the format from before torch 1.6 are read into memory. With ``full_pickle`` a file
    may hold more than plain data, and **can run any code.**
    """
    try:
        # What is mapped is mapped privately: nothing that happens to a tensor reaches the file.
        with reading(path), warnings.catch_warnings():
            if mapped := zipfile.is_zipfile(path):
                _refuse_compressed(path)
            # That the storage class is deprecated, which is the file's doing.
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=not full_pickle, mmap=mapped)
        _refuse_expanding(found, path)
        return found
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        what = _GLOBAL.search(str(error))
        said = f"holds {what[1]}" if what else "is damaged, or holds more than plain data"
        raise CheckpointError(
            f"{str(path)!r} {said}, and loading that could run code; if you trust where the file "
            "is from, pass full_pickle=True"
        ) from error
    except MemoryError as error:
        raise CheckpointError(f"{str(path)!r} asks for more memory than there is") from error
    except Exception as error:
        # torch has no error of its own for this: a damaged pickle raises whatever its last
        # instruction happened to call.
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{str(path)!r} is not a sound PyTorch file: {type(error).__name__}: {said}"
        ) from error


def _refuse_compressed(path: Path) -> None:
    """Raise if a PyTorch file has compressed records: torch maps it, and takes them for numbers."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{str(path)!r}: its record {record.filename!r} is compressed, as torch "
                    "writes none; save it again with torch.save"
                )


def _refuse_expanding(content: Any, path: Path) -> None:
    """Raise if what was read from ``path`` holds itself, or is much more than what was stored."""
    counts: dict[int, int] = {}  # the items in each container, each as often as it is named
    tensors: dict[int, Tensor] = {}
    waiting: list[tuple[Any, list[Any] | None]] = [(content, None)]
    active: set[int] = set()
    while waiting:  # without recursion, which has a limit of its own
        value, children = waiting.pop()
        if children is not None:
            active.discard(id(value))
            counts[id(value)] = 1 + sum(counts.get(id(child), 1) for child in children)
        elif isinstance(value, Tensor):
            tensors[id(value)] = value
        elif id(value) not in counts and (found := _children(value)) is not None:
            if id(value) in active:
                raise CheckpointError(
                    f"{str(path)!r} has a container that holds itself; save the state dict alone"
                )
            active.add(id(value))
            waiting.append((value, found))
            waiting.extend((child, None) for child in found)
    if (items := counts.get(id(content), 1)) > MOST_ITEMS:
        raise CheckpointError(
            f"{str(path)!r} names its containers over and over, which makes {items:.2g} items, "
            f"more than {MOST_ITEMS}; save the state dict alone"
        )
    expanded = sum(
        tensor.nbytes
        for tensor in tensors.values()
        if not not_dense(tensor) and tensor.nbytes > tensor.untyped_storage().nbytes()
    )
    if expanded > MOST_EXPANDED:
        raise CheckpointError(
            f"{str(path)!r} holds tensors that share their elements (a stride of 0) and have "
            f"{expanded:.2g} bytes; expected at most {MOST_EXPANDED}; save them with .contiguous()"
        )


def _children(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else None


def not_dense(tensor: Tensor) -> str:
    """Why a tensor's elements cannot be read as they lie; empty where they can."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized:
        return "quantized"
    return "on the meta device, without values" if tensor.is_meta else ""


def check_written(made: Path, result: Any, full_pickle: bool, verify: bool) -> None:
    """Raise unless a file holds ``result`` whole; with ``verify``, compare every byte of it."""
    try:
        with zipfile.ZipFile(made) as archive:
            length = made.stat().st_size
            for record in archive.infolist():
                # Its own header has at least 30 bytes.
                if record.header_offset + 30 + record.compress_size > length:
                    raise zipfile.BadZipFile(f"{record.filename} ends after the file's end")
        found = load(made, full_pickle=full_pickle)
    except (zipfile.BadZipFile, CheckpointError) as error:
        raise CheckpointFileError(f"what was written cannot be read again: {error}") from error
    written, wanted = list(tensors_of(found)), list(tensors_of(result))
    same = len(written) == len(wanted) and all(
        (a.dtype, a.layout) == (b.dtype, b.layout) and (a.is_nested or a.shape == b.shape)
        for a, b in zip(written, wanted, strict=True)
    )
    if not same or (verify and not all(map(_equal, written, wanted))):
        raise CheckpointFileError(
            f"what was read back from {str(made)!r} is not what was written: the disk or the "
            "memory is at fault; nothing was changed"
        )


def tensors_of(content: Any) -> Iterator[Tensor]:
    """The tensors in a container, in order."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (Mapping, list, tuple)):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from tensors_of(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    unread = not_dense(one), not_dense(other)
    return unread[0] == unread[1] if any(unread) else same_bits(one, other)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors of one shape have the same dtype and bits; NaN is itself then."""
    # What is conjugated or negated when it is read has other bytes.
    flat = (t.detach().resolve_conj().resolve_neg().reshape(-1) for t in (one, other))
    first, second = (t.contiguous().view(torch.uint8) for t in flat)
    return one.dtype == other.dtype and torch.equal(first, second)


class Parking:
    """Keeps new tensors in the pages of files without a name, so that they do not fill memory."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._size = min(_BLOCK, most)
        self._block: Any = None  # an UntypedStorage, whose slices torch types as something else
        self._used = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor, in the pages of a file."""
        if not tensor.nbytes or tensor.is_meta:
            return tensor
        if self._block is None or self._used + tensor.nbytes > self._block.nbytes():
            self._block, self._used = self._mapped(max(self._size, tensor.nbytes)), 0
            _give_back()
        # A storage of its own, or torch.save would write the whole block for each.
        storage = self._block[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        parked: Any = torch.empty(0, dtype=tensor.dtype)  # set_ has more forms than are typed
        parked.set_(storage, 0, tensor.shape).copy_(tensor)
        return cast(Tensor, parked)

    def _mapped(self, size: int) -> Any:
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=PREFIX, suffix=SUFFIX) as file:
            if sys.platform == "linux":
                # Touching a page that a full disk has no room for would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.UntypedStorage.from_file(file.name, shared=True, nbytes=size)


def _give_back() -> None:
    """Return freed memory to the system: glibc's heap keeps what lies under a small live piece."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
