"""Checkpoint files of every kind, from one layout to another."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from wn_surgery.checkpoints.atomic import (
    atomic_folder,
    is_same,
    refuse_overwriting_input,
    writing,
)
from wn_surgery.checkpoints.convert import Conversion
from wn_surgery.checkpoints.folders import Source, copy_companions, find
from wn_surgery.checkpoints.pairs import Axes
from wn_surgery.checkpoints.request import (
    Also,
    Choice,
    Layout,
    Request,
    request,
)
from wn_surgery.checkpoints.safetensors_file import File
from wn_surgery.checkpoints.streaming import Progress, Stream
from wn_surgery.checkpoints.torch_file import convert_torch_file
from wn_surgery.errors import CheckpointError
from wn_surgery.rules.sources import RulesLike

__all__ = ["Converted", "convert_file"]


@dataclass(frozen=True)
class Converted:
    """What :func:`convert_file` did.

    Attributes:
        files: those written, an index last.
        weights: the plain keys of the tensors that changed their layout.
        spectral: those of spectral-normed tensors that are plain now.
        kept_spectral: those of spectral-normed tensors that were left as they are.
        kept: those of weight-normed tensors that were left as they are, since the model's class
            puts weight norm there itself and looks for g and v.
    """

    files: tuple[Path, ...]
    weights: tuple[str, ...]
    spectral: tuple[str, ...] = ()
    kept_spectral: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Layout = "plain",
    *,
    rules: RulesLike | None = None,
    ranks: Iterable[int] | None = None,
    dim: Axes = "auto",
    also: Also | Iterable[Also] = (),
    orphans: Choice = "error",
    non_finite: Choice = "error",
    keep: Iterable[str] | None = None,
    in_place: bool = False,
    full_pickle: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a checkpoint in another layout; the source is only read.

    Args:
        source: a ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file; a
            ``*.index.json``; or a folder that has ``model.safetensors``, its index, or
            ``pytorch_model.bin``.
        target: the file to write, of the same kind; for a folder or an index a folder, which
            also gets the configs and tokenizers of a source folder.
        to: ``"plain"``, ``"parametrized"`` or ``"legacy"``.
        rules: as in :func:`wn_surgery.checkpoints.convert`.
        ranks: as in :func:`wn_surgery.checkpoints.convert`.
        dim: as in :func:`wn_surgery.checkpoints.convert`.
        also: as in :func:`wn_surgery.checkpoints.convert`.
        orphans: as in :func:`wn_surgery.checkpoints.convert`.
        non_finite: as in :func:`wn_surgery.checkpoints.convert`.
        keep: plain keys that stay weight-normed. For a folder of transformers whose class puts
            weight norm on itself, :func:`wn_surgery.huggingface.built_in_keys` gives them; without
            them such a folder is refused.
        in_place: allow ``target`` to be ``source``, which is then replaced by a rename.
        full_pickle: read PyTorch files that hold more than plain data. **They can run any code.**
        verify: read the output back before it takes its name, and compare every tensor with what
            it should be. Without it, the output's structure, sizes and keys are checked.
        progress: called with the bytes written since the last call (safetensors).

    Returns:
        What was written and converted.

    Raises:
        CheckpointError: the source is damaged, unsafe or ambiguous.
        CheckpointFileError: the source cannot be read, or the target cannot be written; what was
            there before is still there.

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
    asked = request(to, rules, ranks, dim, also, orphans, non_finite)
    found, goal = find(Path(source)), Path(target)
    asked = replace(asked, known=found.known, keep=frozenset(keep or ()))
    if found.is_folder:
        if in_place or is_same(found.main.parent, goal):
            # A kill between two renames would leave shards of two layouts under one index.
            raise CheckpointError("a folder goes into a folder of its own, never in place")
        return _folder(found, goal, asked, full_pickle, verify, progress, keep is None)
    if goal.suffix != found.main.suffix and not (found.is_torch and _is_torch(goal)):
        raise CheckpointError(
            f"{str(goal)!r} has another ending than {str(found.main)!r}: the kind of file stays, "
            "only the layout of its tensors changes"
        )
    refuse_overwriting_input(found.main, goal, in_place)
    return _file(found, goal, asked, full_pickle, verify, progress)


def _is_torch(path: Path) -> bool:
    return Source(path, path, (), None, None).is_torch


def _file(
    found: Source,
    goal: Path,
    asked: Request,
    full_pickle: bool,
    verify: bool,
    progress: Progress | None,
) -> Converted:
    if found.is_torch:
        work = convert_torch_file(found.main, goal, asked, full_pickle=full_pickle, verify=verify)
        return _summary([goal], work)
    with File(found.main) as file:
        stream = Stream([file], asked)
        stream.write(file, goal, progress, verify)
    return _summary([goal], stream)


def _folder(
    found: Source,
    goal: Path,
    asked: Request,
    full_pickle: bool,
    verify: bool,
    progress: Progress | None,
    check: bool,
) -> Converted:
    folder = found.main.parent
    with atomic_folder(goal, like=folder) as made:
        written = copy_companions(found, made, asked.to == "plain" and not asked.keep)
        if found.index is None:
            done = _file(found, made / found.main.name, asked, full_pickle, verify, progress)
        else:
            done = _shards(found, made, asked, verify, progress)
        if asked.to == "plain" and check:
            _refuse_unrecorded(found, done)
    return replace(done, files=tuple(goal / path.name for path in (*written, *done.files)))


def _shards(
    found: Source, made: Path, asked: Request, verify: bool, progress: Progress | None
) -> Converted:
    assert found.index is not None
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(File(path)) for path in found.files]
        for file in files:
            _compare(file, found)
        stream = Stream(files, asked)
        places: dict[str, str] = {}
        written: list[Path] = []
        for file in files:
            written.append(made / file.path.name)
            with writing(written[-1]) as out:
                stream.write_to(out, file, progress)
            stream.check(written[-1], file, verify)
            shutil.copymode(file.path, written[-1])
            places |= dict.fromkeys(stream.keys(file), file.path.name)
    given = found.index.get("metadata")
    metadata = {**(given if isinstance(given, dict) else {}), "total_size": stream.size}
    index = made / found.main.name
    content = {**found.index, "metadata": metadata, "weight_map": places}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(found.main, index)
    return _summary([*written, index], stream)


def _compare(file: File, found: Source) -> None:
    assert found.index is not None
    said = {key for key, name in found.index["weight_map"].items() if name == file.path.name}
    if other := sorted(said ^ set(file.entries)):
        raise CheckpointError(
            f"{str(file.path)!r} does not hold the tensors that {str(found.main)!r} says it does: "
            f"{other[0]!r} is only in one of them"
        )


def _summary(files: list[Path], work: Stream | Conversion) -> Converted:
    return Converted(
        tuple(files),
        tuple(work.weights),
        tuple(work.spectral),
        tuple(work.kept_spectral),
        tuple(work.kept),
    )


def _refuse_unrecorded(found: Source, done: Converted) -> None:
    """Raise where a transformers class may put the weight norm on that was stripped."""
    unknown = [weight for weight in done.weights if weight not in found.known]
    if unknown and (found.config or {}).get("architectures"):
        raise CheckpointError(
            f"{str(found.path)!r} is a transformers model, and its config does not say who put "
            f"weight norm on {unknown[0]!r}. If its class does, it has no place for a plain one: "
            "give keep=wn_surgery.huggingface.built_in_keys(folder), or keep=() to strip it all "
            "the same (on the command line: install transformers, or --all)"
        )
