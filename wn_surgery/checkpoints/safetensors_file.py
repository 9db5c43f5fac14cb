"""Reading safetensors files, a tensor at a time."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from wn_surgery.checkpoints.header import (
    TORCH,
    Entry,
    Header,
    read_header,
)
from wn_surgery.errors import CheckpointError, CheckpointFileError

__all__ = ["File", "Sink", "unreadable"]

CHUNK = 1 << 24


class Sink(Protocol):
    """What takes bytes: all that it is given, or it raises."""

    def write(self, data: Any, /) -> int:
        """Take them."""
        ...


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not let us read."""
    return CheckpointFileError(f"cannot read {str(path)!r}: {error.strerror or error}")


class File:
    """An open file whose header has been checked.

    Not mapped into memory: a file that becomes shorter meanwhile would then end the process.

    Args:
        path: a safetensors file, from anywhere.

    Attributes:
        path: where it is.
        header: its header.

    Raises:
        CheckpointError: it cannot be read, or its header is not what the format allows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            self.header: Header = read_header(self._file)
        except CheckpointError as error:
            self.close()
            raise CheckpointError(f"{str(path)!r} is no sound safetensors file: {error}") from None
        except OSError as error:
            self.close()
            raise unreadable(path, error) from error

    @property
    def entries(self) -> dict[str, Entry]:
        """The tensors, in the order of their bytes."""
        return self.header.entries

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, in memory of its own, with the dtype and shape of the header.

        Raises:
            CheckpointError: it cannot be read, or torch does not have its dtype.
        """
        entry = self.entries[name]
        if entry.dtype not in TORCH:
            raise CheckpointError(f"{name!r} is {entry.dtype}, with which torch does not compute")
        dtype = TORCH[entry.dtype]
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        memory = bytearray(entry.size)
        self.read_into(memoryview(memory), entry.start)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(entry.shape)

    def read_into(self, view: memoryview, place: int) -> None:
        """Fill a buffer with the bytes from ``place`` on.

        Raises:
            CheckpointError: they cannot be read, or the file has become shorter.
        """
        try:
            self._file.seek(place)
            while view:
                count = self._file.readinto(view)  # at most 2 GB at a time
                if not count:
                    raise CheckpointError(f"{str(self.path)!r} became shorter while it was read")
                view = view[count:]
        except OSError as error:
            raise unreadable(self.path, error) from error

    def copy(self, name: str, out: Sink) -> None:
        """Write the bytes of the tensor ``name`` to an unbuffered file, or whatever takes them.

        Raises:
            CheckpointError: the file has become shorter.
            OSError: they cannot be read or written.
        """
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

    def close(self) -> None:
        """Close the file; again is nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
