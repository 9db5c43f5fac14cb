"""State dicts without their model: equal to surgery on the live model, bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from wn_surgery.checkpoints.folding import PART
from wn_surgery.model.records import KEY, record

convert = wn.checkpoints.convert
DIMS: list[Any] = [0, 1, 2, None, (0, 2)]


def normed(dim: Any, layout: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 5)).to(dtype)
    wn.apply(model, {"types": ["Conv1d", "ConvTranspose1d"], "dim": dim, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    if layout == "legacy":
        wn.migrate(model, to="legacy")
    return model


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(
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
    assert wn.checkpoints.layout_of(state) == layout
    plain = convert(state, "plain")
    wn.remove(model)
    live = model.state_dict()
    assert plain.keys() == live.keys() and same(plain, {key: live[key] for key in plain})
    assert wn.checkpoints.layout_of(plain) == "plain"


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_kernels(dim: int, dtype: torch.dtype) -> None:
    model = normed(dim, "parametrized", dtype)
    plain = convert(model.state_dict())
    wn.remove(model)
    live = model.state_dict()
    assert same(plain, {key: live[key] for key in plain})


def test_half_precision_off_the_kernel_and_mixed_dtypes_round_once() -> None:
    v, g = torch.randn(4, 6, 3).bfloat16(), torch.rand(1, 6, 1).bfloat16()
    options = wn.checkpoints.Options(dim=1)
    wide = wn.checkpoints.fold(g.float(), v.float(), options)
    assert torch.equal(wn.checkpoints.fold(g, v, options), wide.bfloat16())
    assert torch.equal(wn.checkpoints.fold(g.float(), v, options), wide.bfloat16())
    double = wn.checkpoints.fold(g.double(), v, options)
    assert torch.equal(double, wn.checkpoints.fold(g.double(), v.double(), options).bfloat16())


@pytest.mark.parametrize("dim", [0, 1, (0, 1), (1, 2)])
def test_large_tensors_are_widened_in_parts(dim: Any) -> None:
    v = torch.randn(40, 70, PART // 2000).bfloat16()
    assert v.numel() > PART
    g = (
        torch.rand(
            [
                size if axis in ((dim,) if isinstance(dim, int) else dim) else 1
                for axis, size in enumerate(v.shape)
            ]
        )
        + 0.5
    )
    options = wn.checkpoints.Options(dim=dim)
    assert torch.equal(
        wn.checkpoints.fold(g, v, options), wn.checkpoints.fold(g, v.float(), options).bfloat16()
    )


def test_there_and_back_renames_and_copies_nothing() -> None:
    state = normed(0, "parametrized").state_dict()
    legacy = convert(state, "legacy")
    assert type(legacy) is OrderedDict
    assert legacy._metadata == state._metadata  # type: ignore[attr-defined]
    assert [k.replace("_g", "") for k in legacy if k.endswith("_g")] == ["0.weight", "2.weight"]
    back = convert(legacy, "parametrized")
    assert list(back) == list(state) and all(back[k] is state[k] for k in state)


def test_rules_on_names_and_ranks_put_weight_norm_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 8, 3), nn.Linear(8, 2), nn.LayerNorm(2))
    plain = model.state_dict()
    made = convert(plain, "legacy", rules={"names": "**"}, ranks=[3])
    assert list(made)[:4] == ["0.weight_g", "0.weight_v", "0.bias", "1.weight"]
    assert same(convert(made), dict(plain))
    # The last rule wins, and vectors have to be named, as on a model.
    rules = [{"names": "**", "dim": 1}, {"names": "1", "action": "skip"}]
    made = convert(plain, "parametrized", rules=rules)
    assert {pair.weight: pair.dim for pair in wn.checkpoints.pairs_of(made).values()} == {
        "0.weight": 1
    }
    wn.apply(model, rules)
    assert same(made, {key: model.state_dict()[key] for key in made})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to": "plan"}, wn.CheckpointError, "unknown layout 'plan'"),
        ({"to": "plain", "rules": [{"names": "**"}]}, wn.CheckpointError, "to='parametrized'"),
        ({"to": "legacy", "ranks": [2]}, wn.CheckpointError, "narrows rules="),
        ({"to": "legacy", "also": "spectral_norm"}, wn.CheckpointError, "for to='plain'"),
        ({"to": "plain", "also": ["batch_norm"]}, wn.CheckpointError, "only 'spectral_norm'"),
        ({"to": "plain", "orphans": "drop"}, wn.CheckpointError, "'error' or 'keep'"),
        ({"to": "legacy", "rules": [{"types": "Linear"}]}, wn.RuleError, "types needs modules"),
        ({"to": "legacy", "rules": [{"dim": "out"}]}, wn.RuleError, "dim='out' needs modules"),
        ({"to": "legacy", "rules": [{"action": "remove"}]}, wn.RuleError, "'plain' without rules"),
        ({"to": "legacy", "rules": [{"g_init": 1.0}]}, wn.RuleError, "about training"),
        ({"to": "legacy", "rules": [{"names": "conv"}]}, wn.UnmatchedRuleError, "no plain tensor"),
        ({"to": "legacy", "rules": [{"dim": 2}]}, wn.DimensionError, "has no axis 2"),
    ],
)
def test_requests_that_cannot_be(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert({"0.weight": torch.ones(2, 2)}, **arguments)


def test_a_slice_without_a_direction_gets_no_weight_norm() -> None:
    state = {"0.weight": torch.tensor([[1.0, 2.0], [0.0, 0.0]])}
    with pytest.raises(wn.ZeroNormError, match=r"'0\.weight' has 1 slices"):
        convert(state, "legacy", rules=[{"names": "**"}])
    made = convert(state, "legacy", rules=[{"names": "**", "eps": 1e-6}])
    assert made["0.weight_g"].flatten().tolist() == pytest.approx([5**0.5, 1e-6])


def test_nested_containers_and_shared_modules() -> None:
    state = normed(0, "legacy").state_dict()
    shared = {f"again.{key}": value for key, value in state.items()}
    nested = {"epoch": 3, "generator": {**state, **shared}, "ema": [state]}
    plain = convert(nested)
    assert plain["epoch"] == 3
    assert plain["generator"]["again.0.weight"] is plain["generator"]["0.weight"]
    assert plain["ema"][0]["0.weight"] is plain["generator"]["0.weight"]
    assert "generator/0.weight" in wn.checkpoints.pairs_of(nested)
    nested["self"] = nested
    with pytest.raises(wn.CheckpointError, match="holds itself"):
        convert(nested)


def test_both_layouts_in_one_container() -> None:
    both = {"a": normed(0, "legacy").state_dict(), "b": normed(0, "parametrized").state_dict()}
    assert wn.checkpoints.layout_of(both) == "mixed"
    assert wn.checkpoints.layout_of(convert(both, "legacy")) == "legacy"


# What stands beside the tensors -------------------------------------------------------------


def lightning(model: nn.Module, **more: Any) -> dict[str, Any]:
    sites = record(model)
    return {
        "state_dict": model.state_dict(),
        KEY: {"version": 1, "layout": "parametrized", "sites": sites, "rules": [], **more},
    }


@pytest.mark.parametrize("options", [{"eps": 1e-6}, {"norm_dtype": "float64"}])
def test_a_recorded_eps_and_norm_dtype_give_the_bits_of_the_live_model(options: Any) -> None:
    model = normed(1, "parametrized", **options)
    with torch.no_grad():
        model[0].parametrizations["weight"].original1.mul_(1e-7)  # type: ignore[index, union-attr]
    plain = convert(lightning(model))
    assert KEY not in plain  # nothing is weight-normed any more
    state = model.state_dict()
    assert not same(convert(state), plain["state_dict"])  # names and shapes alone do not tell
    wn.remove(model)
    assert same(plain["state_dict"], {k: model.state_dict()[k] for k in plain["state_dict"]})


def test_the_callbacks_record_follows_the_layout() -> None:
    model = normed(0, "parametrized")
    legacy = convert(lightning(model), "legacy")
    assert legacy[KEY]["layout"] == "legacy" and "0.weight_g" in legacy["state_dict"]
    # save_layout="plain" has plain weights, and the exact g and v beside them.
    state = dict(model.state_dict())
    exact = {key: value for key, value in state.items() if "parametrizations" in key}
    wn.remove(model)
    saved = {
        **lightning(model, layout="plain", exact={"state_dict": exact}),
        "state_dict": model.state_dict(),
    }
    back = convert(saved, "parametrized")
    assert back["state_dict"].keys() == state.keys() and "exact" not in back[KEY]
    assert all(torch.equal(back["state_dict"][key], state[key]) for key in state)
    assert convert(saved).keys() == {"state_dict"}


@pytest.mark.parametrize(
    "site",
    [
        {"name": "weight", "dim": "out", "eps": 0.0, "norm_dtype": None},
        {"name": "weight", "dim": 0, "eps": -1, "norm_dtype": None},
        {"name": "weight", "dim": 0, "eps": 0.0, "norm_dtype": "__class__"},
        {"name": "weight"},
        3,
    ],
)
def test_a_hostile_record(site: Any) -> None:
    state = {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 2)}
    with pytest.raises(wn.CheckpointError, match="record of weight norm"):
        convert({"state_dict": state, KEY: {"version": 1, "sites": [site]}})


def test_a_record_of_another_checkpoint() -> None:
    state = {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 2)}
    sites = [{"name": "weight", "dim": 1, "eps": 0.0, "norm_dtype": None}]
    with pytest.raises(wn.CheckpointError, match="the record is of another checkpoint"):
        convert({"state_dict": state, KEY: {"version": 1, "sites": sites}})


def test_optimizer_states_by_name() -> None:
    state = normed(0, "legacy").state_dict()
    moments = {
        # As Adafactor's, of no parameter's shape.
        key: {"step": torch.tensor(3.0), "exp_avg_sq_row": torch.ones(len(value), 5)}
        for key, value in state.items()
    }
    groups = [{"lr": 0.1, "params": list(state), "param_names": list(state)}]
    saved = {"model": state, "optimizer": {"state": moments, "param_groups": groups}}
    made = convert(saved, "parametrized")
    assert list(made["optimizer"]["state"]) == list(made["model"])
    assert made["optimizer"]["param_groups"][0]["params"] == list(made["model"])
    key = "0.parametrizations.weight.original0"
    assert made["optimizer"]["state"][key] is moments["0.weight_g"]
    with pytest.warns(UserWarning, match="state of 4 tensors is left out"):
        plain = convert(saved)
    assert list(plain["optimizer"]["state"]) == ["0.bias", "2.bias"]
    assert plain["optimizer"]["param_groups"] == [
        {"lr": 0.1, "params": ["0.bias", "2.bias"], "param_names": ["0.bias", "2.bias"]}
    ]
    assert saved["optimizer"]["param_groups"][0]["params"] == list(state)  # type: ignore[index]


QUANTIZED = "ignore:torch.quantize_per_tensor:UserWarning"


@pytest.mark.filterwarnings(QUANTIZED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, v: (g.to(torch.int8), v.to(torch.int8)), "expected floating-point"),
        (lambda g, v: (g, v.to(torch.float8_e4m3fn)), "16 bits or more"),
        (lambda g, v: (g.to(torch.complex64), v), "expected floating-point"),
        (lambda g, v: (g, torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)), "was the checkpoint"),
        (lambda g, v: (g, v.to_sparse()), "expected dense tensors"),
    ],
)
def test_what_is_no_weight(change: Any, message: str, tmp_path: Path) -> None:
    g, v = change(torch.ones(2, 1), torch.ones(2, 2))
    with pytest.raises(wn.CheckpointError, match=message):
        convert({"weight_g": g, "weight_v": v})
    torch.save({"weight_g": g, "weight_v": v}, tmp_path / "a.pt")
    (finding,) = wn.checkpoints.inspect(tmp_path / "a.pt").findings
    assert (finding.severity, finding.kind) == ("error", "dtype")


def test_tensors_without_numbers() -> None:
    state = normed(0, "legacy").to("meta").state_dict()
    plain = convert(state)
    assert plain["0.weight"].is_meta and plain["0.weight"].shape == (8, 6, 3)


@pytest.mark.filterwarnings(QUANTIZED)
def test_tensors_of_every_kind_are_carried_over() -> None:
    state = {
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "eight": torch.ones(2).to(torch.float8_e4m3fn),
        1: torch.ones(2),
        ("a", None): torch.ones(2, 2),
        "a.weight_g": torch.ones(2, 1),
        "a.weight_v": torch.randn(2, 3).t().contiguous().t(),
    }
    plain = convert(state)
    assert list(plain) == [*list(state)[:5], "a.weight"]
    assert all(plain[key] is state[key] for key in list(state)[:5])


class Both(NamedTuple):
    net: dict[str, Tensor]
    step: int


def test_optimizer_states_by_number_are_left_with_a_warning() -> None:
    model = normed(0, "legacy")
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 6, 9)).sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with pytest.warns(UserWarning, match="state by number is left as it is"):
        made = convert(saved, "parametrized")
    assert made["optimizer"]["state"][0]["exp_avg"] is saved["optimizer"]["state"][0]["exp_avg"]
    convert(saved)  # torch refuses that for a plain model, and so there is nothing to warn of


def test_sequences_keep_their_classes() -> None:
    state = normed(0, "legacy").state_dict()
    size = torch.Size([2, 3])
    plain = convert({"both": Both(state, 3), "size": size, "list": [state, 1], "pair": (state, 2)})
    assert type(plain["both"]) is Both and "0.weight" in plain["both"].net
    assert plain["size"] is size
    assert "0.weight" in plain["list"][0] and "0.weight" in plain["pair"][0]


def test_a_module_in_a_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    torch.save({"net": normed(0, "parametrized")}, tmp_path / "a.pt")
    with pytest.raises(wn.CheckpointError, match="holds a weight-normed Sequential itself"):
        wn.checkpoints.convert_file(tmp_path / "a.pt", tmp_path / "b.pt", full_pickle=True)
    torch.save({"loss": nn.Linear(2, 2)}, tmp_path / "a.pt")
    wn.checkpoints.convert_file(tmp_path / "a.pt", tmp_path / "b.pt", full_pickle=True)


def test_g_and_v_that_have_no_weight() -> None:
    with pytest.raises(wn.CheckpointError, match="g and v are int64 and float32: expected float"):
        wn.checkpoints.fold(torch.ones(2, dtype=torch.int64), torch.ones(2, 3))
    for part in "gv":
        state = {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3)}
        state[f"weight_{part}"] = state[f"weight_{part}"].to("meta")
        with pytest.raises(wn.CheckpointError, match=f"'weight_{part}' is on the meta device"):
            convert(state)


def test_another_parametrization_beside_spectral_norm() -> None:
    layer = nn.Linear(3, 4)
    nn.utils.parametrizations.spectral_norm(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Linear(3, 3))
    with pytest.raises(wn.CheckpointError, match="another parametrization besides spectral norm"):
        convert(layer.state_dict(), also="spectral_norm")


@pytest.mark.parametrize(
    "groups", [None, "all", [["fc.weight_g"]], [{"params": "fc.weight_g", "lr": [0.1]}]]
)
def test_groups_of_an_optimizer_that_are_not_lists_of_names_stay(groups: Any) -> None:
    moments = {f"fc.weight_{part}": {"exp_avg": torch.ones(2)} for part in "gv"}
    optimizer = {"state": moments, "param_groups": groups}
    found = convert({"optimizer": optimizer}, "parametrized")["optimizer"]
    assert found["param_groups"] == groups
    assert list(found["state"]) == [f"fc.parametrizations.weight.original{i}" for i in (0, 1)]
