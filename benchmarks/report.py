"""The tables as markdown and as JSON, and the circumstances in which they were measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Comparison, memory_is_kept
from benchmarks.targets import Verdict

__all__ = [
    "as_data",
    "environment",
    "heading",
    "kept",
    "markdown",
    "processor",
    "title_of",
    "verdicts_as_data",
    "write",
]

ROOT = Path(__file__).parents[1]


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """The commit that is checked out, with ``+`` if files differ from it; empty without git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on, as plain JSON data.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    versions: dict[str, str | None] = {}
    for package in ("triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor(),
        "processors": os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **versions,
        "threads": torch.get_num_threads(),
        "memory_is_kept": memory_is_kept(),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["capability"] = list(torch.cuda.get_device_capability())
    return found


def heading(case: str, variant: str, mode: str, compiled: bool) -> str:
    """The title of a table."""
    parts = [case, *([variant] if variant else []), mode, *(["compiled"] if compiled else [])]
    return ", ".join(parts)


def title_of(table: Mapping[str, Any]) -> str:
    """The heading of a table that is JSON data."""
    return heading(table["case"], table["variant"], table["mode"], table["compiled"])


def kept(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The tables and parts of a file that was begun under the same circumstances, or nothing."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(found.get(key) == wanted[key] for key in ("quick", "clock"))
    now, then = wanted["environment"], found["environment"]
    if not same or any(now[key] != then.get(key) for key in now.keys() - {"date"}):
        print(f"{path} has other versions, another device or another commit: beginning anew")
        return {}
    return {key: found[key] for key in ("tables", "parts")}


def as_data(found: Comparison, extra: Mapping[str, Mapping[str, float]] | None = None) -> Any:
    """The rows of a table as plain JSON data.

    Args:
        found: the times.
        extra: more numbers for some rows.
    """
    rows = []
    for name, timing in found.timings.items():
        low, high = found.spread(name)
        row: dict[str, Any] = {
            "name": name,
            "minimum_s": timing.minimum,
            "median_s": timing.median,
            "ratio": found.ratio(name),
            "ratio_quartiles": [low, high],
            "ratio_of_minima": timing.minimum / found.timings[found.base].minimum,
            "speed_against_torch": found.speed(name, "torch") if "torch" in found.timings else None,
        }
        if extra is not None and name in extra:
            row |= extra[name]
        rows.append(row)
    return rows


def markdown(found: Comparison, extra: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """The table for reading: times in µs, ratios to the base, speed against torch.

    Args:
        found: the times.
        extra: more numbers for some rows, a column each.
    """
    extra = {} if extra is None else extra
    columns = list(dict.fromkeys(key for numbers in extra.values() for key in numbers))
    head = ["", "min, µs", "median, µs", f"/ {found.base}", "quartiles", "of minima",
            "torch / this", *columns]  # fmt: skip
    rows = []
    for data in as_data(found):
        low, high = data["ratio_quartiles"]
        speed = data["speed_against_torch"]
        numbers = extra.get(data["name"], {})
        rows.append([
            data["name"], f"{1e6 * data['minimum_s']:.1f}", f"{1e6 * data['median_s']:.1f}",
            f"{data['ratio']:.3f}", f"{low:.3f}–{high:.3f}", f"{data['ratio_of_minima']:.3f}",
            "" if speed is None else f"{speed:.2f}",
            *(f"{numbers[key]:.4g}" if key in numbers else "" for key in columns),
        ])  # fmt: skip
    return _aligned(head, rows)


def _aligned(head: list[str], rows: Iterable[list[str]]) -> str:
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def verdicts_as_data(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Verdicts as plain JSON data."""
    return [
        {
            "target": verdict.text,
            "value": verdict.value,
            "bound": verdict.bound,
            "met": verdict.met,
        }
        for verdict in verdicts
    ]


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write results as JSON; the file is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.part")
    half.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    half.replace(path)
