"""Converting a distributed checkpoint: its models, and the names in its optimizers' states."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from wn_surgery.checkpoints.io.distributed import (
    Distributed,
    Part,
    unpickled,
    write_distributed,
)
from wn_surgery.checkpoints.io.torch_file import same_bits
from wn_surgery.checkpoints.optimizer_names import LISTS, renamed
from wn_surgery.checkpoints.plan import Plan, refuse_unused_rules
from wn_surgery.checkpoints.reading import is_model
from wn_surgery.checkpoints.request import Request
from wn_surgery.checkpoints.streaming import Cost, Stream
from wn_surgery.errors import CheckpointError, CheckpointFileError

__all__ = ["Parts"]

Steps: TypeAlias = tuple[str, ...]
Renames: TypeAlias = Mapping[str, str | None]
# How torch flattens an optimizer's state dict, with a parameter's name in the middle of a key.
_FLATTENED = ("state.", "param_groups.")


class Parts:
    """A distributed checkpoint and what becomes of each of its state dicts.

    Attributes:
        source: the folder.
        plans: one for each state dict of a model.
        forgotten: the g and v of which an optimizer's state is left out, once it is written.
    """

    def __init__(self, path: Path, asked: Request) -> None:
        self.source = Distributed(path)
        self._streams = {
            part: Stream([part], asked)
            for part in self.source.parts.values()
            if is_model(part.entries)
        }
        self.plans: list[Plan] = [stream.plan for stream in self._streams.values()]
        refuse_unused_rules(asked, self.plans)
        self._renames = _renames(self._streams)
        self.forgotten: dict[str, None] = {}

    def only_model(self) -> tuple[Part, Stream]:
        """The one state dict that a safetensors file has room for."""
        streams = self._streams
        found = [part for part in streams if streams[part].plan.weights] or list(streams)
        if len(found) != 1:
            names = ", ".join(".".join(part.place) or "its top" for part in found) or "none"
            raise CheckpointError(
                f"a safetensors file is for one state dict, and {str(self.source.path)!r} holds "
                f"{len(found)} of models: {names}; write a folder instead"
            )
        return found[0], streams[found[0]]

    @property
    def cost(self) -> Cost:
        """What :meth:`write` takes."""
        total = sum((stream.cost for stream in self._streams.values()), Cost())
        for part in self.source.parts.values():
            if part in self._streams:
                continue
            for name, entry in part.entries.items():
                if self._moved((*part.place, name)) is not None:
                    total += Cost(entry.size, entry.size, entry.held)
        return total

    def write(self, made: Path, verify: bool) -> None:
        """Write the counterpart, and check it: its structure, or with ``verify`` every byte."""
        shapes: dict[Steps, tuple[tuple[int, ...], torch.dtype]] = {}
        tensors: dict[Steps, Callable[[], Tensor]] = {}
        for part in self.source.parts.values():
            for place, shape, kind, compute in self._of(part):
                shapes[place], tensors[place] = (shape, kind), compute
        blobs = {
            path: partial(self._blob, key)
            for key in self.source.blobs
            if (path := self._moved(self.source.path_of(key))) is not None
        }
        write_distributed(made, shapes, lambda path: tensors[path](), blobs)
        written = Distributed(made)
        found = {
            (*place, name): (part, name)
            for place, part in written.parts.items()
            for name in part.entries
        }
        entries = {path: part.entries[name] for path, (part, name) in found.items()}
        keys = {".".join(path): read for path, read in blobs.items()}
        same = {path: (e.shape, e.kind) for path, e in entries.items()} == shapes
        same = same and set(written.blobs) == set(keys)
        if same and verify:
            same = all(
                same_bits(tensors[path](), part.tensor(name))  # so that v is gone for the second
                for path, (part, name) in found.items()
            ) and all(written.blob(key) == read() for key, read in keys.items())
        if not same:
            raise CheckpointFileError(f"{str(made)!r} was not written as planned; try again")

    def _of(
        self, part: Part
    ) -> list[tuple[Steps, tuple[int, ...], torch.dtype, Callable[[], Tensor]]]:
        if part in self._streams and self._streams[part].plan.weights:
            stream = self._streams[part]
            computed = stream.tensors(part)
            return [
                ((*part.place, line.key), line.shape, line.kind, computed[line.key])
                for line in stream.lines(part)
                if isinstance(line.kind, torch.dtype)
            ]
        return [
            (path, entry.shape, entry.kind, partial(part.tensor, name))
            for name, entry in part.entries.items()
            if (path := self._moved((*part.place, name))) is not None
        ]

    def _moved(self, path: Steps) -> Steps | None:
        """The path with the new names of parameters in it; ``None`` where there is none."""
        steps: list[str] = []
        for step in path:
            start = next((each for each in _FLATTENED if step.startswith(each)), "")
            name, rest = step.removeprefix(start), ""
            if start:  # a field, which has no dot, follows the name
                name, _, rest = name.rpartition(".")
            if name not in self._renames:
                steps.append(step)
                continue
            if (new := self._renames[name]) is None:
                self.forgotten[name] = None
                return None
            steps.append(f"{start}{new}.{rest}" if start else new)
        return tuple(steps)

    def _blob(self, key: str) -> bytes:
        """A pickle as it is; but the lists of parameters' names have the new names."""
        content = self.source.blob(key)
        *place, name = self.source.path_of(key)
        if name not in LISTS or "param_groups" not in place:
            return content
        out = io.BytesIO()
        torch.save(renamed(unpickled(io.BytesIO(content), f"{key!r}"), self._renames), out)
        return out.getvalue()


def _renames(streams: Mapping[Part, Stream]) -> Renames:
    """What each g and v is called afterwards; ``None`` where it becomes a part of a weight."""
    found: dict[str, str | None] = {}
    for part, stream in streams.items():
        for line in stream.lines(part):
            if line.do == "copy" and line.key != line.sources[0]:
                found[line.sources[0]] = line.key
            elif line.do == "fold":
                found |= dict.fromkeys(line.sources)
    return found
