"""Reading safetensors files, a tensor at a time."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from wn_surgery.checkpoints.io.header import TORCH, Entry, read_header
from wn_surgery.errors import CheckpointError, CheckpointFileError

__all__ = ["File", "Holder", "Sink", "owners_of", "reading", "write_tensor"]

CHUNK = 1 << 24


class Sink(Protocol):
    """What takes bytes: all that it is given, or it raises."""

    def write(self, data: Any, /) -> int:
        """Take them."""
        ...


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a file that the system does not let us read it."""
    try:
        yield
    except OSError as error:
        said = f"cannot read {str(path)!r}: {error.strerror or error}"
        raise CheckpointFileError(said) from error


class File:
    """An open file whose header has been checked.

    It is not mapped into memory: a file that becomes shorter meanwhile would then end the process.
    Raises :class:`CheckpointError` if its header, or what is read, is not what the format allows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry]
        with reading(path):
            self._file = path.open("rb", buffering=0)
            try:
                self.entries, self.metadata = read_header(self._file)
            except CheckpointError as error:
                self._file.close()
                said = f"{str(path)!r} is not a sound safetensors file: {error}"
                raise CheckpointError(said) from None
            except OSError:
                self._file.close()
                raise

    def tensor(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        entry = self.entries[name]
        if entry.dtype not in TORCH:
            raise CheckpointError(f"{name!r} is {entry.dtype}, which torch does not compute with")
        dtype = TORCH[entry.dtype]
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        memory = bytearray(entry.size)
        self.read_into(memoryview(memory), entry.start)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(entry.shape)

    def read_into(self, view: memoryview, place: int) -> None:
        """Fill a buffer with the bytes from ``place`` on."""
        with reading(self.path):
            self._file.seek(place)
            while view:
                count = self._file.readinto(view)  # at most 2 GB at a time
                if not count:
                    raise CheckpointError(f"{str(self.path)!r} became shorter while it was read")
                view = view[count:]

    def copy(self, name: str, out: Sink) -> None:
        """Write the bytes of a tensor to an unbuffered file, or whatever takes them."""
        entry = self.entries[name]
        place = entry.start
        while place < entry.end:
            count = min(CHUNK, entry.end - place)
            if sys.platform == "linux" and isinstance(out, io.FileIO):
                # Elsewhere it writes to sockets alone.
                count = os.sendfile(out.fileno(), self._file.fileno(), place, count)
            else:
                self._file.seek(place)
                count = out.write(self._file.read(count))
            if count == 0:
                raise CheckpointError(f"{str(self.path)!r} became shorter while it was read")
            place += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Stored(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    @property
    def kind(self) -> torch.dtype | str:
        """Its dtype, or the name of one that torch lacks."""
        ...

    @property
    def size(self) -> int:
        """Its bytes."""
        ...

    @property
    def held(self) -> int:
        """Bytes of memory that reading it takes."""
        ...


class Holder(Protocol):
    """What has tensors by name."""

    @property
    def path(self) -> Path:
        """The file, or the folder."""
        ...

    @property
    def entries(self) -> Mapping[str, Stored]:
        """The tensors, by name."""
        ...

    def tensor(self, name: str, /) -> Tensor:
        """One of them, in memory of its own."""
        ...

    def copy(self, name: str, out: Sink, /) -> None:
        """Write its bytes."""
        ...


def owners_of(files: Iterable[Holder]) -> dict[str, Holder]:
    """The file that each tensor of several shards is in; it must be in one only."""
    owners: dict[str, Holder] = {}
    for file in files:
        for name in file.entries:
            if name in owners:
                both = f"{str(owners[name].path)!r} and in {str(file.path)!r}"
                raise CheckpointError(f"{name!r} is in {both}; delete the one that is stale")
            owners[name] = file
    return owners


def write_tensor(out: Sink, tensor: Tensor) -> None:
    """Write the bytes of a tensor."""
    tensor = tensor.contiguous()
    if tensor.nbytes:
        # torch gives bytes only through numpy, which the core does without.
        array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        out.write(memoryview(array).cast("B"))
