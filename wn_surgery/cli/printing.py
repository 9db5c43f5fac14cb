"""Text for people, JSON for programs, and a bar for those who wait."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = [
    "UndeliveredError",
    "delivering",
    "print_error",
    "print_json",
    "print_text",
    "progress",
]

UNWRITTEN = 4
CLOSED = 128 + 13
"""What a shell reports of a program that a closed pipe has ended."""


class UndeliveredError(Exception):
    """Standard output takes no more.

    Attributes:
        code: the exit code.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.code = CLOSED if isinstance(error, BrokenPipeError) else UNWRITTEN


@contextlib.contextmanager
def delivering() -> Iterator[None]:
    """Around a command: what it prints arrives, or the exit code says that it did not.

    Raises:
        UndeliveredError: standard output is full, or nobody reads it any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that has no such letter, and names that are no text, show as escapes.
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            with _sending():
                if sys.stdout is None:
                    raise OSError(errno.EBADF, "it is closed")
                sys.stdout.flush()
    except (UndeliveredError, OSError) as caught:
        # The library has errors of its own for files; this is typer's, of its help.
        error = caught if isinstance(caught, UndeliveredError) else UndeliveredError(caught)
        # Python tries again when it ends, and would say so once more.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.code != CLOSED:
            print_error(f"cannot write to standard output: {error}")
        raise error from caught


@contextlib.contextmanager
def _sending() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # typer would take a closed pipe for the exit code 1.
        raise UndeliveredError(error) from error


def print_text(text: object, style: str | None = None) -> None:
    """Print to stdout, word for word; in colour only on a terminal."""
    _print(_visible(str(text)), style)


def _print(text: str, style: str | None = None) -> None:
    console = _console()
    with _sending():
        if style is not None and console.is_terminal:
            console.print(text, style=style, markup=False, soft_wrap=True)
        elif sys.stdout is not None:
            # Not through rich, which lets a pipe be closed unnoticed.
            print(text, flush=True)  # noqa: T201 - it is what this is for


def print_error(text: str) -> None:
    """One line on stderr."""
    console = _console(stderr=True)
    console.print("error: ", style="bold red", end="")
    console.print(_visible(text), markup=False, soft_wrap=True)


def _console(**options: Any) -> Console:
    # Word for word: without emoji, or a name such as layer:x:0 would become a picture.
    return Console(highlight=False, emoji=False, **options)


def _visible(text: str) -> str:
    """The text with control characters as escapes: names in a file may hold any."""
    return text.translate(_CONTROLS)


_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def print_json(value: Any) -> None:
    """One JSON object on stdout; what JSON has no number for becomes text."""
    unicode = str(getattr(sys.stdout, "encoding", "")).lower().replace("-", "").startswith("utf")
    text = json.dumps(_plain(value), ensure_ascii=not unicode, allow_nan=False)
    _print(text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def progress(what: str, *paths: Path) -> Iterator[Callable[[int], object] | None]:
    """A bar on stderr, if that is a terminal, over the bytes of some files.

    Args:
        what: what is going on.
        paths: files, or folders, whose bytes are the whole.

    Yields:
        What to call with the bytes that were done; None without a terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=sum(map(_size, paths)))
        yield lambda count: bar.update(task, advance=count)


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    with os.scandir(path) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.name.endswith(".safetensors"))
