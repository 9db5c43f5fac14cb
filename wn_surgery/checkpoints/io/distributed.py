"""Folders of ``torch.distributed.checkpoint`` (DCP), read and written a tensor at a time.

A folder has ``.metadata``, a pickle that says where each piece of each tensor is, and files of such
pieces, each as ``torch.save`` wrote it. torch's own reader unpickles whatever ``.metadata`` names;
here only its classes are allowed, and sizes are compared with the files before anything is read.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from torch import Tensor

from wn_surgery.checkpoints.io.safetensors_file import Sink, reading, write_tensor
from wn_surgery.errors import CheckpointError, CheckpointFileError

__all__ = ["METADATA", "Distributed", "Part", "unpickled", "write_distributed"]

METADATA = ".metadata"
MAX_METADATA = 1 << 30
"""Bytes; that of a model with 405 billion parameters on 16,384 ranks has some 100 MB."""
_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Takes the classes of ``.metadata``, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of those."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor: from where to where, and its bytes in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    @property
    def ends(self) -> list[tuple[int, int]]:
        """Where it begins and ends along each axis."""
        return [(o, o + size) for o, size in zip(self.offsets, self.sizes, strict=True)]


@dataclass(frozen=True)
class _Stored:
    """One tensor, with the names that an entry of a safetensors file has."""

    shape: tuple[int, ...]
    kind: torch.dtype
    pieces: tuple[_Piece, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.kind.itemsize

    @property
    def held(self) -> int:
        """Bytes of memory that reading it takes: a piece beside the whole, if there are several."""
        pieces = [math.prod(piece.sizes) * self.kind.itemsize for piece in self.pieces]
        return self.size + (max(pieces) if len(pieces) > 1 else 0)


class Distributed:
    """A folder whose ``.metadata`` has been read, and compared with the sizes of its files.

    Attributes:
        path: the folder.
        parts: the state dicts in it, by their place in what was saved: ``("model",)``, say.
        blobs: the keys of everything that is not a tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        said = _read_metadata(path / METADATA)
        with _understanding(path):
            self._places = dict(said.storage_data)
            self._known = {name: path / name for name in self._file_names()}
            self._sizes = {name: _size_of(each) for name, each in self._known.items()}
            tensors: dict[str, _Stored] = {}
            self.blobs: list[str] = []
            for key, value in said.state_dict_metadata.items():
                if not isinstance(key, str):
                    raise CheckpointError(f"it has the key {key!r}, which is no text")
                if type(value).__name__ == "BytesStorageMetadata":
                    self._span(key, None)
                    self.blobs.append(key)
                else:
                    tensors[key] = self._stored(key, value)
            self._paths = _paths(said.planner_data, [*tensors, *self.blobs])
            self.parts: dict[tuple[str, ...], Part] = {}
            for key, stored in tensors.items():
                *place, name = self._paths[key]
                part = self.parts.setdefault(tuple(place), Part(self, tuple(place)))
                part.entries[name] = stored
                part.keys[name] = key

    def path_of(self, key: str) -> tuple[str, ...]:
        """Where a key is in the containers that were saved."""
        return self._paths[key]

    def blob(self, key: str) -> bytes:
        """The pickle of what is not a tensor, as it is; nothing unpickles it."""
        return self._bytes(*self._span(key, None))

    def read(self, stored: _Stored) -> Tensor:
        """A tensor, put together from its pieces."""
        if len(stored.pieces) == 1:
            return self._load(stored.pieces[0], stored.kind)
        if not _are_apart(stored):
            raise CheckpointError(f"{str(self.path)!r} has a tensor whose pieces overlap")
        whole = torch.empty(stored.shape, dtype=stored.kind)
        for piece in stored.pieces:
            place = tuple(slice(start, end) for start, end in piece.ends)
            whole[place] = self._load(piece, stored.kind)
        return whole

    def _load(self, piece: _Piece, dtype: torch.dtype) -> Tensor:
        where = f"the piece at byte {piece.start} of {str(self._known[piece.file])!r}"
        path = self._known[piece.file]
        with reading(path), path.open("rb", buffering=0) as file:
            window = io.BufferedReader(_Window(file, piece.start, piece.length))
            made = unpickled(window, where)
        if not isinstance(made, Tensor) or (tuple(made.shape), made.dtype) != (piece.sizes, dtype):
            raise CheckpointError(f"{where} is not the tensor that {METADATA} describes")
        return made

    def _bytes(self, name: str, start: int, length: int) -> bytes:
        path = self._known[name]
        with reading(path), path.open("rb") as file:
            file.seek(start)
            found = file.read(length)
        if len(found) < length:
            raise CheckpointError(f"{str(path)!r} became shorter while it was read")
        return found

    def _file_names(self) -> set[str]:
        names = {info.relative_path for info in self._places.values()}
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                raise CheckpointError(f"it names the file {name!r}, which is not in its own folder")
        return names

    def _span(self, key: str, offset: tuple[int, ...] | None) -> tuple[str, int, int]:
        """The file, the first byte and the count of bytes of one piece."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        info = self._places.get(MetadataIndex(key, offset))
        if info is None:
            raise CheckpointError(f"it does not say where {key!r} is stored")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{key!r} is compressed or encrypted; save it without extensions")
        start, length, name = info.offset, info.length, info.relative_path
        if not _are_sizes([start, length]):
            raise CheckpointError(f"{key!r} has a place that is not a size")
        if (have := self._sizes[name]) < start + length:
            raise CheckpointError(
                f"{str(self._known[name])!r} is cut off: {key!r} ends at byte {start + length}, "
                f"the file at {have}; copy the folder again, or take an earlier checkpoint"
            )
        return name, start, length

    def _stored(self, key: str, value: Any) -> _Stored:
        shape, dtype = tuple(value.size), value.properties.dtype
        if not isinstance(dtype, torch.dtype) or not _are_sizes(shape):
            raise CheckpointError(f"{key!r} has a shape or dtype that is none")
        pieces, covered = [], 0
        for chunk in value.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if not (_are_sizes([*offsets, *sizes]) and len(offsets) == len(sizes) == len(shape)):
                raise CheckpointError(f"{key!r} has a piece of other axes than its own")
            if any(o + s > all_ for o, s, all_ in zip(offsets, sizes, shape, strict=True)):
                raise CheckpointError(f"{key!r} has a piece outside of its shape {shape}")
            piece = _Piece(offsets, sizes, *self._span(key, offsets))
            if math.prod(sizes) * dtype.itemsize > piece.length:
                raise CheckpointError(
                    f"{key!r} has a piece of {sizes} {dtype} in {piece.length} bytes"
                )
            pieces.append(piece)
            covered += math.prod(sizes)
        if covered != math.prod(shape):
            raise CheckpointError(f"the pieces of {key!r} do not make up its shape {shape}")
        return _Stored(shape, dtype, tuple(pieces))


@dataclass(eq=False)
class Part:
    """One state dict in a folder; read as a safetensors file is."""

    owner: Distributed
    place: tuple[str, ...]
    entries: dict[str, _Stored] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # in the whole checkpoint
    metadata: None = None

    @property
    def path(self) -> Path:
        """The folder."""
        return self.owner.path

    def tensor(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return self.owner.read(self.entries[name])

    def copy(self, name: str, out: Sink) -> None:
        """Write the bytes of a tensor."""
        write_tensor(out, self.tensor(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open between two reads."""


