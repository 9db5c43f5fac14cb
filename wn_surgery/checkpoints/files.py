"""Checkpoint files of every kind, from one layout to another."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wn_surgery.checkpoints.convert import converted, uncomputed
from wn_surgery.checkpoints.folders import Source, copy_companions, find
from wn_surgery.checkpoints.io.atomic import (
    atomic,
    atomic_folder,
    is_same,
    refuse_full,
    writing,
)
from wn_surgery.checkpoints.io.safetensors_file import File
from wn_surgery.checkpoints.io.torch_file import (
    SUFFIXES,
    Parking,
    check_written,
    load,
    tensors_of,
)
from wn_surgery.checkpoints.optimizer_names import warn_of_forgotten
from wn_surgery.checkpoints.pairs import Axes
from wn_surgery.checkpoints.parts import Parts
from wn_surgery.checkpoints.plan import Plan, refuse_unused_rules
from wn_surgery.checkpoints.request import Also, Choice, Layout, Request
from wn_surgery.checkpoints.streaming import Cost, Progress, Stream
from wn_surgery.errors import CheckpointError, CheckpointFileError
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
        cost: what it would take, of a dry run; then nothing was written.
    """

    files: tuple[Path, ...]
    weights: tuple[str, ...]
    spectral: tuple[str, ...] = ()
    kept_spectral: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    cost: Cost | None = None


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
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a checkpoint in another layout; the source is only read.

    Args:
        source: a ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file; a
            ``*.index.json``; a folder that has ``model.safetensors``, its index, or
            ``pytorch_model.bin``; or a folder of ``torch.distributed.checkpoint``.
        target: the file to write, of the same kind; for a folder or an index a folder, which
            also gets the configs and tokenizers of a source folder. A distributed checkpoint
            goes into a folder of the same kind, or its model into a ``.safetensors`` file.
        to: ``"plain"``, ``"parametrized"`` or ``"legacy"``.
        rules: this and the next five are as in :func:`wn_surgery.checkpoints.convert`.
        ranks: see there.
        dim: see there.
        also: see there.
        orphans: see there.
        non_finite: see there.
        keep: plain keys that stay weight-normed. For a folder of transformers whose class puts
            weight norm on itself, :func:`wn_surgery.huggingface.built_in_keys` gives them; without
            them such a folder is refused.
        in_place: allow ``target`` to be ``source``, which is then replaced by a rename.
        full_pickle: read PyTorch files that hold more than plain data. **They can run any code.**
        verify: read the output back before it takes its name, and compare every tensor with what
            it should be. Without it, the output's structure, sizes and keys are checked.
        dry_run: write nothing and read no tensor: names, shapes and dtypes say what would be read,
            written and held in memory. What depends on values is not found, such as a weight that
            would be NaN.
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
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(state, f"{folder}/a.pt")
        ...     wn.checkpoints.convert_file(f"{folder}/a.pt", f"{folder}/b.pt", dry_run=True).cost
        Cost(read=12, written=8, memory=8)
    """
    found, goal = find(Path(source)), Path(target)
    asked = replace(
        Request.of(to, rules, ranks, dim, also, orphans, non_finite),
        known=found.known,
        keep=frozenset(keep or ()),
    )
    work = _Work(found, asked, full_pickle, verify, dry_run, progress)
    if found.is_distributed:
        if is_same(found.path, goal):
            raise CheckpointError("a folder goes into a folder of its own, never in place")
        return work.distributed(goal)
    if found.is_folder:
        if in_place or is_same(found.main.parent, goal):
            # A kill between two renames would leave shards of two layouts under one index.
            raise CheckpointError("a folder goes into a folder of its own, never in place")
        return work.folder(goal, check=keep is None)
    if goal.suffix != found.main.suffix and not (found.is_torch and goal.suffix in SUFFIXES):
        raise CheckpointError(
            f"{str(goal)!r} has another ending than {str(found.main)!r}: the kind of file stays, "
            "only the layout of its tensors changes"
        )
    if goal.is_dir():
        raise CheckpointFileError(f"{str(goal)!r} is a folder; name a file in it")
    if not in_place and is_same(found.main, goal):
        raise CheckpointError(
            f"{str(goal)!r} is the input itself; write elsewhere, or pass in_place=True"
        )
    return work.file(goal)


@dataclass(frozen=True)
class _Work:
    """A checkpoint on the disk, and what to do with it."""

    found: Source
    asked: Request
    full_pickle: bool
    verify: bool
    dry_run: bool
    progress: Progress | None

    def _new(self, goal: Path) -> contextlib.AbstractContextManager[Path]:
        """A folder to fill; in a dry run its name."""
        if not self.dry_run:
            return atomic_folder(goal, like=self.found.main.parent)
        refuse_full(goal)
        return contextlib.nullcontext(goal)

    def folder(self, goal: Path, check: bool) -> Converted:
        """Write a folder, with the companions of the old one."""
        found, asked = self.found, self.asked
        with self._new(goal) as made:
            plain = asked.to == "plain" and not asked.keep
            written = [] if self.dry_run else copy_companions(found, made, plain)
            index = found.index
            done = self._shards(index, made) if index else self.file(made / found.main.name)
            unknown = [weight for weight in done.weights if weight not in found.known]
            transformers = (found.config or {}).get("architectures")
            if asked.to == "plain" and check and unknown and transformers:
                raise CheckpointError(
                    f"{str(found.path)!r} is a transformers model, and its config does not say who "
                    f"put weight norm on {unknown[0]!r}. If its class does, it has no place for a "
                    "plain one: pass keep=wn_surgery.huggingface.built_in_keys(folder), or keep=() "
                    "to strip it all the same"
                )
        return replace(done, files=tuple(goal / path.name for path in (*written, *done.files)))

    def file(self, goal: Path) -> Converted:
        """Write a file."""
        if self.found.is_torch:
            return self._torch_file(goal)
        with File(self.found.main) as file:
            stream = Stream([file], self.asked)
            refuse_unused_rules(self.asked, [stream.plan])
            if self.dry_run:
                return _summary([goal], [stream.plan], stream.cost)
            check = partial(stream.check, file=file, verify=self.verify)
            with atomic(goal, like=file.path, check=check) as out:
                stream.write(out, file, self.progress)
        return _summary([goal], [stream.plan])

    def distributed(self, goal: Path) -> Converted:
        """Write a distributed checkpoint as one, or its model as a safetensors file."""
        parts = Parts(self.found.path, self.asked)
        if goal.suffix != ".safetensors":
            with self._new(goal) as made:
                if not self.dry_run:
                    parts.write(made, self.verify)
            cost = parts.cost if self.dry_run else None
            warn_of_forgotten(parts.forgotten, stacklevel=3)
            return _summary([goal], parts.plans, cost)
        part, stream = parts.only_model()
        if self.dry_run:
            return _summary([goal], [stream.plan], stream.cost)
        check = partial(stream.check, file=part, verify=self.verify)
        with atomic(goal, like=self.found.main, check=check) as out:
            stream.write(out, part, self.progress)
        return _summary([goal], [stream.plan])

    def _torch_file(self, goal: Path) -> Converted:
        source = self.found.main
        content = load(source, full_pickle=self.full_pickle)
        result: Any = None
        if self.dry_run:
            result, plans = converted(content, self.asked, compute=uncomputed)
            return _summary([goal], plans, _cost_of(content, result))
        parking = Parking(goal.parent, source.stat().st_size)

        def check(made: Path) -> None:
            check_written(made, result, self.full_pickle, self.verify)

        with atomic(goal, like=source, check=check) as out:
            result, plans = converted(content, self.asked, parking)
            torch.save(result, out)
        return _summary([goal], plans)

    def _shards(self, index: dict[str, Any], made: Path) -> Converted:
        found = self.found
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(File(path)) for path in found.files]
            for file in files:
                said = {key for key, name in index["weight_map"].items() if name == file.path.name}
                if other := sorted(said ^ set(file.entries)):
                    raise CheckpointError(
                        f"{str(file.path)!r} does not hold the tensors that {str(found.main)!r} "
                        f"says it does: {other[0]!r} is only in one of them"
                    )
            stream = Stream(files, self.asked)
            refuse_unused_rules(self.asked, [stream.plan])
            if self.dry_run:
                names = [made / file.path.name for file in files]
                return _summary([*names, made / found.main.name], [stream.plan], stream.cost)
            places: dict[str, str] = {}
            written: list[Path] = []
            for file in files:
                written.append(made / file.path.name)
                with writing(written[-1]) as out:
                    stream.write(out, file, self.progress)
                stream.check(written[-1], file, self.verify)
                shutil.copymode(file.path, written[-1])
                places |= dict.fromkeys(stream.keys(file), file.path.name)
        given = index.get("metadata")
        metadata = {**(given if isinstance(given, dict) else {}), "total_size": stream.size}
        target = made / found.main.name
        content = {**index, "metadata": metadata, "weight_map": places}
        target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(found.main, target)
        return _summary([*written, target], [stream.plan])


def _cost_of(content: Any, result: Any) -> Cost:
    """What a PyTorch file takes: its tensors are mapped, and new ones wait in files."""
    old, new = ({id(tensor): tensor for tensor in tensors_of(each)} for each in (content, result))
    sizes = [0 if old[each].is_meta else old[each].nbytes for each in old]
    made = [new[each].nbytes for each in new.keys() - old.keys()]
    kept = [0 if new[each].is_meta else new[each].nbytes for each in new.keys() & old.keys()]
    return Cost(sum(sizes), sum(made) + sum(kept), max(made, default=0))


def _summary(files: list[Path], plans: list[Plan], cost: Cost | None = None) -> Converted:
    def of(name: str) -> tuple[str, ...]:
        return tuple(key for plan in plans for key in getattr(plan, name))

    kinds = (of("weights"), of("spectral"), of("kept_spectral"), of("kept"))
    return Converted(tuple(files), *kinds, cost)
