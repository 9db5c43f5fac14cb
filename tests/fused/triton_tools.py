"""What the tests of the Triton path share: groups of every kind, and the truth in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.fused.models import spec_of
from wn_surgery.fused.evaluator import Gradients, Spec
from wn_surgery.fused.triton.evaluator import TritonEvaluator
from wn_surgery.fused.triton.tables import HEIGHT, WIDTHS
from wn_surgery.norm.math import g_shape, norm_except
from wn_surgery.norm.operator import weight_norm

LONG = WIDTHS[-1] + 1
MIXED = [
    spec_of((4, 3), 0),
    spec_of((4, 8), 1),
    spec_of((4, 3), None),
    spec_of((5,), 0),
    spec_of((5,), None),
    spec_of((300, 1, 5), 0),
    spec_of((2, 16, 8), 0),
    spec_of((2, 600), 0),
    spec_of((3, 2052), 0),
    spec_of((HEIGHT + 2, 3, 5), 1),
    spec_of((HEIGHT * 2, 16, 12), 1),
    spec_of((2, 3, 4, 5), (1, 2)),
    spec_of((4, 3, 2), (0, 1)),
    spec_of((4, 3, 2), ()),
    spec_of((2, LONG), 0),
    spec_of((9, LONG - 1), (), eps=1e-6),
    spec_of((HEIGHT * 3, 9), 1, eps=1e-3, norm_dtype=torch.float32),
]
# One of each kind; the interpreter is slow.
FEW = [MIXED[i] for i in (0, 4, 6, 9, 14)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Pair = tuple[list[Tensor], list[Tensor]]


def pairs(
    specs: Sequence[Spec], device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(s.shape, generator=generator) for s in specs]
    g = [torch.rand(g_shape(s.shape, s.norm.dim), generator=generator) + 0.5 for s in specs]
    return [t.to(device, dtype) for t in v], [t.to(device, dtype) for t in g]


def upstream(
    specs: Sequence[Spec], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    return [*pairs(specs, device, dtype, seed=1)[0]]


class Truth(NamedTuple):
    """In float64: a result, and the sum of the sizes of the terms that it is a sum of."""

    value: Tensor
    terms: Tensor


def truth(spec: Spec, v: Tensor, g: Tensor, grad: Tensor | None) -> list[Truth | None]:
    """Weight and gradients of v and g, by autograd through the formula."""
    x, m = (t.detach().double().cpu().requires_grad_() for t in (v, g))
    w = weight_norm(x, m, spec.norm.dim, spec.norm.eps)
    weight = Truth(w.detach(), w.detach().abs())
    if grad is None:
        return [weight, None, None]
    dw = grad.double().cpu()
    grad_v, grad_g = torch.autograd.grad(w, (x, m), dw)
    size = weight_norm(x.abs(), m, spec.norm.dim, spec.norm.eps)
    (terms_g,) = torch.autograd.grad(size, m, dw.abs())
    norm = norm_except(x.detach(), spec.norm.dim, spec.norm.eps)
    terms_v = m.detach() / norm * (dw.abs() + x.detach().abs() * terms_g / norm)
    return [weight, Truth(grad_v, terms_v), Truth(grad_g, terms_g)]


def close(found: Tensor | None, wanted: Truth | None, what: object) -> None:
    if wanted is None or found is None:
        assert found is wanted, what
        return
    value, terms = wanted
    assert found.shape == value.shape, what
    info = torch.finfo(found.dtype)
    bound = info.eps * value.abs() + 2e-6 * terms + info.smallest_normal * info.eps
    error = (found.double().cpu() - value).abs()
    assert (error <= bound).all(), (what, (error / bound).max().item())


def check(
    specs: Sequence[Spec],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    evaluator: TritonEvaluator | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Gradients]:
    """Everything that the evaluator returns, against float64."""
    dtype = v[0].dtype
    evaluator = evaluator or TritonEvaluator(specs, dtype, v[0].device)
    with torch.no_grad():
        weights, norms = evaluator.forward(v, g, out_dtype)
        found = evaluator.backward(v, g, norms, grads)
    for i, (spec, x, m, grad) in enumerate(zip(specs, v, g, grads, strict=True)):
        w, grad_v, grad_g = truth(spec, x, m, grad)
        assert weights[i].dtype == (out_dtype or dtype) and weights[i].device == x.device
        close(weights[i], w, ("w", spec))
        for got, wanted, what in ((found.v[i], grad_v, "v"), (found.g[i], grad_g, "g")):
            assert got is None or got.dtype == dtype
            close(got, wanted, (what, spec))
    return weights, found


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts the launches of each kernel."""
    counts: Counter[str] = Counter()
    original = TritonEvaluator._launch

    def counting(self: Any, kernel: Any, items: Any, *args: Any, **constants: Any) -> None:
        if items is not None:
            counts[kernel.__name__] += 1
        original(self, kernel, items, *args, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonEvaluator, "_launch", counting)
        yield counts
