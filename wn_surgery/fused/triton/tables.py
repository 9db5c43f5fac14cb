"""What a group's kernels have to do, as tables of integers on the device.

The work follows from the shapes, so it is laid out once. Addresses do not: they may change at
any time, and a stale one is memory corruption.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wn_surgery.errors import ModelError
from wn_surgery.fused.evaluator import Spec
from wn_surgery.norm.math import g_shape

__all__ = [
    "ALIGNMENT", "COLUMNS", "FIELDS", "FINISH_KEPT", "FINISH_PARTS", "HEIGHT", "TILE", "WIDTHS",
    "Tables", "Work",
]  # fmt: skip

# Elements that one program holds in registers: 16 for each thread of 8 warps.
TILE = 4096
# Rows take the narrowest of these; a longer row is split. Each is a branch of a kernel, so they
# are few: what a row leaves empty of its width costs instructions, not memory traffic. One row
# of twice the tile still leaves room for two programs on a multiprocessor.
WIDTHS = (32, 128, 512, 2048, 8192)
# The tile of what is normed along columns.
HEIGHT, COLUMNS = 32, 128
# How many norms a program finishes, and how many of their parts it adds up at a time.
FINISH_KEPT, FINISH_PARTS = 8, 256
# Each tensor starts at a multiple of this many elements: a cache line, if they are 2 bytes wide.
ALIGNMENT = 64
# Integers for each member: see Work._add().
FIELDS = 9
# How many times one CUDA graph's capture may send addresses through a group's tables.
_SPARES = 8


@dataclass(frozen=True)
class _Place:
    """Where the tensors of one member are in the flat buffers, counted in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.strides, self.offset)


