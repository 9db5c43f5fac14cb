"""Tests of the Triton evaluator on a device: the CPU's interpreter, or CUDA.

They are collected where they are imported beside a fixture ``device``: by
test_triton_kernels.py and by gpu/test_triton_gpu.py.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.fused.models import spec_of
from tests.fused.triton_tools import DTYPES, FEW, LONG, MIXED, check, launches, pairs, upstream
from wn_surgery.errors import FusionError
from wn_surgery.fused.evaluator import evaluate
from wn_surgery.fused.triton.evaluator import TritonEvaluator, why_not
from wn_surgery.fused.triton.tables import ALIGNMENT, FINISH_PARTS, HEIGHT, TILE, WIDTHS
from wn_surgery.norm.operator import weight_norm

__all__ = [
    "test_a_clamped_slice_passes_no_gradient_through_its_norm",
    "test_a_group_of_other_tensors_is_refused",
    "test_a_row_of_zeros_without_eps_is_nan",
    "test_addresses_are_sent_again_only_when_one_has_changed",
    "test_autograd_through_the_node",
    "test_every_axis_of_every_dtype",
    "test_gradients_of_another_dtype_and_layout",
    "test_hundreds_of_members",
    "test_infinities_and_nans_are_kept",
    "test_layouts_other_than_contiguous",
    "test_lengths_around_every_limit",
    "test_no_more_than_four_launches",
    "test_out_dtype",
    "test_outputs_are_aligned_parts_of_one_tensor",
    "test_parameters_that_move_between_calls",
    "test_random_groups",
    "test_results_do_not_change_from_run_to_run",
    "test_storage_offsets",
    "test_undefined_gradients_stay_undefined",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_axis_of_every_dtype(device: torch.device, dtype: torch.dtype) -> None:
    specs = MIXED if dtype is torch.float32 or device.type == "cuda" else MIXED[::2]
    check(specs, *pairs(specs, device, dtype), upstream(specs, device, dtype))


def test_no_more_than_four_launches(device: torch.device) -> None:
    rows, split = FEW[:2], [spec_of((40, 3), 1)]
    for specs, kinds in ((rows, 1), (split, 3), (FEW, 4)):
        v, g = pairs(specs, device)
        evaluator = TritonEvaluator(specs, torch.float32, device)
        with torch.no_grad():
            with launches() as forward:
                _, norms = evaluator.forward(v, g)
            with launches() as backward:
                evaluator.backward(v, g, norms, upstream(specs, device))
        assert len(forward) == len(backward) == kinds
        assert set(forward.values()) == set(backward.values()) == {1}


def test_lengths_around_every_limit(device: torch.device) -> None:
    lengths = [1, 2, 7, *(w + d for w in (*WIDTHS, TILE) for d in (0, 1)), 100_000]
    specs = [spec_of((2, length), 0) for length in lengths]
    specs += [spec_of((length, 2), 1) for length in (1, HEIGHT, HEIGHT + 1, 1001)]
    specs += [spec_of((2, length), 1) for length in (1, 127, 128, 129)]
    # More parts of each norm than are added up at a time.
    specs.append(spec_of((HEIGHT + 1, 2, FINISH_PARTS * 3 // 4), 1))
    # Of as many rows as a program does, one less and one more.
    specs += [spec_of((TILE // width + d, width), 0) for width in (128, 2048) for d in (-1, 1)]
    check(specs, *pairs(specs, device), upstream(specs, device))


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_dtype(device: torch.device, dtype: torch.dtype, out: torch.dtype) -> None:
    specs = [MIXED[i] for i in (0, 1, 6, 10, 14)]
    v, g = pairs(specs, device, dtype)
    weights, _ = check(specs, v, g, upstream(specs, device, out), out_dtype=out)
    if dtype is torch.float32 and (out is torch.float16 or device.type == "cuda"):
        # Rounded once: what a cast of the wide weights gives. The interpreter cuts bfloat16 off;
        # test_triton_compile.py sees that the compiler does not.
        with torch.no_grad():
            wide, _ = TritonEvaluator(specs, dtype, device).forward(v, g)
        assert all(torch.equal(a, b.to(out)) for a, b in zip(weights, wide, strict=True))


def test_gradients_of_another_dtype_and_layout(device: torch.device) -> None:
    specs = [spec_of((6, 8), 0), spec_of((40, 8), 1), spec_of((6, 8), None), spec_of((4, 3), 0)]
    grads: list[Tensor | None] = [
        torch.randn(8, 6, device=device).t(),
        torch.randn(40, 8, dtype=torch.bfloat16, device=device),
        torch.ones((), dtype=torch.float64, device=device).expand(6, 8),
        torch.randn(13, device=device)[1:].view(4, 3),
    ]
    check(specs, *pairs(specs, device), grads)
    check(specs[2:3], *pairs(specs[2:3], device), grads[2:3])
    v, g = pairs(specs[:1], device, torch.float16)
    check(specs[:1], v, g, [torch.randn(6, 8, device=device)])


def test_undefined_gradients_stay_undefined(device: torch.device) -> None:
    v, g = pairs(FEW, device)
    evaluator = TritonEvaluator(FEW, torch.float32, device)
    for keep in (0, 1):
        grads = [d if i % 2 == keep else None for i, d in enumerate(upstream(FEW, device))]
        check(FEW, v, g, grads, evaluator)
    with torch.no_grad():
        _, norms = evaluator.forward(v, g)
        with launches() as counts:
            found = evaluator.backward(v, g, norms, [None] * len(v))
    assert not counts and found == ([None] * len(v), [None] * len(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_storage_offsets(device: torch.device, dtype: torch.dtype) -> None:
    """Addresses that are no multiple of 16 bytes: of v, then of g and the gradient."""
    specs = [MIXED[i] for i in (6, 8, 10, 14)]

    def shifted(tensor: Tensor) -> Tensor:
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=device)
        moved = flat[1:].view(tensor.shape).copy_(tensor)
        assert moved.data_ptr() % 16 != 0
        return moved

    v, g = pairs(specs, device, dtype)
    grads = [d for d in upstream(specs, device, dtype) if d is not None]
    check(specs, [*map(shifted, v)], g, grads)
    check(specs, v, [*map(shifted, g)], [*map(shifted, grads)])


def test_layouts_other_than_contiguous(device: torch.device) -> None:
    specs = [
        spec_of((6, 4, 3, 3), 0),
        spec_of((6, 4, 3, 3), 1),
        spec_of((40, 6), 1),
        spec_of((4, 6), 0),
    ]
    v, g = pairs(specs, device)
    v[0] = v[0].to(memory_format=torch.channels_last)
    v[1] = v[1].to(memory_format=torch.channels_last)
    v[2] = v[2].t().contiguous().t()
    g[3] = g[3].repeat(1, 2)[:, ::2]
    assert not any(t.is_contiguous() for t in (*v[:3], g[3]))
    evaluator = TritonEvaluator(specs, torch.float32, device)
    for _ in range(2):
        weights, found = check(specs, v, g, upstream(specs, device), evaluator)
        for tensor in (weights[0], weights[1], found.v[0], found.v[1]):
            assert tensor is not None
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for tensor in v:
                tensor.mul_(-0.5)  # what was copied before is of no use now


def test_parameters_that_move_between_calls(device: torch.device) -> None:
    specs = [MIXED[i] for i in (0, 10, 14)]
    grads = upstream(specs, device)
    parameters: list[list[nn.Parameter]] = [[*map(nn.Parameter, ts)] for ts in pairs(specs, device)]
    evaluator = TritonEvaluator(specs, torch.float32, device)
    for i in range(3):
        v, g = parameters
        check(specs, v, g, grads, evaluator)
        new_v, new_g = pairs(specs, device, seed=10 + i)
        if i == 0:  # another storage
            v[0].data = new_v[0]
            g[2].data = new_g[2]
        elif i == 1:  # another layout at the same address
            with torch.no_grad():
                v[0].set_(v[0].untyped_storage(), 0, (4, 3), (1, 4))
        else:  # another parameter
            v[i - 1] = nn.Parameter(new_v[i - 1])
    # A move between forward and backward.
    v, g = parameters
    with torch.no_grad():
        _, norms = evaluator.forward(v, g)
        wanted = evaluator.backward(v, g, norms, grads)
        for tensor in (*v, *g):
            old, tensor.data = tensor.data, tensor.data.clone()
            old.zero_()
        found = evaluator.backward(v, g, norms, grads)
    for a, b in zip((*found.v, *found.g), (*wanted.v, *wanted.g), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_addresses_are_sent_again_only_when_one_has_changed(device: torch.device) -> None:
    specs = [MIXED[i] for i in (0, 10)]
    v, g = pairs(specs, device)
    evaluator = TritonEvaluator(specs, torch.float32, device)
    tables = evaluator._tables
    first = tables.pointers(v, g)
    assert tables.pointers(v, g) is first
    assert tables.pointers([*map(Tensor.detach, v)], g) is first
    g[1] = g[1].clone()
    second = tables.pointers(v, g)
    assert second is not first and second.tolist()[4] == g[1].data_ptr()


def test_a_group_of_other_tensors_is_refused(device: torch.device) -> None:
    specs = [spec_of((4, 3), 0)]
    v, g = pairs(specs, device)
    evaluator = TritonEvaluator(specs, torch.float32, device)
    others = [(v[0].t(), g[0]), (v[0].half(), g[0]), (v[0].to("meta"), g[0]), (v[0], g[0][:2])]
    for x, m in others:
        with pytest.raises(FusionError, match="the group was made for"):
            evaluator.forward([x], [m])
        with pytest.raises(FusionError, match="the group was made for"):
            evaluator.backward([x], [m], torch.ones(64), [torch.ones(4, 3)])
    for spec, why in (
        (spec_of((4, 3, 2), (0, 2)), "separate axes"),
        (spec_of((4, 3), 0, norm_dtype=torch.float64), "norms in float32"),
        (spec_of((0, 3), 0), "no elements"),
        (spec_of((2**16, 2**15), 0), "2147483648 elements"),
    ):
        assert why in (why_not(device, torch.float32, spec) or "")
        with pytest.raises(FusionError, match=why):
            TritonEvaluator([spec], torch.float32, device)
    assert all(why_not(device, dtype, specs[0]) is None for dtype in DTYPES)
    assert why_not(device, torch.float64, specs[0]) == "no Triton kernel for float64"


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((2, LONG), 0), ((40, 3), 1)])
def test_a_clamped_slice_passes_no_gradient_through_its_norm(
    device: torch.device, shape: tuple[int, ...], dim: int
) -> None:
    spec = spec_of(shape, dim, eps=0.25)
    v, g = pairs([spec], device)
    v[0].select(dim, 0).zero_()
    v[0].select(dim, 1).mul_(0.2 / v[0].select(dim, 1).norm())
    grads = upstream([spec], device)
    _, found = check([spec], v, g, grads)
    assert found.v[0] is not None and found.g[0] is not None and grads[0] is not None
    assert found.g[0].flatten()[0] == 0
    for index in (0, 1):
        wanted = grads[0].select(dim, index) * (g[0].flatten()[index] / 0.25)
        torch.testing.assert_close(found.v[0].select(dim, index), wanted)


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((2, LONG), 0), ((40, 3), 1)])
def test_a_row_of_zeros_without_eps_is_nan(
    device: torch.device, shape: tuple[int, ...], dim: int
) -> None:
    spec = spec_of(shape, dim)
    v, g = pairs([spec], device)
    v[0].select(dim, 0).zero_()
    evaluator = TritonEvaluator([spec], torch.float32, device)
    with torch.no_grad():
        (w,), norms = evaluator.forward(v, g)
        found = evaluator.backward(v, g, norms, upstream([spec], device))
    for tensor in (w, found.v[0], found.g[0]):
        assert tensor is not None
        assert tensor.select(dim, 0).isnan().all() and tensor.select(dim, 1).isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nans_are_kept(device: torch.device, value: float, eps: float) -> None:
    specs = [spec_of((3, 4), 0, eps), spec_of((2, LONG), 0, eps), spec_of((40, 3), 1, eps)]
    v, g = pairs(specs, device)
    for x in v:
        x[1, 1] = value
    with torch.no_grad():
        weights, _ = TritonEvaluator(specs, torch.float32, device).forward(v, g)
    for spec, x, m, w in zip(specs, v, g, weights, strict=True):
        wanted = weight_norm(x, m, spec.norm.dim, eps)
        assert wanted.isnan().any()
        torch.testing.assert_close(w, wanted, equal_nan=True)


def test_outputs_are_aligned_parts_of_one_tensor(device: torch.device) -> None:
    v, g = pairs(FEW, device, torch.bfloat16)
    weights, found = check(FEW, v, g, upstream(FEW, device, torch.bfloat16))
    for tensors in (weights, found.v, found.g):
        assert all(t is not None and t.is_contiguous() and t._base is None for t in tensors)
        parts = [t for t in tensors if t is not None]
        assert len({t.untyped_storage().data_ptr() for t in parts}) == 1
        assert all(t.storage_offset() % ALIGNMENT == 0 for t in parts)
        for here, following in pairwise(parts):
            assert here.storage_offset() + here.numel() <= following.storage_offset()


def test_results_do_not_change_from_run_to_run(device: torch.device) -> None:
    v, g = pairs(FEW, device)
    grads = upstream(FEW, device)
    first, again = (check(FEW, v, g, grads) for _ in range(2))
    for a, b in zip((*first[0], *first[1].v), (*again[0], *again[1].v), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 500])
def test_hundreds_of_members(device: torch.device, count: int) -> None:
    shapes = [spec_of((2, 3), 0), spec_of((3,), None), spec_of((1, 1), 0)]
    specs = [shapes[i % 3] if i % 50 else spec_of((2, 2), 1) for i in range(count)]
    v, g = pairs(specs, device)
    grads = [None if i % 50 else d for i, d in enumerate(upstream(specs, device))]
    with launches() as counts:
        check(specs, v, g, grads)
    assert set(counts.values()) <= {1, 2} and len(counts) <= 7  # split_sums is both ways'


@pytest.mark.parametrize("seed", range(5))
def test_random_groups(device: torch.device, seed: int) -> None:
    rng = random.Random(seed)
    specs = []
    for _ in range(rng.randint(1, 12)):
        shape = tuple(rng.choice([1, 2, 3, 5, 8, 33, 64]) for _ in range(rng.randint(1, 4)))
        while torch.Size(shape).numel() > 30_000:
            shape = shape[1:]
        first = rng.randrange(len(shape))
        kept = tuple(range(first, rng.randint(first, len(shape) - 1) + 1))
        specs.append(
            spec_of(shape, rng.choice([None, first, kept, ()]), rng.choice([0.0, 1e-6, 0.5]))
        )
    dtype, out = rng.choice(DTYPES), rng.choice([*DTYPES, None])
    grads = [None if rng.random() < 0.2 else d for d in upstream(specs, device, out or dtype)]
    check(specs, *pairs(specs, device, dtype, seed), grads, out_dtype=out)


def test_autograd_through_the_node(device: torch.device) -> None:
    v, g = ([t.requires_grad_() for t in ts] for ts in pairs(FEW, device))
    weights = evaluate(TritonEvaluator(FEW, torch.float32, device), v, g)
    wanted = torch.autograd.grad(
        sum(
            weight_norm(x, m, s.norm.dim, s.norm.eps).sin().sum()
            for s, x, m in zip(FEW, v, g, strict=True)
        ),
        [*v, *g],
    )
    for _ in range(2):
        found = torch.autograd.grad(sum(w.sin().sum() for w in weights), [*v, *g])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # Each weight is an output of its own: a write to one is seen by it alone.
    weights[0].mul_(2)
    assert weights[0]._version == 1 and weights[1]._version == 0
    total = weights[0].sum() + weights[1].square().sum()
    assert all(t is not None for t in torch.autograd.grad(total, [v[0], v[1]]))
