"""Records: options that are read back, and exact g and v in the places of plain weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn
from wn_surgery.model import records


def test_options_are_read_back() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(2, 2))
    wn.apply(model, {"types": "Conv1d", "dim": [0, 2], "eps": 1e-3, "norm_dtype": "float64"})
    (site,) = records.record(model)
    assert records.options_of(site) == wn.sites(model)[0].norm
    assert records.line(site) == "0.weight dim=[0, 2] eps=0.001 norm_dtype=float64"
    wn.remove(model)
    wn.apply(model, records.replay([site]))
    assert records.record(model) == [site]


@pytest.mark.parametrize(
    "wrong", [{"dim": "out"}, {"dim": -1}, {"eps": "a"}, {"norm_dtype": "int8"}, {"dim": {}}]
)
def test_options_that_are_not_valid(wrong: dict[str, Any]) -> None:
    site = {"name": "a", "dim": 0, "eps": 0.0, "norm_dtype": None} | wrong
    with pytest.raises(wn.RuleError, match=next(iter(wrong))):
        records.options_of(site)


def test_exact_parts_take_the_places_of_weights() -> None:
    g, v, bias = torch.ones(1), torch.ones(2), torch.zeros(1)
    parts = {"a.parametrizations.weight.original0": g, "a.parametrizations.weight.original1": v}
    state = {"a.weight": v, "a.bias": bias}
    whole = records.with_exact(state, parts)
    assert list(whole) == [*parts, "a.bias"] and whole["a.bias"] is bias
    assert not records.is_record(state) and records.is_record({"version": 1, "sites": []})
