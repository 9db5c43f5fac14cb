"""The CPU path's values are the formula's bit for bit, and its gradients those of autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.fused.models import spec_of
from wn_surgery.fused import shared
from wn_surgery.fused.evaluator import Evaluator, Spec, evaluate
from wn_surgery.norm.math import Axes, g_shape
from wn_surgery.norm.operator import weight_norm
from wn_surgery.norm.options import Dim

SPECS = [
    spec_of((4, 3), 0),
    spec_of((4, 3), 1),
    spec_of((4, 3), None),
    spec_of((5,), 0),
    spec_of((5,), None),
    spec_of((4, 3, 2), 0),
    spec_of((4, 3, 2), 1),
    spec_of((4, 3, 2), 2),
    spec_of((4, 3, 2), (0, 1)),
    spec_of((4, 3, 2), (1, 2)),
    spec_of((4, 3, 2), (0, 2)),
    spec_of((4, 3, 2), ()),
    spec_of((2, 3, 4, 5), (1, 2)),
    spec_of((2, 3, 4, 5), 2, eps=0.5),
    spec_of((4, 3), 0, eps=1.0),
    spec_of((4, 3), (0, 1), eps=0.1),
    spec_of((4, 3, 2), 1, norm_dtype=torch.float64),
]
Pairs = list[tuple[Tensor, Tensor]]


def pairs(specs: list[Spec], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Any]]:
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(s.shape, generator=generator).to(dtype).requires_grad_() for s in specs]
    g = [
        torch.rand(g_shape(s.shape, s.norm.dim), generator=generator)
        .add(0.5)
        .to(dtype)
        .requires_grad_()
        for s in specs
    ]
    return v, g


def formula(spec: Spec, v: Tensor, g: Tensor) -> Tensor:
    return weight_norm(v, g, *spec.norm)


@pytest.mark.parametrize(
    ("shape", "dim", "axes"),
    [
        ((4, 3, 2), 0, Axes(1, 4, 6)),
        ((4, 3, 2), 1, Axes(4, 3, 2)),
        ((4, 3, 2), 2, Axes(12, 2, 1)),
        ((4, 3, 2), (1, 0), Axes(1, 12, 2)),
        ((4, 3, 2), (0, 2), None),
        ((4, 3, 2), None, Axes(1, 1, 24)),
    ],
)
def test_axes(shape: tuple[int, ...], dim: Dim, axes: Axes | None) -> None:
    assert spec_of(shape, dim).axes == axes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_are_the_formulas_and_gradients_right(spec: Spec, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    (v,), (g,) = pairs([spec], dtype)
    evaluator = Evaluator([spec])
    with torch.no_grad():
        (w,), norms = evaluator.forward([v], [g])
    assert torch.equal(w, formula(spec, v, g)) and w.dtype == dtype and w.is_contiguous()
    grad = torch.randn(spec.shape).to(dtype)
    with torch.no_grad():
        found = evaluator.backward([v], [g], norms, [grad])
    v64, g64 = (t.detach().double().requires_grad_() for t in (v, g))
    wanted = torch.autograd.grad(formula(spec, v64, g64), (v64, g64), grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for got, exact, like in zip((found.v[0], found.g[0]), wanted, (v, g), strict=True):
        assert got is not None and got.dtype == dtype and got.shape == like.shape
        # Where a slice is short, what is left of a gradient beside v is small against its parts.
        atol = tolerance * max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layouts_other_than_contiguous(spec: Spec) -> None:
    (v,), (g,) = pairs([spec])
    wanted = torch.autograd.grad(formula(spec, v, g).sum(), (v, g))
    strided = v.detach().permute(*reversed(range(v.ndim))).contiguous()
    strided = strided.permute(*reversed(range(v.ndim)))
    grad = torch.ones(()).expand(spec.shape)
    with torch.no_grad():
        evaluator = Evaluator([spec])
        (w,), norms = evaluator.forward([strided], [g])
        found = evaluator.backward([strided], [g], norms, [grad])
    torch.testing.assert_close(w, formula(spec, v, g))
    torch.testing.assert_close((found.v[0], found.g[0]), wanted)


def test_channels_last_is_kept() -> None:
    v = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    for dim in (0, 1, 3, None):
        g = torch.ones(g_shape(v.shape, dim))
        ((w,), _) = Evaluator([spec_of((4, 3, 2, 2), dim)]).forward([v], [g])
        assert w.is_contiguous(memory_format=torch.channels_last)


def test_a_clamped_slice_passes_no_gradient_through_its_norm() -> None:
    spec = spec_of((2, 2), 0, eps=1.0)
    v, g = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0], [5.0]])
    evaluator = Evaluator([spec])
    weights, norms = evaluator.forward([v], [g])
    assert weights[0].tolist() == [[0.0, 0.0], [3.0, 4.0]]
    found = evaluator.backward([v], [g], norms, [torch.ones(2, 2)])
    assert found.v[0] is not None and found.g[0] is not None
    assert found.v[0][0].tolist() == [2.0, 2.0]  # g / eps
    assert found.g[0][0].item() == 0.0 and found.v[0].isfinite().all()


def test_a_zero_row_is_nan_as_in_torch() -> None:
    v, g = torch.zeros(1, 2), torch.ones(1, 1)
    for dim in (0, 1, None):
        ((w,), _) = Evaluator([spec_of((1, 2), dim)]).forward(
            [v], [torch.ones(g_shape((1, 2), dim))]
        )
        assert w.isnan().any() and torch.equal(w.isnan(), weight_norm(v, g, 0).isnan())


# The node --------------------------------------------------------------------------------------


def test_one_node_for_all_and_no_saved_tensors() -> None:
    v, g = pairs(SPECS)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):  # type: ignore[arg-type]
        weights = evaluate(Evaluator(SPECS), v, g)
    assert not saved and len({w.grad_fn for w in weights}) == 1
    wanted = torch.autograd.grad(
        sum(formula(*each).sin().sum() for each in zip(SPECS, v, g, strict=True)), [*v, *g]
    )
    for _ in range(2):  # the first backward frees nothing
        found = torch.autograd.grad(sum(w.sin().sum() for w in weights), [*v, *g])
        torch.testing.assert_close(found, wanted)


def test_backward_twice_without_retaining() -> None:
    v, g = pairs(SPECS[:2])
    first, second = evaluate(Evaluator(SPECS[:2]), v, g)
    first.sum().backward()
    second.sum().backward()
    once = v[0].grad, v[1].grad
    assert all(grad is not None for grad in once)
    first.sum().backward()
    torch.testing.assert_close(
        v[0].grad, 2 * torch.autograd.grad(formula(SPECS[0], v[0], g[0]).sum(), v[0])[0]
    )


def test_undefined_gradients_stay_undefined() -> None:
    v, g = pairs(SPECS[:3])
    weights = evaluate(Evaluator(SPECS[:3]), v, g)
    weights[1].sum().backward()
    assert [t.grad is None for t in (*v, *g)] == [True, False, True] * 2


@pytest.mark.parametrize("frozen", ["v", "g", "both"])
def test_frozen_members(frozen: str) -> None:
    v, g = pairs(SPECS[:2])
    for tensor in {"v": v[:1], "g": g[:1], "both": [v[0], g[0]]}[frozen]:
        tensor.requires_grad_(False)
    first, second = evaluate(Evaluator(SPECS[:2]), v, g)
    assert first.requires_grad is (frozen != "both") and second.requires_grad
    (first.sum() + second.sum()).backward()
    for tensor in (v[0], g[0]):
        assert (tensor.grad is not None) is tensor.requires_grad
    assert v[1].grad is not None


def test_all_frozen_or_no_grad_makes_no_node() -> None:
    v, g = pairs(SPECS[:2])
    with torch.no_grad():
        assert all(w.grad_fn is None for w in evaluate(Evaluator(SPECS[:2]), v, g))
    for tensor in (*v, *g):
        tensor.requires_grad_(False)
    assert not any(w.requires_grad for w in evaluate(Evaluator(SPECS[:2]), v, g))


@pytest.mark.parametrize("which", ["v", "g"])
def test_an_edit_before_backward_is_an_error(which: str) -> None:
    v, g = pairs(SPECS[:2])
    weights = evaluate(Evaluator(SPECS[:2]), v, g)
    with torch.no_grad():
        (v if which == "v" else g)[1].mul_(2)
    with pytest.raises(RuntimeError, match=f"modified by an inplace operation: the {which} of"):
        weights[1].sum().backward()
    weights[0].sum().backward()  # takes no part in the edit


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_second_order(spec: Spec) -> None:
    v, g = ([t.detach().double().requires_grad_() for t in ts] for ts in pairs([spec]))

    def through(x: Tensor, m: Tensor) -> Tensor:
        return evaluate(Evaluator([spec]), [x], [m])[0]

    assert torch.autograd.gradcheck(through, (v[0], g[0]))
    assert torch.autograd.gradgradcheck(through, (v[0], g[0]))


def test_non_leaf_inputs() -> None:
    (v,), (g,) = pairs([SPECS[0]])
    w = evaluate(Evaluator(SPECS[:1]), [2 * v], [3 * g])[0]
    wanted = torch.autograd.grad(formula(SPECS[0], 2 * v, 3 * g).sum(), (v, g))
    torch.testing.assert_close(torch.autograd.grad(w.sum(), (v, g)), wanted)


@pytest.mark.parametrize("frozen", [(), ("original0",), ("original1",), ("original0", "original1")])
@pytest.mark.parametrize("options", [{}, {"dim": None}, {"eps": 0.5}, {"norm_dtype": "float64"}])
def test_a_weight_without_others_is_computed_as_if_it_were_not_fused(
    options: dict[str, Any], frozen: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    model = nn.Sequential(linear, nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), linear)
    wn.apply(model, {"names": "0", **options})
    for name in frozen:
        getattr(linear.parametrizations["weight"], name).requires_grad_(False)
    apart = copy.deepcopy(model)
    wn.fuse(model)
    x = torch.randn(2, 4)
    for each in (model, apart):
        each(x).square().sum().backward()
    for mine, other in zip(model.parameters(), apart.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.allclose(mine.grad, other.grad, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(x), apart(x))
    with torch.inference_mode():
        assert torch.equal(model(x), apart(x))
    with shared(model):
        weight = linear.weight
        assert linear.weight is weight
        node, other = weight.grad_fn, apart[0].weight.grad_fn
        assert type(node) is type(other)
