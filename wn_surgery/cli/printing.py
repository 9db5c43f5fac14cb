"""Text for people, JSON for programs, and a progress bar."""

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

__all__ = ["UndeliveredError", "delivering", "print_error", "print_json", "print_text", "progress"]

UNWRITTEN = 4
CLOSED = 128 + 13
"""What a shell reports for a program that a closed pipe has ended."""


class UndeliveredError(Exception):
    """Standard output is full or closed; ``code`` is the exit code."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.code = CLOSED if isinstance(error, BrokenPipeError) else UNWRITTEN


@contextlib.contextmanager
def delivering() -> Iterator[None]:
    """Around a command: raise UndeliveredError where its output does not arrive."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Letters that the terminal lacks, and names that are not text, show as escapes.
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
        # The library has its own errors for files; an OSError here is typer's, for its help.
        error = caught if isinstance(caught, UndeliveredError) else UndeliveredError(caught)
        # Python flushes again at exit, and would report the error once more.
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
        # typer would turn a closed pipe into exit code 1.
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
            # Not through rich, which ignores a closed pipe.
            print(text, flush=True)  # noqa: T201 - the command line prints


def print_error(text: str) -> None:
    """Print one line to stderr."""
    console = _console(stderr=True)
    console.print("error: ", style="bold red", end="")
    console.print(_visible(text), markup=False, soft_wrap=True)


def _console(**options: Any) -> Console:
    # Without emoji, or a name such as layer:x:0 would become a picture.
    return Console(highlight=False, emoji=False, **options)


def _visible(text: str) -> str:
    """The text with control characters as escapes, since names in a file may hold any."""
    codes = (*range(32), *range(127, 160))
    return text.translate({code: f"\\x{code:02x}" for code in codes if chr(code) not in "\n\t"})


def print_json(value: Any) -> None:
    """Print one JSON object to stdout; NaN and infinities become text."""
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
    """A bar on stderr over the bytes of files or folders.

    Yields a function that takes the number of bytes done, or None without a terminal.
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
