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
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wn_surgery.errors import CheckpointError

from .atomic import PREFIX, SUFFIX, atomic
from .convert import Conversion, converted
from .request import Request
from .safetensors_file import unreadable

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
        with warnings.catch_warnings():
            # That the storage class is deprecated, which is the file's doing.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=not full_pickle, mmap=mapped)
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
    source: Path, target: Path, asked: Request, *, full_pickle: bool = False
) -> Conversion:
    """Write a PyTorch file in another layout.

    Args:
        source: the file.
        target: the file to write.
        asked: what to do.
        full_pickle: as in :func:`load`.

    Returns:
        What was converted.

    Raises:
        CheckpointError: the source is damaged, unsafe or ambiguous, or the target cannot be
            written.
    """
    content = load(source, full_pickle=full_pickle)
    with atomic(target, like=source) as out:
        # New weights wait in files that have no name, and so never pile up in memory.
        work = converted(content, asked, _Parking(target.parent, source.stat().st_size))
        torch.save(work.result, out)
    return work


class _Parking:
    """Keeps tensors in the pages of files that have no name, many to a file."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._size = min(_BLOCK, most)
        self._block: Any = None  # an UntypedStorage, whose slices torch types as something else
        self._used = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.nbytes:
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
                file.write(bytes(size))
                file.flush()
            return torch.UntypedStorage.from_file(file.name, shared=True, nbytes=size)


def _give_back() -> None:
    """Return freed memory to the system: glibc's heap keeps what lies under a small live piece."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
