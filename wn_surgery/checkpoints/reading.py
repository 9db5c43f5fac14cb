"""Reading a checkpoint of any kind, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wn_surgery.checkpoints.containers import shapes_of, walk
from wn_surgery.checkpoints.folders import find
from wn_surgery.checkpoints.folding import kind_of
from wn_surgery.checkpoints.io.distributed import Distributed
from wn_surgery.checkpoints.io.safetensors_file import File, owners_of
from wn_surgery.checkpoints.io.torch_file import load
from wn_surgery.checkpoints.pairs import Shape
from wn_surgery.checkpoints.plan import Kind
from wn_surgery.norm.options import NormOptions

__all__ = ["State", "is_model", "opened"]


@dataclass(frozen=True)
class State:
    """One state dict of a checkpoint; ``read`` gives a tensor by its key.

    ``path`` is where it is in the container, such as ``"generator/"``; ``known`` has the options
    that a record gives to its weights.
    """

    path: str
    shapes: Mapping[str, Shape]
    kinds: Mapping[str, Kind]
    known: Mapping[str, NormOptions]
    read: Callable[[str], Tensor]

    @property
    def is_model(self) -> bool:
        """Whether its keys are names of parameters, and not those of an optimizer's moments."""
        return is_model(self.shapes)


def is_model(keys: Iterable[str]) -> bool:
    """Whether keys are names of parameters, and not those of an optimizer's moments."""
    starts = ("weight", "bias", "parametrizations")
    return any("." in key or key.startswith(starts) for key in keys)


@contextlib.contextmanager
def opened(path: Path, *, full_pickle: bool = False) -> Iterator[list[State]]:
    """The state dicts that have tensors, in the order of the file; until the block ends."""
    found = find(path)
    if found.is_torch:
        states = []
        for place, mapping, known in walk(load(found.main, full_pickle=full_pickle)):
            if shapes := shapes_of(mapping):
                kinds = {key: kind_of(mapping[key]) for key in shapes}
                states.append(State(place, shapes, kinds, known, mapping.__getitem__))
        yield states
        return
    if found.is_distributed:
        yield [
            State("".join(f"{step}/" for step in place), shapes, kinds, {}, part.tensor)
            for place, part in Distributed(found.path).parts.items()
            for shapes in [{name: entry.shape for name, entry in part.entries.items()}]
            for kinds in [{name: entry.kind for name, entry in part.entries.items()}]
        ]
        return
    with contextlib.ExitStack() as stack:
        owners = owners_of(stack.enter_context(File(each)) for each in found.files)
        entries = {name: file.entries[name] for name, file in owners.items()}
        sizes = {name: entry.shape for name, entry in entries.items()}
        dtypes = {name: entry.kind for name, entry in entries.items()}
        yield [State("", sizes, dtypes, found.known, lambda name: owners[name].tensor(name))]
