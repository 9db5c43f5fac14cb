"""Text for people, JSON for programs, and a bar for those who wait."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["print_error", "print_json", "print_text", "progress"]


def print_text(text: object, style: str | None = None) -> None:
    """Print to stdout, word for word; in colour only on a terminal."""
    Console(highlight=False).print(str(text), style=style, markup=False, soft_wrap=True)


def print_error(text: str) -> None:
    """One line on stderr."""
    console = Console(stderr=True, highlight=False)
    console.print("error: ", style="bold red", end="")
    console.print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout; what JSON has no number for becomes text."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    Console(highlight=False, no_color=True).print(text, markup=False, soft_wrap=True)


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
