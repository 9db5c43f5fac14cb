"""Looking at checkpoints, and comparing them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import wn_surgery as wn
from tests.checkpoints.makers import shards, tensors
from wn_surgery.model.records import KEY

inspect, compare = wn.checkpoints.inspect, wn.checkpoints.compare


def test_what_is_weight_normed(tmp_path: Path) -> None:
    shards(tmp_path / "a")
    torch.save({"net": tensors(), "epoch": 3}, tmp_path / "a.pt")
    for path, prefix in (("a", ""), ("a.pt", "net/")):
        found = inspect(tmp_path / path)
        a, b = sorted(found.tensors, key=lambda each: each.name)
        assert (a.name, a.layout, a.dtype, a.shape, a.dim) == (
            f"{prefix}a.weight",
            "legacy",
            "float32",
            (8, 4, 3),
            0,
        )
        g = tensors()["b.weight_g"].double()
        assert b.g == pytest.approx((float(g.min()), float(g.mean()), float(g.max())))
        assert (b.dim, b.dtype) == (1, "float16")
        assert found.plain == 4 and found.findings == () and found.sound
        assert "2 weight-normed, 4 others" in str(found)
        json.dumps(found.to_dict())


@pytest.mark.parametrize("form", ["legacy", "parametrized"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
def test_spectral_norm_is_recognised(tmp_path: Path, form: str) -> None:
    norm = nn.utils.spectral_norm if form == "legacy" else nn.utils.parametrizations.spectral_norm
    layer = norm(nn.Conv2d(3, 5, 3))
    layer(torch.ones(1, 3, 4, 4))
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    (row,) = inspect(tmp_path / "a.pt").tensors
    assert (row.norm, row.layout, row.name, row.dim) == ("spectral", form, "weight", 0)
    assert "0 weight-normed, 1 spectral-normed, 1 others" in str(inspect(tmp_path / "a.pt"))


def test_what_would_go_wrong(tmp_path: Path) -> None:
    def pair(name: str, rows: int = 2) -> dict[str, torch.Tensor]:
        return {f"{name}.weight_g": torch.ones(rows, 1), f"{name}.weight_v": torch.ones(rows, 3)}

    state = {
        **pair("zero"),
        **pair("nan"),
        **pair("mixed"),
        **pair("stale"),
        "stale.weight": torch.ones(2, 3),
        "lost.weight_g": torch.ones(2, 1),
        "misfit.weight_g": torch.ones(4, 1),
        "misfit.weight_v": torch.ones(2, 3),
        "new.parametrizations.weight.original0": torch.ones(2, 1),
        "new.parametrizations.weight.original1": torch.ones(2, 3),
        "whole.weight_g": torch.ones(2, 1, dtype=torch.int8),
        "whole.weight_v": torch.ones(2, 3, dtype=torch.int8),
        "noise.weight_orig": torch.ones(3, 3),
        "noise.weight_u": torch.tensor([1.0, -1.0, 0.0]),
        "noise.weight_v": torch.tensor([1.0, -1.0, 0.0]),
    }
    state["zero.weight_v"][0] = 0
    state["nan.weight_v"][0, 0] = float("nan")
    state["mixed.weight_v"] = state["mixed.weight_v"].bfloat16()
    torch.save(state, tmp_path / "a.pt")
    found = inspect(tmp_path / "a.pt")
    assert {(each.severity, each.kind, each.name) for each in found.findings} == {
        ("error", "zero", "zero.weight"),
        ("error", "non-finite", "nan.weight"),
        ("warning", "dtype", "mixed.weight"),
        ("error", "twice", "stale.weight"),
        ("error", "orphan", "lost.weight_g"),
        ("error", "shape", "misfit.weight_g"),
        ("warning", "layouts", "new.weight"),
        ("error", "dtype", "whole.weight"),
        ("error", "spectral", "noise.weight"),
    }
    assert not found.sound


def test_a_record_without_its_tensors(tmp_path: Path) -> None:
    sites = [{"name": "fc.weight", "dim": 0, "eps": 0.0, "norm_dtype": None}]
    record = {"version": 1, "layout": "parametrized", "sites": sites}
    torch.save({"state_dict": {"fc.bias": torch.ones(2)}, KEY: record}, tmp_path / "a.ckpt")
    (finding,) = inspect(tmp_path / "a.ckpt").findings
    assert (finding.kind, finding.name) == ("record", "state_dict/fc.weight")
    record["layout"] = "plain"
    state = {"fc.weight": torch.ones(2, 2)}
    torch.save({"state_dict": state, KEY: record}, tmp_path / "a.ckpt")
    assert inspect(tmp_path / "a.ckpt").findings == ()


# Comparing ------------------------------------------------------------------------------------


def test_one_model_in_three_layouts(tmp_path: Path) -> None:
    state = wn.checkpoints.convert(tensors())
    save_file(state, tmp_path / "plain.safetensors")
    torch.save({"state_dict": tensors(), "lr": 0.1}, tmp_path / "legacy.ckpt")
    moments = {0: {"exp_avg": torch.ones(2)}}
    new = wn.checkpoints.convert(tensors(), "parametrized")
    torch.save({"model": new, "optimizer": {"state": moments}}, tmp_path / "new.pt")
    for one in ("plain.safetensors", "legacy.ckpt", "new.pt"):
        for other in ("plain.safetensors", "legacy.ckpt", "new.pt"):
            found = compare(tmp_path / one, tmp_path / other)
            assert found.equal() and found.same == 6, (one, other, str(found))


def test_what_differs(tmp_path: Path) -> None:
    state = tensors()
    torch.save(state, tmp_path / "a.pt")
    state["a.weight_g"] = state["a.weight_g"].nextafter(torch.tensor(9.0))
    state["steps"] = torch.tensor([4])
    state["none"] = torch.zeros(1, 4)
    state["new"] = state.pop("eight")
    torch.save(state, tmp_path / "b.pt")
    found = compare(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [each.name for each in found.differing] == ["a.weight", "steps"]
    assert 1 <= found.differing[0].max_ulp <= 2 and found.differing[1].max_abs == 1
    assert found.shapes == (("none", (0, 4), (1, 4)),)
    assert (found.only_first, found.only_second) == (("eight",), ("new",))
    assert found.same == 2 and not found.equal(atol=10.0)
    assert "none: (0, 4) in the first, (1, 4) in the second" in str(found)


def test_a_difference_that_is_none(tmp_path: Path) -> None:
    torch.save({"weight": torch.tensor([1.0, float("nan")])}, tmp_path / "a.pt")
    torch.save({"weight": torch.tensor([1.0 + 1e-6, float("nan")])}, tmp_path / "b.pt")
    torch.save({"weight": torch.tensor([-0.0, 0.0])}, tmp_path / "c.pt")
    torch.save({"weight": torch.tensor([0.0, 0.0])}, tmp_path / "d.pt")
    near = compare(tmp_path / "a.pt", tmp_path / "b.pt")
    assert not near.equal() and near.equal(atol=1e-5) and not near.equal(atol=1e-8)
    assert compare(tmp_path / "a.pt", tmp_path / "a.pt").equal()  # NaN is itself
    assert not compare(tmp_path / "c.pt", tmp_path / "d.pt").equal()  # every bit counts


def test_containers_of_several_models_are_compared_by_name(tmp_path: Path) -> None:
    one, other = tensors(), {**tensors(), "steps": torch.tensor([4])}
    torch.save({"generator": one, "discriminator": other}, tmp_path / "a.pt")
    torch.save({"discriminator": one, "generator": one}, tmp_path / "b.pt")
    found = compare(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [each.name for each in found.differing] == ["discriminator/steps"]


def test_values_that_are_not_there_or_not_finite(tmp_path: Path) -> None:
    state = {
        "a.weight_g": torch.ones(2, 1, device="meta"),
        "a.weight_v": torch.ones(2, 3, device="meta"),
        "b.weight_g": torch.ones(2, 1),
        "b.weight_v": torch.full((2, 3), complex(1.0, float("inf"))),
    }
    torch.save(state, tmp_path / "a.pt")
    found = inspect(tmp_path / "a.pt")
    assert [(each.kind, each.name) for each in found.findings] == [
        ("dtype", "a.weight"),
        ("non-finite", "b.weight"),
    ]
    assert [each.non_finite for each in found.tensors] == [0, 6]


def test_spectral_norm_beside_its_own_weight(tmp_path: Path) -> None:
    state = {f"weight_{part}": torch.ones(2) for part in "uv"}
    state |= {"weight_orig": torch.eye(2), "weight": torch.eye(2)}
    torch.save(state, tmp_path / "a.pt")
    (finding,) = inspect(tmp_path / "a.pt").findings
    assert finding.kind == "spectral" and "delete the one that is stale" in finding.message
