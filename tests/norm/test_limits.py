"""Which norms are accepted: those that come out right, in every dtype and size."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from wn_surgery.norm.limits import has_easy_norms, zero_slices
from wn_surgery.norm.math import Dim, g_shape, magnitude, norm_except
from wn_surgery.norm.operator import weight_norm

DTYPES = [torch.bfloat16, torch.float16, torch.float64, torch.float32]


@pytest.mark.parametrize(
    ("value", "dtype", "options", "count"),
    [
        (1e30, torch.float32, {}, 2),
        (1e30, torch.float32, {"eps": 1e-6}, 2),
        (1e30, torch.float32, {"norm_dtype": torch.float64}, 0),
        (1e-22, torch.float32, {}, 2),
        (1e-22, torch.float32, {"eps": 1e-12}, 0),  # clamped: a constant
        (1e-22, torch.float32, {"norm_dtype": torch.float64}, 0),
        (1e-30, torch.float64, {"norm_dtype": torch.float32}, 2),
        (6e4, torch.float16, {"norm_dtype": torch.float32}, 2),  # g would be infinite
        (1e-7, torch.float16, {"norm_dtype": torch.float32}, 0),
        (0.0, torch.float32, {"eps": 1e-12}, 0),
        # g would be stored as 0, and neither g nor v of a zero row would ever train.
        (0.0, torch.float16, {"eps": 1e-8, "norm_dtype": torch.float32}, 2),
        (0.0, torch.float16, {"eps": 1e-5, "norm_dtype": torch.float32}, 0),
        (1e-18, torch.float32, {"eps": 1e-20}, 2),  # not clamped, and the squares are lost
        (0.0, torch.float32, {}, 2),
    ],
)
def test_norms_are_judged_as_they_are_computed_and_stored(
    value: float, dtype: torch.dtype, options: dict[str, Any], count: int
) -> None:
    v = torch.full((2, 3), value, dtype=dtype)
    assert zero_slices(v, 0, **options) == count
    if not count:
        g = magnitude(v, 0, **options)
        torch.testing.assert_close(weight_norm(v, g, 0, **options), v)


@pytest.mark.parametrize(
    ("value", "g_init", "dtype", "dim", "count"),
    [
        (1e-14, 1e30, torch.float32, 0, 2),  # g / ‖v‖ is infinite
        (1e15, 1e-30, torch.float32, 0, 2),  # and 0
        (1e-14, 0.0, torch.float32, 0, 0),
        (1.0, -2.0, torch.float32, 0, 0),
        (1e-3, 6e4, torch.float16, 0, 0),  # torch's kernel divides in float32
        (1e-3, 6e4, torch.float16, None, 1),
        (6e4, 1.0, torch.float16, 0, 0),  # the norm need not be stored
        (6e4, 1.0, torch.float16, None, 1),
    ],
)
def test_a_g_that_is_filled_has_to_fit_the_norm(
    value: float, g_init: float, dtype: torch.dtype, dim: Dim, count: int
) -> None:
    v = torch.full((2, 3), value, dtype=dtype)
    assert zero_slices(v, dim, g_init=g_init) == count
    weight = weight_norm(v, torch.full(g_shape(v.shape, dim), g_init, dtype=dtype), dim)
    expected = g_init / (3 if dim == 0 else 6) ** 0.5
    right = torch.allclose(weight.double(), torch.tensor(expected).double(), rtol=2e-3, atol=0)
    assert right == (count == 0)


def test_what_is_accepted_is_right() -> None:
    """Weights of every size, against the definition in float64."""
    torch.manual_seed(3)
    draw = random.Random(3)
    accepted = 0
    for _ in range(2_000):
        dtype, norm_dtype = draw.choice(DTYPES), draw.choice([None, None, *DTYPES])
        size = {torch.float16: (-8, 5), torch.float64: (-320, 308)}.get(dtype, (-45, 38))
        shape = (draw.choice([1, 3]), draw.choice([1, 4]), draw.choice([1, 5, 300]))
        wide = torch.randn(shape, dtype=torch.float64) * 10.0 ** draw.uniform(*size)
        v = wide.to(dtype)
        if draw.random() < 0.2:
            v[0] = 0
        dim: Dim = draw.choice([0, 1, 2, None, (0, 1)])
        used = torch.finfo(norm_dtype or dtype)
        eps = draw.choice([0.0, 0.0, *(e for e in (1e-12, 1e-6, 1.0) if e > used.smallest_normal)])
        g_init = draw.choice([None, None, 2.0, 1e-3, -1e3])
        if zero_slices(v, dim, eps, norm_dtype, g_init):
            assert g_init is not None or not has_easy_norms(v, dim, norm_dtype)
            continue
        accepted += 1
        x = v.double()
        expected, scale = x, torch.ones(())
        if g_init is None:
            g = magnitude(v, dim, eps, norm_dtype)
        else:
            g = torch.full(g_shape(shape, dim), g_init, dtype=dtype)
            largest = x.abs().max().clamp_min(1e-300)
            norms = norm_except(x / largest, dim) * largest
            scale = g_init / norms.clamp_min(eps)
            expected = scale * x
        found = weight_norm(v, g, dim, eps, norm_dtype).double()
        # What norm_dtype takes from the elements, it takes by the user's will.
        limits = torch.finfo(dtype)
        error = 8 * max(limits.eps, used.eps) * expected.abs()
        flushed = 4 * limits.smallest_normal * limits.eps * max(1.0, abs(g_init or 1.0))
        flushed += 4 * used.smallest_normal * used.eps * (1 + scale.abs())
        case = (dtype, norm_dtype, dim, eps, g_init, shape, x.abs().max())
        assert ((found - expected).abs() <= error + flushed).all(), case
    assert accepted > 1_000
