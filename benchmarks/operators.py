"""Weight norm alone: torch's operators beside our evaluators, with a copy as the measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Block, ReadWeights
from benchmarks.peers import PEERS, STEP, Alternative, Mode, Workload, alternatives

__all__ = ["COPY", "KINDS", "Operator", "beside_copies", "copies", "middle_dim", "small"]

COPY = "copy"
# HiFi-GAN's first upsampling layer over either channel axis; wav2vec 2.0's positional convolution.
KINDS: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("first", (512, 256, 16), 0),
    ("last", (768, 48, 128), 2),
    ("middle", (512, 256, 16), 1),
)


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape for quick runs, of a sixteenth of the elements."""
    return (shape[0] // 4, shape[1] // 4, *shape[2:])


def _evaluator(shape: tuple[int, ...], dim: int, device: torch.device) -> Any:
    """The library's evaluator for a device; ImportError where the library has none."""
    from wn_surgery.fused.evaluator import Spec
    from wn_surgery.norm.options import NormOptions

    spec = Spec(shape, NormOptions(dim))
    if device.type == "cuda":
        from wn_surgery.fused.triton.evaluator import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            TritonEvaluator,
        )

        return TritonEvaluator([spec], torch.float32, device)
    from wn_surgery.fused.evaluator import Evaluator

    return Evaluator([spec])


class Operator:
    """One weight, and the operators that compute it and its gradients.

    Args:
        shape: the weight's.
        dim: the axis that keeps its norms.
        device: where it is.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, device: str) -> None:
        self.dim = dim
        self.v = torch.randn(shape, device=device)
        self.g = torch.rand_like(torch.norm_except_dim(self.v, 2, dim)) + 0.5
        self.upstream = torch.randn(shape, device=device)
        self._left_out: dict[str, str] = {}
        self._ours: Any = None
        try:
            self._ours = _evaluator(shape, dim, self.v.device)
        except ImportError as error:
            self._left_out["ours"] = str(error)

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.v.shape

    def left_out(self) -> dict[str, str]:
        """The alternatives that are missing, and why."""
        return self._left_out

    def alternatives(self, mode: Mode) -> list[Alternative]:
        """A copy twice, torch, and ours if it is there."""
        calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {"torch": self._torch(mode)}
        if self._ours is not None:
            calls["ours"] = self._evaluated(mode)
        return [
            *copies(self.v),
            *(Alternative(name, call, _named(call)) for name, call in calls.items()),
        ]

    def _torch(self, mode: Mode) -> Callable[[], tuple[Tensor, ...]]:
        v, g, dim, upstream = self.v, self.g, self.dim, self.upstream
        if dim in (0, v.ndim - 1):
            backward = torch.ops.aten._weight_norm_interface_backward.default

            def kernel() -> tuple[Tensor, ...]:
                w, norms = torch._weight_norm_interface(v, g, dim)
                return (w, *backward(upstream, v, g, norms, dim)) if mode == STEP else (w,)

            return kernel
        # The interface knows the first and the last axis only; this is what torch does instead.
        leaves = (v.clone().requires_grad_(), g.clone().requires_grad_())

        def formula() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(mode == STEP):
                w = torch._weight_norm(*leaves, dim)
            return (w, *torch.autograd.grad(w, leaves, upstream)) if mode == STEP else (w,)

        return formula

    def _evaluated(self, mode: Mode) -> Callable[[], tuple[Tensor, ...]]:
        v, g, upstream = [self.v], [self.g], [self.upstream]

        def call() -> tuple[Tensor, ...]:
            weights, norms = self._ours.forward(v, g, None)
            if mode != STEP:
                return (weights[0],)
            gradients = self._ours.backward(v, g, norms, upstream)
            return weights[0], gradients.v[0], gradients.g[0]

        return call


def _named(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], dict[str, Tensor]]:
    names = ("the weight", "the gradient of v", "the gradient of g")
    return lambda: {k: x.detach().clone() for k, x in zip(names, call(), strict=False)}


def copies(tensor: Tensor) -> list[Alternative]:
    """A copy of a tensor, twice: what reading and writing it once costs, and the noise."""

    def made(name: str) -> Alternative:
        source = tensor.detach().clone()
        return Alternative(name, source.clone, dict)

    return [made(COPY), made(f"{COPY} (A/A)")]


def _backward(upstream: list[Tensor]) -> Callable[[nn.Module, Block], Tensor]:
    def step(model: nn.Module, block: Block) -> Tensor:
        with block():
            weights = model()
            torch.autograd.backward(weights, upstream)
        first: Tensor = weights[0].detach()
        return first

    return step


def middle_dim(shape: tuple[int, int, int], device: str) -> Workload:
    """Reading a transposed convolution's weight, normed over its output channels.

    Args:
        shape: input channels, output channels, kernel.
        device: where it is.
    """
    layer = nn.ConvTranspose1d(*shape, bias=False)
    upstream = torch.randn(shape, device=device)
    return Workload(
        ReadWeights([layer]).to(device),
        {"types": "ConvTranspose1d", "dim": 1},
        lambda model: model()[0],
        step=_backward([upstream]),
        about=f"the weight of ConvTranspose1d, {shape}, dim 1: one access and its backward",
    )


@contextmanager
def beside_copies(workload: Workload, mode: Mode) -> Iterator[list[Alternative]]:
    """All that has weight norm, beside two copies of the first weight in place of the model."""
    normed = tuple(peer for peer in PEERS if not peer.name.startswith("plain"))
    weight = next(workload.model.parameters())
    with alternatives(workload, mode, normed) as others:
        yield [*copies(weight), *others]
