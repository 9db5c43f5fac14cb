"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from wn_surgery.errors import CheckpointError, CheckpointFileError

__all__ = ["atomic", "atomic_folder", "is_same", "refuse_overwriting_input", "start_writeback"]

PREFIX, SUFFIX = ".wn-surgery-", ".tmp"
_sync_file_range = (
    getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
)


@contextlib.contextmanager
def atomic(path: Path, *, like: Path | None = None) -> Iterator[io.FileIO]:
    """Write a file beside ``path`` and rename it to ``path`` if nothing raises.

    Args:
        path: what to write; an earlier file of that name stays whole until the rename.
        like: a file whose permissions the new one gets.

    Yields:
        A file open for writing, unbuffered, closed afterwards.

    Raises:
        CheckpointFileError: the system refuses (no space, no permission); nothing is left behind.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from wn_surgery.checkpoints.atomic import atomic
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic(Path(folder) / "a") as file:
        ...         _ = file.write(b"whole")
        ...     (Path(folder) / "a").read_text()
        'whole'
    """
    made = _hidden(path)
    with _refusing(path):
        try:
            with open(made, "xb", buffering=0, opener=_private) as file:
                yield file
                if like is not None:
                    made.chmod(stat.S_IMODE(like.stat().st_mode))
                os.fsync(file.fileno())
            made.replace(path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _hidden(path: Path) -> Path:
    """A free name beside ``path``, known before anything is made that would have to be removed."""
    # Not the path's name with an ending: that may be too long, or match `*.safetensors`.
    return path.parent / f"{PREFIX}{secrets.token_hex(16)}{SUFFIX}"


def _private(path: str, flags: int) -> int:
    """Open for nobody else, until the file has the permissions that it is to have."""
    return os.open(path, flags, 0o600)


@contextlib.contextmanager
def atomic_folder(path: Path, *, like: Path | None = None) -> Iterator[Path]:
    """Fill a folder beside ``path`` and rename it to ``path`` if nothing raises.

    Args:
        path: the folder to make: not there yet, or empty.
        like: a folder whose permissions the new one gets.

    Yields:
        The folder to fill.

    Raises:
        CheckpointFileError: it is there and not empty, or the system refuses; nothing is left
            behind.
    """
    with _refusing(path):
        if path.exists() and (not path.is_dir() or list(path.iterdir())):
            raise CheckpointFileError(f"{str(path)!r} is there already; name a new folder")
        made = _hidden(path)
        try:
            made.mkdir(0o700)
            yield made
            if like is not None:
                made.chmod(stat.S_IMODE(like.stat().st_mode))
            for each in (*made.iterdir(), made):
                _sync(each)
            made.rename(path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        _sync(path.parent)


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
    """Have the disk begin with what was written, so that there is less to wait for at the end.

    A hint: where the system has no call for it, nothing happens.
    """
    if _sync_file_range is not None:
        begin, write = 0, 2  # SYNC_FILE_RANGE_WRITE: start, do not wait
        _sync_file_range(file.fileno(), ctypes.c_int64(begin), ctypes.c_int64(0), write)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder."""
    return one.exists() and other.exists() and one.samefile(other)


def refuse_overwriting_input(source: Path, target: Path, in_place: bool) -> None:
    """Raise if the output is the input, under any name, and that was not asked for.

    Raises:
        CheckpointError: they are one file, or the target is a folder.
    """
    if target.is_dir():
        raise CheckpointFileError(f"{str(target)!r} is a folder; name a file in it")
    if not in_place and is_same(source, target):
        raise CheckpointError(
            f"{str(target)!r} is the input itself; write elsewhere, or pass in_place=True "
            "(--in-place)"
        )
