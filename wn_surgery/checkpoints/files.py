"""Checkpoint files of every kind, from one layout to another."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from wn_surgery.errors import CheckpointError
from wn_surgery.norm import Dim

from .atomic import atomic, refuse_overwriting_input
from .convert import LAYOUTS, Layout, convert
from .pairs import find_pairs
from .safetensors_file import File, convert_opened, open_file

__all__ = ["TORCH_SUFFIXES", "convert_file", "index_of", "load", "open_shards"]

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})
INDEX = "model.safetensors.index.json"


def load(path: Path, *, full_pickle: bool = False) -> Any:
    """Read a PyTorch file, mapped from the disk.

    Args:
        path: the file.
        full_pickle: unpickle whatever it holds. **It can then run any code.**

    Returns:
        What was saved.

    Raises:
        CheckpointError: it cannot be read, is damaged, or holds more than plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=not full_pickle)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged, or holds more than tensors and plain data, and loading it "
            "could run code; full_pickle=True loads it if you trust where it is from"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is no sound PyTorch file: {error}"[:400]) from error


def index_of(path: Path) -> dict[str, Any] | None:
    """The checked index of a sharded checkpoint, or None where ``path`` is a single file.

    Args:
        path: an index file.

    Returns:
        The index; each shard is a plain file name in the folder of the index.

    Raises:
        CheckpointError: it is no index, or names a file outside its folder.
    """
    if path.suffix != ".json":
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {error}") from None
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{str(path)!r} has no weight_map of tensors to file names")
    # The hub's cache links both the index and the shards to one other folder.
    roots = {path.parent.resolve(), path.resolve().parent}
    for name in set(shards.values()):
        plain = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
        if not plain or (path.parent / name).resolve().parent not in roots:
            raise CheckpointError(
                f"{str(path)!r} names the shard {name!r}, which is not a file of its own folder"
            )
    return dict(index)


def open_shards(path: Path, index: dict[str, Any] | None) -> list[File]:
    """Open every file of a safetensors checkpoint.

    Raises:
        CheckpointError: one cannot be read, or does not hold what the index says.
    """
    if index is None:
        return [open_file(path)]
    files: list[File] = []
    try:
        for name in dict.fromkeys(index["weight_map"].values()):
            files.append(open_file(path.parent / name))
            said = {key for key, shard in index["weight_map"].items() if shard == name}
            if said != set(files[-1].entries):
                raise CheckpointError(
                    f"{name!r} does not hold the tensors that {str(path)!r} says it does: "
                    f"{sorted(said ^ set(files[-1].entries))[:3]}"
                )
    except CheckpointError:
        for file in files:
            file.close()
        raise
    return files


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Layout = "plain",
    *,
    names: str | Iterable[str] | None = None,
    dim: Dim | str = "auto",
    in_place: bool = False,
    full_pickle: bool = False,
    progress: Callable[[int], object] | None = None,
) -> list[Path]:
    """Write a checkpoint in another layout; the source is only read.

    Args:
        source: a ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file, a
            ``*.index.json``, or a folder that holds ``model.safetensors.index.json`` or
            ``model.safetensors``.
        target: the file to write, of the same kind; a folder for a sharded checkpoint.
        to: ``"plain"``, ``"parametrized"`` or ``"legacy"``.
        names: as in :func:`wn_surgery.checkpoints.convert`; not for safetensors yet.
        dim: as in :func:`wn_surgery.checkpoints.convert`.
        in_place: allow ``target`` to be ``source``, which is then replaced by a rename.
        full_pickle: read PyTorch files that hold more than plain data. **They can run any code.**
        progress: called with the bytes written since the last call (safetensors).

    Returns:
        The files written, an index last.

    Raises:
        CheckpointError: the source is damaged, unsafe or ambiguous, or the target cannot be
            written. A single target is then as it was.

    Example:
        >>> import tempfile, torch
        >>> import wn_surgery as wn
        >>> state = {"weight_g": torch.tensor([[10.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(state, f"{folder}/a.pt")
        ...     _ = wn.checkpoints.convert_file(f"{folder}/a.pt", f"{folder}/b.pt")
        ...     torch.load(f"{folder}/b.pt")
        {'weight': tensor([[6., 8.]])}
    """
    if to not in LAYOUTS:
        raise CheckpointError(f"unknown layout {to!r}: expected one of {', '.join(LAYOUTS)}")
    src, dst = Path(source), Path(target)
    if src.is_dir():
        src = next(
            (src / n for n in (INDEX, "model.safetensors") if (src / n).exists()), src / INDEX
        )
        dst = dst if src.name == INDEX else dst / src.name if dst.is_dir() else dst
    if not src.is_file():
        raise CheckpointError(f"{str(src)!r} is no file")
    if src.suffix in TORCH_SUFFIXES:
        refuse_overwriting_input(src, dst, in_place)
        made = convert(load(src, full_pickle=full_pickle), to, names=names, dim=dim)
        with atomic(dst, like=src) as out, os.fdopen(os.dup(out), "wb") as stream:
            torch.save(made, stream)
        return [dst]
    if names is not None:
        raise CheckpointError("names= is for PyTorch files; safetensors files take none yet")
    if src.suffix not in (".safetensors", ".json"):
        raise CheckpointError(
            f"{str(src)!r}: expected .safetensors, .json or {', '.join(sorted(TORCH_SUFFIXES))}"
        )
    index = index_of(src)
    files = open_shards(src, index)
    try:
        return _stream(src, dst, files, index, to, dim, in_place, progress)
    finally:
        for file in files:
            file.close()


def _stream(
    src: Path,
    dst: Path,
    files: list[File],
    index: dict[str, Any] | None,
    to: Layout,
    dim: Dim | str,
    in_place: bool,
    progress: Callable[[int], object] | None,
) -> list[Path]:
    owners: dict[str, File] = {}
    for file in files:
        for name in file.entries:
            if name in owners:
                raise CheckpointError(f"{name!r} is in two shards of {str(src)!r}")
            owners[name] = file
    pairs = find_pairs({name: owners[name].entries[name].shape for name in owners}, dim=dim)
    if index is None:
        refuse_overwriting_input(src, dst, in_place)
        convert_opened(files[0], dst, pairs, to, owners, progress)
        return [dst]
    if in_place or (dst.exists() and dst.samefile(src.parent)):
        # A kill between two renames would leave shards of two layouts under one index.
        raise CheckpointError("a sharded checkpoint goes into a folder of its own, never in place")
    try:
        dst.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {str(dst)!r}: {error.strerror}") from error
    if any(dst.iterdir()):
        raise CheckpointError(f"{str(dst)!r} is not empty; name a new folder")
    written: list[Path] = []
    weights: dict[str, str] = {}
    try:
        for file in files:
            written.append(dst / file.path.name)
            for name in convert_opened(file, written[-1], pairs, to, owners, progress):
                weights[name] = file.path.name
        gone = {pair.g for pair in pairs} if to == "plain" else set()
        total = sum(e.end - e.start for f in files for n, e in f.entries.items() if n not in gone)
        given = index.get("metadata")
        metadata = {**(given if isinstance(given, dict) else {}), "total_size": total}
        made = {**index, "metadata": metadata, "weight_map": weights}
        with atomic(dst / src.name, like=src) as out:
            os.write(out, json.dumps(made, indent=2).encode())
    except BaseException:
        # Shards without an index are no checkpoint; the folder was empty before.
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return [*written, dst / src.name]