class _Window(io.RawIOBase):
    """The bytes of one piece as a file, so that a tensor is read to where it stays."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._place = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place in the piece."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or a part of it; nothing at the end of the piece."""
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._place)]
        self._file.seek(self._start + self._place)
        count = self._file.readinto(view) if view else 0
        self._place += count
        return count


def _are_apart(stored: _Stored) -> bool:
    """Whether pieces that have a tensor's size together have each element once."""
    # On the grid of all their edges, which has no more cells than the tensor has elements.
    edges = [{0, size} for size in stored.shape]
    for piece in stored.pieces:
        for axis, ends in zip(edges, piece.ends, strict=True):
            axis.update(ends)
    index = [{edge: number for number, edge in enumerate(sorted(axis))} for axis in edges]
    there = torch.zeros([len(axis) - 1 for axis in edges], dtype=torch.bool)
    for piece in stored.pieces:
        place = zip(index, piece.ends, strict=True)
        there[tuple(slice(at[start], at[end]) for at, (start, end) in place)] = True
    return bool(there.all())


def unpickled(file: IO[bytes], where: str) -> Any:
    """The plain data or the tensor in a file or piece; ``where`` is for the error."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise  # the disk's
    except Exception as error:
        # As for PyTorch files: a damaged pickle raises whatever its last instruction called.
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {said}") from error


def write_distributed(
    folder: Path,
    tensors: Mapping[tuple[str, ...], tuple[tuple[int, ...], torch.dtype]],
    compute: Callable[[tuple[str, ...]], Tensor],
    blobs: Mapping[tuple[str, ...], Callable[[], bytes]],
) -> None:
    """Fill a folder by torch's own writer, which asks for each tensor when its turn comes.

    ``tensors`` and ``blobs`` are by their paths in the containers; joined with dots they are keys.
    """
    # From where they are defined: the package does not export them to type checkers.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
    from torch.distributed.checkpoint.state_dict_saver import save, save_state_dict

    paths = {".".join(path): path for path in (*tensors, *blobs)}
    failed: list[BaseException] = []
    alive: list[torch.UntypedStorage] = []

    def forget() -> None:
        # torch's writer keeps every tensor, so the memory of what it has written is taken away.
        while alive:
            alive.pop().resize_(0)

    class Planner(DefaultSavePlanner):
        def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
            super().set_up_planner(*args, **kwargs)
            self.mappings = cast(Any, paths)

        def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
            path = paths[write_item.index.fqn]
            try:
                if write_item.type == WriteItemType.BYTE_IO:
                    return io.BytesIO(blobs[path]())
                forget()
                tensor = compute(path).contiguous()
                if not tensor.untyped_storage().resizable():  # as torch.load makes them
                    tensor = tensor.clone()
                alive.append(tensor.untyped_storage())
                return tensor
            except Exception as error:
                failed.append(error)
                raise

    state: dict[str, Any] = {
        ".".join(path): torch.empty(shape, dtype=dtype, device="meta")
        for path, (shape, dtype) in tensors.items()
    }
    state |= {".".join(path): b"" for path in blobs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves in a single process
        # Nothing ahead: a tensor is written before the next one is asked for.
        writer = FileSystemWriter(folder, single_file_per_rank=True, per_thread_copy_ahead=0)
        try:
            if "no_dist" in inspect.signature(save).parameters:
                save(state, storage_writer=writer, planner=Planner(), no_dist=True)
            else:  # torch 2.6
                save_state_dict(state, writer, planner=Planner(), no_dist=True)
            forget()
        except CheckpointException as error:
            # torch reports the failures of all ranks, of which there is one here.
            failed += [cause for cause, _ in error.failures.values()]
            raise failed[0] from None


def _read_metadata(path: Path) -> Any:
    with reading(path):
        if path.stat().st_size > MAX_METADATA:
            raise CheckpointError(f"{str(path)!r} is over the limit of {MAX_METADATA} bytes")
        content = path.read_bytes()
    try:
        found = _Unpickler(io.BytesIO(content)).load()
    except Exception as error:
        # A damaged pickle raises whatever its last instruction called.
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{str(path)!r} is damaged, or holds more than torch writes there: {said}"
        ) from error
    if type(found).__name__ != "Metadata":
        raise CheckpointError(f"{str(path)!r} holds a {type(found).__name__}, not a Metadata")
    return found


@contextlib.contextmanager
def _understanding(path: Path) -> Iterator[None]:
    """Turn what a ``.metadata`` of wrong types raises into a CheckpointError that names it."""
    try:
        yield
    except CheckpointFileError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{str(path / METADATA)!r} is not sound: {error}") from None
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{str(path / METADATA)!r} is not sound: {said}") from error


def _size_of(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


def _are_sizes(numbers: Any) -> bool:
    return all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)


def _paths(planner_data: Any, keys: list[str]) -> dict[str, tuple[str, ...]]:
    """Where each key is in the containers; a checkpoint that does not say is flat."""
    said = planner_data if isinstance(planner_data, dict) else {}

    def of(key: str) -> Iterator[str]:
        for step in said.get(key, (key,)):
            if not isinstance(step, (str, int)):
                raise CheckpointError(f"it has {key!r} at a place that is none")
            yield str(step)

    return {key: tuple(of(key)) or (key,) for key in keys}
