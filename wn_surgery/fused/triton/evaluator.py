"""The Triton path: a group's weights and gradients in one to four launches each."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from wn_surgery.errors import ModelError
from wn_surgery.fused.evaluator import Evaluator, Gradients, Spec
from wn_surgery.fused.triton.tables import Tables, Work
from wn_surgery.norm.math import like
from wn_surgery.norm.options import dtype_name

__all__ = ["TritonEvaluator", "why_not"]

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_CAPABILITY = {torch.float32: (7, 0), torch.float16: (7, 0), torch.bfloat16: (8, 0)}


_OLDEST = (3, 7)  # as pyproject.toml says


def why_not(device: torch.device, dtype: torch.dtype, spec: Spec) -> str | None:
    """Why the Triton kernels cannot compute a weight on ``device``; ``None`` if they can.

    On the CPU they run in Triton's interpreter only (``TRITON_INTERPRET=1`` in the environment),
    which is for testing them.
    """
    if dtype not in _CAPABILITY:
        return f"no Triton kernel for {dtype_name(dtype)}"
    if spec.norm.norm_dtype not in (None, torch.float32):
        name = dtype_name(spec.norm.norm_dtype)
        return f"the Triton kernels compute norms in float32, not {name}"
    axes = spec.axes
    if axes is None:
        return f"no Triton kernel for norms over separate axes, dim={spec.norm.dim}"
    size = axes.before * axes.kept * axes.after
    if size == 0:
        return "it has no elements"
    if size > 2**31 - 1:
        return f"it has {size} elements; the Triton kernels count to 2147483647"
    if why := _why_not_triton():
        return why
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        return None if interpreted else "Triton has no kernels for the CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA's devices"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter works on the CPU only"
    if not torch.cuda.is_available():
        return "no CUDA device"
    has, needed = torch.cuda.get_device_capability(device), _CAPABILITY[dtype]
    if has < needed:
        return (
            f"{dtype_name(dtype)} needs compute capability {needed[0]}.{needed[1]}; "
            f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}"
        )
    return None


def _why_not_triton() -> str | None:
    if not _is_installed("triton"):
        return "triton is not installed; pip install 'wn-surgery[triton]'"
    import triton

    found = str(triton.__version__)
    if tuple(map(int, found.split(".")[:2])) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        return f"triton {found} is installed; the kernels need {wanted} or newer"
    return None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a finder that blocks it; a module without a spec
        return False


class TritonEvaluator(Evaluator):
    """Weights and gradients of a group, by kernels that read a table of addresses.

    The weights are views of one tensor, and so are the gradients of the v; none is a view to
    autograd. Members that are not contiguous are copied at each call. Everything runs on the
    current stream. A CUDA graph may record calls, once a forward has come before and while no
    parameter moves; the evaluator must outlive the graph.
    """

    def __init__(self, specs: Sequence[Spec], dtype: torch.dtype, device: torch.device) -> None:
        for i, spec in enumerate(specs):
            if why := why_not(device, dtype, spec):
                raise ModelError(f"weight {i} of shape {tuple(spec.shape)}: {why}", kind="fusion")
        self._kernels: Any = importlib.import_module("wn_surgery.fused.triton.kernels")
        self._language: Any = importlib.import_module("triton.language")
        super().__init__(specs)
        self._dtype = dtype
        self._device = device
        self._work = Work(specs)
        self._shapes = [torch.Size(place.shape) for place in self._work.weights]
        self._g_shapes = [torch.Size(place.shape) for place in self._work.norms]
        with self._on_device():
            # "cuda" alone is the device that was current here; a tensor's has a number.
            self._device = torch.empty(0, device=device).device
            self._tables = Tables(self._work, self._device)

    def forward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The weights as parts of one tensor, and the norms as one float32 tensor."""
        work, tables, kernels = self._work, self._tables, self._kernels
        fields, rows, split, finish = tables.fields, tables.rows, tables.split, tables.finish
        dtype = self._dtype if out_dtype is None else out_dtype
        with self._on_device():
            xs = self._contiguous(v, self._shapes, "v")
            ms = self._contiguous(g, self._g_shapes, "g")
            if all(x is given for x, given in zip((*xs, *ms), (*v, *g), strict=True)):
                pointers = tables.pointers(xs, ms)
            else:
                pointers = tables.fresh_pointers(xs, ms, None)
            tables.use()
            weights = self._empty(work.weights_size, dtype)
            norms = self._empty(work.norms_size, torch.float32)
            options = {"dtype": self._type(self._dtype), "vector": _vector(self._dtype, dtype)}
            tile = pointers, fields, split
            self._launch(
                kernels.rows_forward, rows, pointers, fields, rows, weights, norms, **options
            )
            if split is not None:
                parts = self._empty(work.parts_size, torch.float32)
                self._launch(kernels.split_sums, split, *tile, parts, grad_dtype=None, **options)
                self._launch(kernels.finish_forward, finish, fields, finish, parts, norms)
                self._launch(kernels.split_forward, split, *tile, weights, norms, **options)
        # Below autograd, a part of a tensor is not a view of it: each weight has a version of its
        # own, and may be written to as any other output of a node.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            out = [place.of(weights) for place in work.weights]
        return [w if x is y else like(w, y) for w, x, y in zip(out, xs, v, strict=True)], norms

    def backward(
        self,
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        norms: Tensor,
        grads: Sequence[Tensor | None],
    ) -> Gradients:
        """The gradients of each v and each g, as parts of two tensors."""
        work, tables, kernels = self._work, self._tables, self._kernels
        fields, rows, split, finish = tables.fields, tables.rows, tables.split, tables.finish
        found = Gradients([None] * len(grads), [None] * len(grads))
        if all(grad is None for grad in grads):
            return found
        with self._on_device():
            xs = self._contiguous(v, self._shapes, "v")
            ms = self._contiguous(g, self._g_shapes, "g")
            ds, dtype = self._incoming(grads)
            pointers = tables.fresh_pointers(xs, ms, ds)
            tables.use()
            grad_v = self._empty(work.weights_size, self._dtype)
            grad_g = self._empty(work.norms_size, self._dtype)
            options = {
                "dtype": self._type(self._dtype),
                "grad_dtype": self._type(dtype),
                "vector": _vector(self._dtype, dtype),
            }
            tile = pointers, fields, split
            self._launch(
                kernels.rows_backward,
                rows,
                pointers,
                fields,
                rows,
                norms,
                grad_v,
                grad_g,
                **options,
            )
            if split is not None:
                parts = self._empty(work.parts_size, torch.float32)
                dots = self._empty(work.norms_size, torch.float32)
                self._launch(kernels.split_sums, split, *tile, parts, **options)
                self._launch(
                    kernels.finish_backward, finish,
                    pointers, fields, finish, parts, norms, dots, grad_g,
                )  # fmt: skip
                self._launch(kernels.split_backward, split, *tile, norms, dots, grad_v, **options)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            for i, (grad, x, y) in enumerate(zip(grads, xs, v, strict=True)):
                if grad is not None:
                    part = work.weights[i].of(grad_v)
                    found.v[i] = part if x is y else like(part, y)
                    found.g[i] = work.norms[i].of(grad_g)
        return found

    def _on_device(self) -> AbstractContextManager[None]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._device)

    def _type(self, dtype: torch.dtype) -> Any:
        return getattr(self._language, _NAMES[dtype])

    def _launch(
        self, kernel: Any, items: Tensor | None, *args: Tensor | None, **constants: Any
    ) -> None:
        if items is not None:
            kernel[(len(items),)](*args, **constants, num_warps=self._kernels.WARPS)

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
