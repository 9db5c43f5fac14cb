"""The Triton path: a group's weights and gradients in one to four launches each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from wn_surgery.errors import ModelError
from wn_surgery.fused.evaluator import Gradients, Spec
from wn_surgery.fused.triton import why_not
from wn_surgery.fused.triton.tables import Layout, Tables
from wn_surgery.norm.math import like

__all__ = ["TritonEvaluator"]

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class TritonEvaluator:
    """Weights and gradients of a group, by kernels that read a table of addresses.

    The weights are views of one tensor, and so are the gradients of the v; none is a view to
    autograd. Members that are not contiguous are copied at each call. Everything runs on the
    current stream.

    A CUDA graph may record calls, once a forward has come before and while no parameter
    moves; the evaluator must outlive the graph.

    Args:
        specs: what each weight is.
        dtype: of every v and g: float32, bfloat16 or float16.
        device: where they are.

    Raises:
        ModelError: :func:`wn_surgery.fused.triton.why_not` has a reason against a weight, or
            a CUDA graph is being captured.

    Example:
        >>> import torch
        >>> from wn_surgery.fused.evaluator import Spec
        >>> from wn_surgery.fused.triton.evaluator import TritonEvaluator
        >>> TritonEvaluator([Spec((4, 3, 2), (0, 2))], torch.float32, torch.device("cpu"))
        Traceback (most recent call last):
        wn_surgery.errors.FusionError: weight 0 of shape (4, 3, 2): no Triton kernel for ...
    """

    def __init__(self, specs: Sequence[Spec], dtype: torch.dtype, device: torch.device) -> None:
        for i, spec in enumerate(specs):
            if why := why_not(device, dtype, spec):
                raise ModelError(f"weight {i} of shape {tuple(spec.shape)}: {why}", kind="fusion")
        self._rows: Any = importlib.import_module("wn_surgery.fused.triton.kernels")
        self._split: Any = importlib.import_module("wn_surgery.fused.triton.split_kernels")
        self._language: Any = importlib.import_module("triton.language")
        self._shapes = [torch.Size(spec.shape) for spec in specs]
        self._dtype = dtype
        self._device = device
        self._layout = Layout.of(specs)
        self._g_shapes = [torch.Size(place.shape) for place in self._layout.norms]
        with self._on_device():
            # "cuda" alone is the device that was current here; a tensor's has a number.
            self._device = torch.empty(0, device=device).device
            self._tables = Tables(self._layout, self._device)

    def forward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """See :class:`wn_surgery.fused.evaluator.Evaluator`.

        Args:
            v: as there.
            g: as there.
            out_dtype: float32, bfloat16 or float16, as the products are rounded to; ``None``:
                that of v.

        Returns:
            The weights, and the norms of all members as one float32 tensor.

        Raises:
            ModelError: a v or g is of another shape, dtype or device than the evaluator's, or
                has moved while a CUDA graph is being captured.
        """
        layout, tables = self._layout, self._tables
        dtype = self._dtype if out_dtype is None else out_dtype
        with self._on_device():
            xs, ms = (
                self._contiguous(v, self._shapes, "v"),
                self._contiguous(g, self._g_shapes, "g"),
            )
            if all(x is given for x, given in zip((*xs, *ms), (*v, *g), strict=True)):
                pointers = tables.pointers(xs, ms)
            else:
                pointers = tables.fresh_pointers(xs, ms, None)
            self._use_tables()
            weights = self._empty(layout.weights_size, dtype)
            norms = self._empty(layout.norms_size, torch.float32)
            shared = {"dtype": self._name(self._dtype), "vector": _vector(self._dtype, dtype)}
            self._launch(
                self._rows.rows_forward, tables.rows, pointers, tables.fields, tables.rows,
                weights, norms, **shared,
            )  # fmt: skip
            if tables.split is not None:
                parts = self._empty(layout.parts_size, torch.float32)
                self._launch(
                    self._split.split_sums, tables.split, pointers, tables.fields, tables.split,
                    parts, grad_dtype=None, **shared,
                )  # fmt: skip
                self._launch(
                    self._split.finish_forward, tables.finish, tables.fields, tables.finish,
                    parts, norms,
                )  # fmt: skip
                self._launch(
                    self._split.split_forward, tables.split, pointers, tables.fields, tables.split,
                    weights, norms, **shared,
                )  # fmt: skip
        # Below autograd, a part of a tensor is no view of it: each weight has a version of its
        # own, and may be written to as any other output of a node.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            out = [place.of(weights) for place in layout.weights]
        return [w if x is y else like(w, y) for w, x, y in zip(out, xs, v, strict=True)], norms

    def backward(
        self,
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        norms: Tensor,
        grads: Sequence[Tensor | None],
    ) -> Gradients:
        """See :class:`wn_surgery.fused.evaluator.Evaluator`.

        Raises:
            ModelError: a v or g is of another shape, dtype or device than the evaluator's.
        """
        layout, tables = self._layout, self._tables
        found = Gradients([None] * len(grads), [None] * len(grads))
        if all(grad is None for grad in grads):
            return found
        with self._on_device():
            xs, ms = (
                self._contiguous(v, self._shapes, "v"),
                self._contiguous(g, self._g_shapes, "g"),
            )
            ds, dtype = self._incoming(grads)
            pointers = tables.fresh_pointers(xs, ms, ds)
            self._use_tables()
            grad_v = self._empty(layout.weights_size, self._dtype)
            grad_g = self._empty(layout.norms_size, self._dtype)
            shared = {
                "dtype": self._name(self._dtype),
                "grad_dtype": self._name(dtype),
                "vector": _vector(self._dtype, dtype),
            }
            self._launch(
                self._rows.rows_backward, tables.rows, pointers, tables.fields, tables.rows,
                norms, grad_v, grad_g, **shared,
            )  # fmt: skip
            if tables.split is not None:
                parts = self._empty(layout.parts_size, torch.float32)
                dots = self._empty(layout.norms_size, torch.float32)
                self._launch(
                    self._split.split_sums, tables.split, pointers, tables.fields, tables.split,
                    parts, **shared,
                )  # fmt: skip
                self._launch(
                    self._split.finish_backward, tables.finish, pointers, tables.fields,
                    tables.finish, parts, norms, dots, grad_g,
                )  # fmt: skip
                self._launch(
                    self._split.split_backward, tables.split, pointers, tables.fields,
                    tables.split, norms, dots, grad_v, **shared,
                )  # fmt: skip
        with torch._C._AutoDispatchBelowADInplaceOrView():
            for i, grad in enumerate(grads):
                if grad is not None:
                    found.v[i] = layout.weights[i].of(grad_v)
                    found.g[i] = layout.norms[i].of(grad_g)
        for i, (x, y) in enumerate(zip(xs, v, strict=True)):
            grad = found.v[i]
            if x is not y and grad is not None:
                found.v[i] = like(grad, y)
        return found

    def _on_device(self) -> AbstractContextManager[None]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _use_tables(self) -> None:
        if self._device.type == "cuda":
            self._tables.use_on(torch.cuda.current_stream(self._device))

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._device)

    def _name(self, dtype: torch.dtype) -> Any:
        return getattr(self._language, _NAMES[dtype])

    def _launch(
        self, kernel: Any, items: Tensor | None, *args: Tensor | None, **constants: Any
    ) -> None:
        if items is not None:
            kernel[(len(items),)](*args, **constants, num_warps=self._rows.WARPS)

    def _contiguous(
        self, tensors: Sequence[Tensor], shapes: Sequence[torch.Size], part: str
    ) -> list[Tensor]:
        dtype, device = self._dtype, self._device
        found: list[Tensor] = []
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
                raise ModelError(
                    f"the {part} of weight {i} is {tuple(tensor.shape)}, {tensor.dtype}, "
                    f"{tensor.device}; the group was made for {tuple(shape)}, {dtype}, {device}: "
                    "call wn_surgery.fuse(model) again",
                    kind="fusion",
                )
            found.append(tensor.contiguous())
        return found

    def _incoming(self, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], torch.dtype]:
        """The gradients of the weights, contiguous and of one dtype."""
        dtypes = {grad.dtype for grad in grads if grad is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        dtype = dtype if dtype in _NAMES else torch.float32
        return [None if grad is None else grad.to(dtype).contiguous() for grad in grads], dtype


def _vector(*dtypes: torch.dtype) -> int:
    return 16 // min(dtype.itemsize for dtype in dtypes)