class Work:
    """The places of all members in the flat buffers, and the items of work of each kernel."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        # The places of the weights and the gradients of v; of the norms and the gradients of g.
        self.weights: list[_Place] = []
        self.norms: list[_Place] = []
        # Elements of the flat buffers, and of the workspace for the parts of sums.
        self.weights_size = self.norms_size = self.parts_size = 0
        self.fields: list[int] = []
        # (member, first row, width); (member, row or block of rows, chunk or block of columns);
        # (member, first norm).
        self.rows: list[tuple[int, int, int]] = []
        self.split: list[tuple[int, int, int]] = []
        self.finish: list[tuple[int, int]] = []
        for member, spec in enumerate(specs):
            self._add(member, spec)

    def _add(self, member: int, spec: Spec) -> None:
        assert spec.axes is not None  # why_not() has checked it
        before, kept, after = spec.axes
        split_before, split_after = 0, 0
        if before > 1:
            split_before, split_after = -(-before // HEIGHT), after
            blocks = range(-(-kept * after // COLUMNS))
            self.split += [(member, i, j) for i in range(split_before) for j in blocks]
        elif after > WIDTHS[-1]:
            split_before, split_after = 1, -(-after // TILE)
            self.split += [(member, i, j) for i in range(kept) for j in range(split_after)]
        else:
            width = next(width for width in WIDTHS if after <= width)
            self.rows += [(member, first, width) for first in range(0, kept, max(1, TILE // width))]
        if split_before:
            self.finish += [(member, first) for first in range(0, kept, FINISH_KEPT)]
        self.weights.append(_place(spec.shape, self.weights_size))
        self.norms.append(_place(g_shape(spec.shape, spec.norm.dim), self.norms_size))
        # As bits. No norm is negative, so none is clamped where eps is 0: not even a zero.
        eps = struct.unpack("<i", struct.pack("<f", spec.norm.eps or -1.0))[0]
        self.fields += [self.weights_size, self.norms_size, before, kept, after, eps]
        self.fields += [self.parts_size, split_before, split_after]
        self.weights_size += _aligned(before * kept * after)
        self.norms_size += _aligned(kept)
        self.parts_size += split_before * kept * split_after


def _place(shape: tuple[int, ...], offset: int) -> _Place:
    return _Place(tuple(shape), torch.empty(shape, device="meta").stride(), offset)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Tables:
    """The work of a group and the addresses of its v and g, on the device.

    ``fields`` is int64, ``FIELDS`` for each member; ``rows``, ``split`` and ``finish`` are int32,
    a row for each item, or ``None`` for no items.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._device = device
        self._refuse_capture("its tables have to be made")
        # These copies block, so that any stream may read what they wrote.
        self.fields = torch.tensor(work.fields, dtype=torch.int64, device=device)
        self.rows = self._items(work.rows)
        self.split = self._items(work.split)
        self.finish = self._items(work.finish)
        self._addresses: list[int] = []
        self._pointers: Tensor | None = None
        self._captured: list[Tensor] = []
        self._count = len(work.fields) // FIELDS * 3
        self._spares: list[Tensor] = []
        self._top_up()
        self._streams: set[int] = set()

    def pointers(self, v: Sequence[Tensor], g: Sequence[Tensor]) -> Tensor:
        """The addresses of v and g (3 for each member: v, g, 0), sent when one has changed."""
        addresses = _addresses(v, g, None)
        if self._pointers is None or addresses != self._addresses:
            self._refuse_capture("a parameter has moved, or no forward has come before")
            self._pointers = torch.tensor(addresses, dtype=torch.int64, device=self._device)
            self._addresses = addresses
            self._streams.clear()
        if self._is_capturing():
            # The graph goes on reading this one when another has taken its place.
            self._keep(self._pointers)
        return self._pointers

    def fresh_pointers(
        self, v: Sequence[Tensor], g: Sequence[Tensor], grads: Sequence[Tensor | None] | None
    ) -> Tensor:
        """The addresses of tensors of this call only, sent on the current stream without waiting.

        There are 3 for each member: v, g and the gradient of w, which is 0 where there is none.
        """
        addresses = _addresses(v, g, grads)
        if self._device.type != "cuda":
            return torch.tensor(addresses, dtype=torch.int64)
        if self._is_capturing():
            # Memory cannot be pinned now. A replay copies from it again, so it is kept.
            if not self._spares:
                self._refuse_capture(f"it has more than {_SPARES} forwards or backwards of a group")
            host = self._spares.pop()
            host.copy_(torch.tensor(addresses, dtype=torch.int64))
            self._keep(host)
        else:
            # No ring of buffers: torch's allocator of pinned memory gives a block away again
            # only when the copies that read it are done.
            self._top_up()
            host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
        return host.to(self._device, non_blocking=True)

    def use(self) -> None:
        """Keep the tables' memory from being given away while the current stream reads it."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream in self._streams:
            return
        self._streams.add(stream.cuda_stream)
        for tensor in (self.fields, self.rows, self.split, self.finish, self._pointers):
            if tensor is not None:
                tensor.record_stream(stream)

    def _items(self, items: Sequence[tuple[int, ...]]) -> Tensor | None:
        return torch.tensor(items, dtype=torch.int32, device=self._device) if items else None

    def _top_up(self) -> None:
        while self._device.type == "cuda" and len(self._spares) < _SPARES:
            self._spares.append(torch.empty(self._count, dtype=torch.int64, pin_memory=True))

    def _keep(self, tensor: Tensor) -> None:
        if not any(tensor is kept for kept in self._captured):
            self._captured.append(tensor)

    def _is_capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _refuse_capture(self, why: str) -> None:
        if self._is_capturing():
            raise ModelError(
                f"a CUDA graph is being captured, and {why}; run a forward and a backward before "
                "each capture, and move no parameter in between",
                kind="fusion",
            )


def _addresses(
    v: Sequence[Tensor], g: Sequence[Tensor], grads: Sequence[Tensor | None] | None
) -> list[int]:
    found = [0] * (3 * len(v))
    found[0::3] = [tensor.data_ptr() for tensor in v]
    found[1::3] = [tensor.data_ptr() for tensor in g]
    if grads is not None:
        found[2::3] = [0 if grad is None else grad.data_ptr() for grad in grads]
    return found
