"""Reading a checkpoint of any kind, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wn_surgery.checkpoints.contents import shapes_of, walk
from wn_surgery.checkpoints.folders import Source, find
from wn_surgery.checkpoints.header import TORCH
from wn_surgery.checkpoints.pairs import Options, Shape
from wn_surgery.checkpoints.safetensors_file import File
from wn_surgery.checkpoints.torch_file import load
from wn_surgery.errors import CheckpointError

__all__ = ["State", "opened"]


@dataclass(frozen=True)
class State:
    """One state dict of a checkpoint.

    Attributes:
        path: where it is in the container, such as ``"generator/"``; empty for the whole.
        shapes: the shape of each tensor by key.
        dtypes: torch's dtype, or where torch has none the name that the file gives it.
        known: the options that a record has for its weights.
        read: a tensor by its key.
    """

    path: str
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype | str]
    known: Mapping[str, Options]
    read: Callable[[str], Tensor]

    @property
    def is_model(self) -> bool:
        """Whether its keys are names of parameters, and not those of an optimizer's moments."""
        return any(
            "." in key or key.startswith(("weight", "bias", "parametrizations"))
            for key in self.shapes
        )


@contextlib.contextmanager
def opened(path: Path, *, full_pickle: bool = False) -> Iterator[list[State]]:
    """The state dicts of a checkpoint, until the block ends.

    Args:
        path: as in :func:`wn_surgery.checkpoints.convert_file`.
        full_pickle: as in :func:`wn_surgery.checkpoints.convert_file`.

    Yields:
        The states that have tensors, in the order of the file.

    Raises:
        CheckpointError: it cannot be read, or is not sound.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from wn_surgery.checkpoints.reading import opened
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 1, "net": {"fc.bias": torch.ones(2)}}, f"{folder}/a.pt")
        ...     with opened(Path(folder) / "a.pt") as states:
        ...         [(state.path, dict(state.shapes)) for state in states]
        [('net/', {'fc.bias': (2,)})]
    """
    found = find(path)
    if found.is_torch:
        content = load(found.main, full_pickle=full_pickle)
        yield [_of_mapping(*each) for each in walk(content) if shapes_of(each[1])]
        return
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(File(each)) for each in found.files]
        yield [_of_files(files, found)]


def _of_mapping(path: str, mapping: Mapping[str, Tensor], known: Mapping[str, Options]) -> State:
    shapes = shapes_of(mapping)
    return State(
        path, shapes, {key: mapping[key].dtype for key in shapes}, known, lambda key: mapping[key]
    )


def _of_files(files: list[File], found: Source) -> State:
    owners = {name: file for file in files for name in file.entries}
    if len(owners) < sum(len(file.entries) for file in files):
        raise CheckpointError(f"{str(found.main)!r} has a tensor in two of its shards")
    entries = {name: file.entries[name] for name, file in owners.items()}
    return State(
        "",
        {name: entry.shape for name, entry in entries.items()},
        {name: TORCH.get(entry.dtype, entry.dtype) for name, entry in entries.items()},
        found.known,
        lambda name: owners[name].tensor(name),
    )
