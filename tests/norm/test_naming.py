"""The options of a norm as a value, and what g and v are called."""

from __future__ import annotations

import pytest
import torch

from wn_surgery.norm.naming import keys_for, part_of
from wn_surgery.norm.options import NormOptions, kept_axes
from wn_surgery.norm.parametrization import WeightNorm


@pytest.mark.parametrize("layout", ["legacy", "parametrized"])
@pytest.mark.parametrize("weight", ["weight", "a.weight", "a.parametrizations.b.in_g", "a\n.w"])
def test_keys_say_what_they_are(weight: str, layout: str) -> None:
    g, v = keys_for(weight, layout)
    assert part_of(g) == (weight, layout, "g") and part_of(v) == (weight, layout, "v")


@pytest.mark.parametrize("key", ["weight", "_g", "a.b_orig", "parametrizations.w.original2", ""])
def test_other_keys_are_neither(key: str) -> None:
    assert part_of(key) is None


def test_options_are_a_value() -> None:
    options = NormOptions((0, 2), 1e-6, torch.float32)
    assert WeightNorm(*options).options == options != NormOptions((0, 2), 1e-6)
    assert len({options, NormOptions((0, 2), 1e-6, torch.float32)}) == 1
    assert options.to_dict() == {"dim": [0, 2], "eps": 1e-6, "norm_dtype": "float32"}
    assert str(options) == "dim=(0, 2), eps=1e-06, norm_dtype=torch.float32"
    assert str(NormOptions(None)) == "dim=None"
    assert [kept_axes(dim) for dim in (None, 1, (0, 2))] == [(), (1,), (0, 2)]
