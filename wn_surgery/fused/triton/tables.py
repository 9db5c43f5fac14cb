"""What a group's kernels have to do, as tables of integers on the device.

The layout and the items follow from the shapes, so they are made once. Addresses do not:
they may change at any time, and a stale one is memory corruption.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wn_surgery.errors import ModelError
from wn_surgery.fused.evaluator import Spec
from wn_surgery.norm.math import g_shape

__all__ = [
    "ALIGNMENT",
    "COLUMNS",
    "FIELDS",
    "FINISH_KEPT",
    "FINISH_PARTS",
    "HEIGHT",
    "TILE",
    "WIDTHS",
    "Layout",
    "Tables",
    "is_capturing",
]

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
# Integers for each member: see Layout._add().
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


@dataclass
class Layout:
    """The places of all members, and the items of work.

    Attributes:
        weights: the places of the weights, and of the gradients of v.
        norms: the places of the norms, and of the gradients of g.
        weights_size: elements of the flat buffer of weights.
        norms_size: elements of the flat buffer of norms.
        parts_size: elements of the workspace that holds the parts of sums.
        fields: ``FIELDS`` integers for each member.
        rows: (member, first row, width) of each item of the rows kernels.
        split: (member, row or block of rows, chunk or block of columns), likewise.
        finish: (member, first norm), likewise.

    Example:
        >>> from wn_surgery.fused.evaluator import Spec
        >>> from wn_surgery.fused.triton.tables import Layout
        >>> layout = Layout.of([Spec((4, 6)), Spec((50, 2), dim=1)])
        >>> layout.rows, layout.split, layout.finish
        ([(0, 0, 32)], [(1, 0, 0), (1, 1, 0)], [(1, 0)])
        >>> layout.weights_size, layout.norms_size, layout.parts_size
        (192, 128, 4)
    """

    weights: list[_Place] = field(default_factory=list)
    norms: list[_Place] = field(default_factory=list)
    weights_size: int = 0
    norms_size: int = 0
    parts_size: int = 0
    fields: list[int] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    split: list[tuple[int, int, int]] = field(default_factory=list)
    finish: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, specs: Sequence[Spec]) -> Layout:
        """The layout of a group.

        Args:
            specs: what each weight is; ``axes`` of none is ``None``.
        """
        layout = cls()
        for member, spec in enumerate(specs):
            layout._add(member, spec)
        return layout

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
        places = (
            _place(spec.shape, self.weights_size),
            _place(g_shape(spec.shape, spec.dim), self.norms_size),
        )
        self.weights.append(places[0])
        self.norms.append(places[1])
        self.fields += [
            self.weights_size,
            self.norms_size,
            before,
            kept,
            after,
            # As bits. No norm is negative, so none is clamped where eps is 0: not even a zero.
            struct.unpack("<i", struct.pack("<f", spec.eps or -1.0))[0],
            self.parts_size,
            split_before,
            split_after,
        ]
        self.weights_size += _aligned(before * kept * after)
        self.norms_size += _aligned(kept)
        self.parts_size += split_before * kept * split_after


def _place(shape: tuple[int, ...], offset: int) -> _Place:
    strides = torch.empty(shape, device="meta").stride()
    return _Place(tuple(shape), strides, offset)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Tables:
    """A layout and the addresses of v and g, on the device.

    Attributes:
        fields: int64, ``FIELDS`` for each member.
        rows: int32 of shape (items, 3), or ``None`` for no items; see :class:`Layout`.
        split: likewise.
        finish: int32 of shape (items, 2), likewise.

    Args:
        layout: of the group.
        device: where the weights are.

    Raises:
        ModelError: a CUDA graph is being captured.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._device = device
        self._refuse_capture("its tables have to be made")
        # These copies block, so that any stream may read what they wrote.
        self.fields = torch.tensor(layout.fields, dtype=torch.int64, device=device)
        self.rows = self._items(layout.rows)
        self.split = self._items(layout.split)
        self.finish = self._items(layout.finish)
        self._addresses: list[int] = []
        self._pointers: Tensor | None = None
        self._captured: list[Tensor] = []
        self._count = len(layout.fields) // FIELDS * 3
        self._spares: list[Tensor] = []
        self._top_up()
        self._streams: set[int] = set()

    def pointers(self, v: Sequence[Tensor], g: Sequence[Tensor]) -> Tensor:
        """The addresses of tensors that stay where they are from call to call.

        Args:
            v: contiguous, on the device.
            g: likewise.

        Returns:
            int64, 3 for each member: v, g, 0. The same tensor as before, while no address
            has changed.

        Raises:
            ModelError: an address has changed while a CUDA graph is being captured.
        """
        addresses = _addresses(v, g, None)
        if self._pointers is None or addresses != self._addresses:
            self._refuse_capture("a parameter has moved, or no forward has come before")
            self._pointers = torch.tensor(addresses, dtype=torch.int64, device=self._device)
            self._addresses = addresses
            self._streams.clear()
        if is_capturing(self._device):
            # The graph goes on reading this one when another has taken its place.
            self._keep(self._pointers)
        return self._pointers

    def fresh_pointers(
        self, v: Sequence[Tensor], g: Sequence[Tensor], grads: Sequence[Tensor | None] | None
    ) -> Tensor:
        """The addresses of tensors of this call only, sent without waiting.

        Args:
            v: contiguous, on the device.
            g: likewise.
            grads: likewise; ``None``: no gradient.

        Returns:
            int64, 3 for each member, good on the current stream.

        Raises:
            ModelError: a CUDA graph is being captured, for which nothing is left to send from.
        """
        addresses = _addresses(v, g, grads)
        if self._device.type != "cuda":
            return torch.tensor(addresses, dtype=torch.int64)
        if is_capturing(self._device):
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

    def use_on(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the tables from being given away while ``stream`` reads it."""
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

    def _refuse_capture(self, why: str) -> None:
        if is_capturing(self._device):
            raise ModelError(
                f"a CUDA graph is being captured, and {why}; run a forward and a backward before "
                "each capture, and move no parameter in between",
                kind="fusion",
            )


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _addresses(
    v: Sequence[Tensor], g: Sequence[Tensor], grads: Sequence[Tensor | None] | None
) -> list[int]:
    found = [0] * (3 * len(v))
    found[0::3] = [tensor.data_ptr() for tensor in v]
    found[1::3] = [tensor.data_ptr() for tensor in g]
    if grads is not None:
        found[2::3] = [0 if grad is None else grad.data_ptr() for grad in grads]
    return found
