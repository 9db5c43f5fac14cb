"""PyTorch files: read as plain data, written with memory for one tensor at a time."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wn_surgery.checkpoints.atomic import PREFIX, SUFFIX, atomic
from wn_surgery.checkpoints.bounds import not_dense, refuse_compressed, refuse_expanding
from wn_surgery.checkpoints.convert import Conversion, converted
from wn_surgery.checkpoints.request import Request
from wn_surgery.checkpoints.safetensors_file import unreadable
from wn_surgery.errors import CheckpointError, CheckpointFileError

__all__ = ["SUFFIXES", "convert_torch_file", "load"]

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_BLOCK = 1 << 25
_ALIGNED = 64
# As torch's weights_only unpickler names what it refuses.
_GLOBAL = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+)")


def load(path: Path, *, full_pickle: bool = False) -> Any:
    """Read a PyTorch file; its tensors stay on the disk until they are needed.

    Files in the format from before torch 1.6 are read into memory.

    Args:
        path: the file.
        full_pickle: unpickle whatever it holds. **It can then run any code.**

    Returns:
        What was saved, on the CPU.

    Raises:
        CheckpointError: it cannot be read, is damaged, or holds more than plain data.
    """
    try:
        # What is mapped is mapped privately: nothing that happens to a tensor reaches the file.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            refuse_compressed(path)
        with warnings.catch_warnings():
            # That the storage class is deprecated, which is the file's doing.
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=not full_pickle, mmap=mapped)
        refuse_expanding(found, path)
        return found
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        what = _GLOBAL.search(str(error))
        said = f"holds {what[1]}" if what else "is damaged, or holds more than plain data"
        raise CheckpointError(
            f"{str(path)!r} {said}, and loading that could run code; if you trust where the file "
            "is from, load it by full_pickle=True (--full-pickle)"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except MemoryError as error:
        raise CheckpointError(f"{str(path)!r} asks for more memory than there is") from error
    except Exception as error:
        # torch has no error of its own for this: a damaged pickle raises whatever its last
        # instruction happened to call.
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{str(path)!r} is no sound PyTorch file: {type(error).__name__}: {said}"
        ) from error


def convert_torch_file(
    source: Path,
    target: Path,
    asked: Request,
    *,
    full_pickle: bool = False,
    verify: bool = False,
) -> Conversion:
    """Write a PyTorch file in another layout.

    Args:
        source: the file.
        target: the file to write.
        asked: what to do.
        full_pickle: as in :func:`load`.
        verify: read the target back, and compare each tensor with what was to be written.

    Returns:
        What was converted.

    Raises:
        CheckpointError: the source is damaged, unsafe or ambiguous, or the target cannot be
            written.
    """
    content = load(source, full_pickle=full_pickle)
    # New weights wait in files that have no name, and so never pile up in memory.
    parking = _Parking(target.parent, source.stat().st_size)
    result: Any = None

    def check(made: Path) -> None:
        _check(made, result, full_pickle, verify)

    with atomic(target, like=source, check=check) as out:
        work = converted(content, asked, parking)
        result = work.result
        torch.save(result, out)
    return work


def _check(made: Path, result: Any, full_pickle: bool, verify: bool) -> None:
    """Raise unless a PyTorch file was written whole.

    Raises:
        CheckpointFileError: its directory or a record is not whole, or it does not hold what was
            to be written.
    """
    try:
        with zipfile.ZipFile(made) as archive:
            length = made.stat().st_size
            for record in archive.infolist():
                # Its own header has at least 30 bytes.
                if record.header_offset + 30 + record.compress_size > length:
                    raise zipfile.BadZipFile(f"{record.filename} ends behind the end")
        found = load(made, full_pickle=full_pickle)
    except (zipfile.BadZipFile, CheckpointError) as error:
        raise CheckpointFileError(f"what was written cannot be read again: {error}") from error
    written, wanted = list(_tensors(found)), list(_tensors(result))
    same = len(written) == len(wanted) and all(
        (a.dtype, a.layout) == (b.dtype, b.layout) and (a.is_nested or a.shape == b.shape)
        for a, b in zip(written, wanted, strict=True)
    )
    if not same or (verify and not all(map(_equal, written, wanted))):
        raise CheckpointFileError(
            f"what was read back from {str(made)!r} is not what was written: the disk or the "
            "memory is at fault; nothing was changed"
        )


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    # By their bytes: NaN is what it was.
    if not_dense(one) or not_dense(other) or not one.numel():
        return not_dense(one) == not_dense(other)
    one, other = (t.detach().resolve_conj().resolve_neg().contiguous() for t in (one, other))
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))


class _Parking:
    """Keeps tensors in the pages of files that have no name, many to a file."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._size = min(_BLOCK, most)
        self._block: Any = None  # an UntypedStorage, whose slices torch types as something else
        self._used = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.nbytes or tensor.is_meta:
            return tensor
        if self._block is None or self._used + tensor.nbytes > self._block.nbytes():
            self._block, self._used = self._mapped(max(self._size, tensor.nbytes)), 0
            _give_back()
        # A storage of its own, or torch.save would write the whole block for each.
        storage = self._block[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        parked: Any = torch.empty(0, dtype=tensor.dtype)  # set_ has more forms than are typed
        parked.set_(storage, 0, tensor.shape).copy_(tensor)
        return cast(Tensor, parked)

    def _mapped(self, size: int) -> Any:
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=PREFIX, suffix=SUFFIX) as file:
            if sys.platform == "linux":
                # Touching a page that a full disk has no room for would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.UntypedStorage.from_file(file.name, shared=True, nbytes=size)


def _give_back() -> None:
    """Return freed memory to the system: glibc's heap keeps what lies under a small live piece."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
