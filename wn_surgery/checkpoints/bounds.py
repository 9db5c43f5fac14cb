"""What a PyTorch file may hold, decided before anything is computed from it.

A pickle of a few hundred bytes can name a list twice in a list that is named twice, forty times
over, or a tensor of terabytes with a stride of 0. Such a file is read at once. Whoever then walks
its content, or computes with it, does not come to an end.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wn_surgery.errors import CheckpointError

__all__ = ["not_dense", "refuse_compressed", "refuse_expanding"]

MOST_ITEMS = 10_000_000
"""The most items that the containers may have, each counted as often as it is named."""
MOST_EXPANDED = 1 << 28
"""The most bytes that tensors may have beyond those that are stored for them."""


def refuse_compressed(path: Path) -> None:
    """Raise if records of a PyTorch file are compressed, which torch never does.

    torch maps the file, and would take the compressed bytes for the tensor's.

    Raises:
        CheckpointError: they are, or the file's directory is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{str(path)!r}: its record {record.filename!r} is compressed, as torch "
                        "writes none; unzip the file, zip it again without compression, or save "
                        "it again with torch.save"
                    )
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is no sound PyTorch file: {error}") from error


def refuse_expanding(content: Any, path: Path) -> None:
    """Raise if what was read is much more than what was stored.

    Args:
        content: containers and tensors.
        path: where they are from, for the error.

    Raises:
        CheckpointError: they are too many, hold themselves, or expand to too many bytes.
    """
    items = _count(content, {}, path)
    if items > MOST_ITEMS:
        raise CheckpointError(
            f"{str(path)!r} names its containers over and over: {items:.2g} items come of it; "
            f"expected at most {MOST_ITEMS}; save the state dict alone"
        )
    expanded = sum(
        tensor.nbytes
        for tensor in _unique_tensors(content)
        if not not_dense(tensor) and tensor.nbytes > tensor.untyped_storage().nbytes()
    )
    if expanded > MOST_EXPANDED:
        raise CheckpointError(
            f"{str(path)!r} holds tensors that share their elements (a stride of 0) and have "
            f"{expanded:.2g} bytes; expected at most {MOST_EXPANDED}; save them with .contiguous()"
        )


def not_dense(tensor: Tensor) -> str:
    """Why a tensor's elements cannot be read as they lie; empty where they can."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized:
        return "quantized"
    return "on the meta device, without values" if tensor.is_meta else ""


def _children(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else None


def _count(content: Any, counts: dict[int, int], path: Path) -> int:
    """How many items there are, each as often as it is named; without recursion."""
    waiting: list[tuple[Any, list[Any] | None]] = [(content, None)]
    active: set[int] = set()
    while waiting:
        value, children = waiting.pop()
        if children is not None:
            active.discard(id(value))
            counts[id(value)] = 1 + sum(counts.get(id(child), 1) for child in children)
        elif id(value) not in counts and (found := _children(value)) is not None:
            if id(value) in active:
                raise CheckpointError(
                    f"{str(path)!r} has a container that holds itself; save the state dict alone"
                )
            active.add(id(value))
            waiting.append((value, found))
            waiting.extend((child, None) for child in found)
    return counts.get(id(content), 1)


def _unique_tensors(content: Any) -> list[Tensor]:
    seen: set[int] = set()
    found: list[Tensor] = []
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        else:
            waiting.extend(_children(value) or ())
    return found
