"""What becomes of each key is decided once, and carried out alike in memory and between files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import wn_surgery as wn
from tests.checkpoints.makers import same
from wn_surgery.checkpoints.plan import plan
from wn_surgery.checkpoints.request import Request


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight_g": torch.rand(4) + 0.5,
        "a.bias": torch.rand(4),
        "a.weight_v": torch.randn(4, 3),
        "b.parametrizations.weight.original0": torch.rand(2, 1) + 0.5,
        "b.parametrizations.weight.original1": torch.randn(2, 3),
        "c.weight_orig": torch.randn(2, 3),
        "c.weight_u": torch.tensor([1.0, 0.0]),
        "c.weight_v": torch.tensor([1.0, 0.0, 0.0]),
        "d.weight": torch.randn(3, 5),
    }


def lines(asked: Request) -> dict[str, list[tuple[str, str]]]:
    tensors = state()
    decided = plan(
        {key: tuple(value.shape) for key, value in tensors.items()},
        {key: value.dtype for key, value in tensors.items()},
        asked,
        {},
    )
    return {key: [(line.key, line.do) for line in each] for key, each in decided.lines.items()}


def test_every_key_has_its_lines() -> None:
    assert lines(Request(also=frozenset({"spectral_norm"}), keep=frozenset({"b.weight"}))) == {
        "a.weight_g": [],
        "a.bias": [("a.bias", "copy")],
        "a.weight_v": [("a.weight", "fold")],
        "b.parametrizations.weight.original0": [("b.parametrizations.weight.original0", "copy")],
        "b.parametrizations.weight.original1": [("b.parametrizations.weight.original1", "copy")],
        "c.weight_orig": [("c.weight", "spectral")],
        "c.weight_u": [],
        "c.weight_v": [],
        "d.weight": [("d.weight", "copy")],
    }
    found = lines(Request("legacy", rules=(wn.Rule(names="**"),)))
    assert found["b.parametrizations.weight.original0"] == [("b.weight_g", "copy")]
    assert found["d.weight"] == [("d.weight_g", "magnitude"), ("d.weight_v", "copy")]


@pytest.mark.parametrize(
    "asked",
    [
        {"to": "plain"},
        {"to": "plain", "also": "spectral_norm"},
        {"to": "parametrized"},
        {"to": "legacy", "rules": {"names": "d"}},
    ],
)
def test_memory_and_files_carry_out_one_plan(tmp_path: Path, asked: dict[str, Any]) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    torch.save(state(), tmp_path / "a.pt")
    made = wn.checkpoints.convert(state(), **asked)
    for ending in ("safetensors", "pt"):
        done = wn.checkpoints.convert_file(
            tmp_path / f"a.{ending}", tmp_path / f"b.{ending}", **asked
        )
        assert set(done.weights) >= {"a.weight", "b.weight"}
    assert same(load_file(tmp_path / "b.safetensors"), made)
    assert list(torch.load(tmp_path / "b.pt")) == list(made)


def test_two_tensors_of_one_name_are_refused() -> None:
    taken = {"d.weight_g": torch.ones(1, 3), **state()}
    with pytest.raises(wn.CheckpointError, match=r"two tensors would be called 'd\.weight_g'"):
        wn.checkpoints.convert(taken, "legacy", rules={"names": "d"}, orphans="keep")
    # What is not a tensor has a name too.
    with pytest.raises(wn.CheckpointError, match=r"two tensors would be called 'a\.weight'"):
        wn.checkpoints.convert({**state(), "a.weight": "taken"})
