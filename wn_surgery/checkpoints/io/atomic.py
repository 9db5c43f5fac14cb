"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wn_surgery.errors import CheckpointFileError

__all__ = [
    "Output",
    "atomic",
    "atomic_folder",
    "is_same",
    "refuse_full",
    "start_writeback",
    "writing",
]

PREFIX, SUFFIX = ".wn-surgery-", ".tmp"
_sync_file_range = (
    getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
)


class Output(io.FileIO):
    """An unbuffered file whose ``write`` writes all that it is given, or raises.

    A system may write a part: Linux never writes more than 0x7ffff000 bytes at once, and less
    where a disk gets full. ``torch.save`` ignores what ``write`` returns, and would leave a hole.
    ``failed`` is the error of the first write that failed, which a caller may have swallowed.
    """

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of ``data``, and return its count of bytes."""
        view = memoryview(data).cast("B")
        rest = view
        try:
            while rest:
                count = self.write_some(rest)
                if not count:
                    raise OSError(errno.EIO, "the system takes no more bytes, and gives no reason")
                rest = rest[count:]
        except OSError as error:
            self.failed = self.failed or error
            raise
        return len(view)

    def write_some(self, data: memoryview) -> int | None:
        """Write as much of ``data`` as the system takes."""
        return super().write(data)


@contextlib.contextmanager
def writing(path: Path, mode: int = 0o600) -> Iterator[Output]:
    """A new file that only its owner may read, and that is on the disk when the context ends.

    Of another ``mode`` the process's umask takes its part. Raises the error of a write that failed,
    even if it was swallowed.
    """
    with Output(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        try:
            yield file
        finally:
            if file.failed is not None:  # torch raises an error of its own after it
                raise file.failed
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic(
    path: Path, *, like: Path | None = None, check: Callable[[Path], None] | None = None
) -> Iterator[Output]:
    """Write a file beside ``path`` and rename it to ``path`` if nothing raises.

    An earlier file of that name stays whole until the rename. The new one gets the permissions of
    ``like``, or those that every new file gets; ``check`` raises if what was written is not whole.
    If the system refuses, a :class:`CheckpointFileError` says so and nothing is left over.
    """
    made = _hidden(path)
    with _refusing(path):
        try:
            with writing(made, 0o666 if like is None else 0o600) as file:
                yield file
            if check is not None:
                check(made)
            if like is not None:
                shutil.copymode(like, made)
            made.replace(path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _hidden(path: Path) -> Path:
    """A free name beside ``path``, known before anything is made that would have to be removed."""
    # Not the path's name with an ending: that may be too long, or match `*.safetensors`.
    return path.parent / f"{PREFIX}{secrets.token_hex(16)}{SUFFIX}"


@contextlib.contextmanager
def atomic_folder(path: Path, *, like: Path) -> Iterator[Path]:
    """Fill a folder beside ``path``, new or empty, and rename it to ``path`` if nothing raises."""
    with _refusing(path):
        refuse_full(path)
        made = _hidden(path)
        try:
            made.mkdir(0o700)
            yield made
            shutil.copymode(like, made)
            for each in (*made.iterdir(), made):
                _sync(each)
            made.rename(path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        _sync(path.parent)


def refuse_full(path: Path) -> None:
    """Raise unless ``path`` is free for a new folder."""
    if path.exists() and (not path.is_dir() or list(path.iterdir())):
        raise CheckpointFileError(f"{str(path)!r} is there already; name a new folder")


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointFileError(
            f"cannot write {str(path)!r}: {error.strerror or error}; nothing was changed"
        ) from error


def _sync(path: Path) -> None:
    """Let a file, or the names in a folder, reach the disk; where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def start_writeback(file: io.FileIO) -> None:
    """Have the disk begin with what was written, where the system has a call for it."""
    if _sync_file_range is not None:
        begin, write = 0, 2  # SYNC_FILE_RANGE_WRITE: start, do not wait
        _sync_file_range(file.fileno(), ctypes.c_int64(begin), ctypes.c_int64(0), write)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder."""
    return one.exists() and other.exists() and one.samefile(other)
