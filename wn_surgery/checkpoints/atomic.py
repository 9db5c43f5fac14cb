"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wn_surgery.errors import CheckpointError

__all__ = ["atomic", "refuse_overwriting_input"]


@contextlib.contextmanager
def atomic(path: Path, *, like: Path | None = None) -> Iterator[int]:
    """Write a file beside ``path`` and rename it to ``path`` if nothing raises.

    Args:
        path: what to write; an earlier file of that name stays whole until the rename.
        like: a file whose permissions the new one gets.

    Yields:
        A descriptor open for writing, closed afterwards.

    Raises:
        CheckpointError: the system refuses (no space, no permission); nothing is left behind.

    Example:
        >>> import os, tempfile
        >>> from pathlib import Path
        >>> from wn_surgery.checkpoints.atomic import atomic
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic(Path(folder) / "a") as file:
        ...         _ = os.write(file, b"whole")
        ...     (Path(folder) / "a").read_text()
        'whole'
    """
    name: str | None = None
    file = -1
    try:
        # The name's end is lost to no limit of length, and hidden from `*.safetensors`.
        file, name = tempfile.mkstemp(dir=path.parent, prefix=".wn-surgery-", suffix=".tmp")
        yield file
        if like is not None:
            os.fchmod(file, stat.S_IMODE(like.stat().st_mode))
        os.fsync(file)
        os.replace(name, path)  # noqa: PTH105
        name = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(path)!r}: {error.strerror or error}; no file was changed"
        ) from error
    finally:
        if file >= 0:
            os.close(file)
        if name is not None:
            Path(name).unlink(missing_ok=True)


def refuse_overwriting_input(source: Path, target: Path, in_place: bool) -> None:
    """Raise if the output is the input, under any name, and that was not asked for.

    Raises:
        CheckpointError: they are one file.
    """
    if not in_place and target.exists() and source.samefile(target):
        raise CheckpointError(
            f"{str(target)!r} is the input itself; write elsewhere, or pass in_place=True "
            "(--in-place)"
        )
