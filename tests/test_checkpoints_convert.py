"""State dicts without their model: equal to surgery on the live model, bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn
from wn_surgery.checkpoints.pairs import find_orphans, find_pairs

DIMS: list[Any] = [0, 1, 2, None, (0, 2)]


def normed(dim: Any, layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 5)).to(dtype)
    wn.apply(model, {"types": ["Conv1d", "ConvTranspose1d"], "dim": dim})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    if layout == "legacy":
        wn.migrate(model, to="legacy")
    return model


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["parametrized", "legacy"])
@pytest.mark.parametrize("dim", DIMS)
def test_stripping_the_state_dict_is_stripping_the_model(
    dim: Any, layout: str, dtype: torch.dtype
) -> None:
    if layout == "legacy" and isinstance(dim, tuple):
        layout = "parametrized"
    model = normed(dim, layout, dtype)
    state = model.state_dict()
    assert {pair.layout for pair in wn.checkpoints.layout_of(state).values()} == {layout}
    plain = wn.checkpoints.convert(state, "plain")
    wn.remove(model)
    assert same(plain, dict(model.state_dict()))


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_kernels(dim: int, dtype: torch.dtype) -> None:
    model = normed(dim, "parametrized", dtype)
    plain = wn.checkpoints.convert(model.state_dict())
    wn.remove(model)
    assert same(plain, dict(model.state_dict()))


def test_half_precision_off_the_kernel_and_mixed_dtypes_round_once() -> None:
    v, g = torch.randn(4, 6, 3).bfloat16(), torch.rand(1, 6, 1).bfloat16()
    wide = wn.checkpoints.fold(g.float(), v.float(), 1)
    assert torch.equal(wn.checkpoints.fold(g, v, 1), wide.bfloat16())
    assert torch.equal(wn.checkpoints.fold(g.float(), v, 1), wide.bfloat16())


def test_there_and_back_renames_and_copies_nothing() -> None:
    state = normed(0, "parametrized").state_dict()
    legacy = wn.checkpoints.convert(state, "legacy")
    assert type(legacy) is OrderedDict and legacy._metadata == state._metadata  # type: ignore[attr-defined]
    assert [k.replace("_g", "") for k in legacy if k.endswith("_g")] == ["0.weight", "2.weight"]
    back = wn.checkpoints.convert(legacy, "parametrized")
    assert list(back) == list(state) and all(back[k] is state[k] for k in state)


def test_rules_on_names_put_weight_norm_on() -> None:
    plain = nn.Sequential(nn.Conv1d(6, 8, 3), nn.Conv1d(8, 2, 1)).state_dict()
    made = wn.checkpoints.convert(plain, "legacy", names="0.weight")
    assert list(made) == ["0.weight_g", "0.weight_v", "0.bias", "1.weight", "1.bias"]
    assert same(wn.checkpoints.convert(made), dict(plain))
    with pytest.raises(wn.CheckpointError, match="no plain tensor"):
        wn.checkpoints.convert(plain, "legacy", names="conv.weight")
    with pytest.raises(wn.ZeroNormError, match=r"0\.weight"):
        wn.checkpoints.convert({"0.weight": torch.zeros(2, 2)}, "legacy", names="**")


def test_nested_containers_and_shared_modules() -> None:
    state = normed(0, "legacy").state_dict()
    shared = {f"again.{key}": value for key, value in state.items()}
    nested = {"epoch": 3, "generator": {**state, **shared}, "ema": [state]}
    plain = wn.checkpoints.convert(nested)
    assert plain["epoch"] == 3
    assert plain["generator"]["again.0.weight"] is plain["generator"]["0.weight"]
    assert plain["ema"][0]["0.weight"] is plain["generator"]["0.weight"]
    assert "generator/0.weight" in wn.checkpoints.layout_of(nested)
    nested["self"] = nested
    with pytest.raises(wn.CheckpointError, match="holds itself"):
        wn.checkpoints.convert(nested)


def test_spectral_norm_is_no_weight_norm() -> None:
    model = nn.utils.spectral_norm(nn.Linear(3, 4))
    assert not wn.checkpoints.layout_of(model.state_dict())
    assert not find_orphans({k: tuple(t.shape) for k, t in model.state_dict().items()})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"weight_g": (3, 1), "weight_v": (4, 2)}, "not a magnitude"),
        ({"weight_g": (4,), "weight_v": (4, 4)}, "fits several axes"),
        ({"weight_g": (4, 1), "weight_v": (4, 2), "weight": (4, 2)}, "stale"),
        (
            {
                "parametrizations.weight.original0": (4, 1),
                "parametrizations.weight.original1": (4, 2),
                "parametrizations.weight.1._u": (4,),
            },
            "another parametrization",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(wn.CheckpointError, match=message):
        find_pairs(shapes)


def test_ambiguity_is_settled_by_siblings_or_asked_for() -> None:
    shapes = {"a.weight_g": (4,), "a.weight_v": (4, 4)}
    assert find_pairs(shapes, dim=1)[0].dim == 1
    siblings = {**shapes, "b.weight_g": (1, 5), "b.weight_v": (4, 5)}
    assert [pair.dim for pair in find_pairs(siblings)] == [1, 1]
