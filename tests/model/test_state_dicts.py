"""State dicts of every layout load into a weight-normed module, and its own are torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests import makers

StateDict = dict[str, Any]


def nested() -> nn.Module:
    return nn.ModuleDict(
        {"front": nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU()), "back": nn.Linear(4, 2)}
    )


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "nested": nested,
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "under two names": shared,
}


def wanted(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in list(module.named_parameters(recurse=False))
        if parameter.ndim > 1
    ]


def ours(model: nn.Module, **options: Any) -> nn.Module:
    wn.apply(model, {"params": "*weight*", **options})
    return model


def legacy(model: nn.Module) -> nn.Module:
    for module, name in wanted(model):
        makers.legacy(module, name)
    return model


def theirs(model: nn.Module) -> nn.Module:
    for module, name in wanted(model):
        makers.parametrized(module, name)
    return model


def weights(model: nn.Module) -> list[Tensor]:
    """Every weight as it acts, and every bias."""
    acting = {site.name: getattr(site.module, site.param).detach() for site in wn.sites(model)}
    biases = {name: value for name, value in model.state_dict().items() if "bias" in name}
    return [value.clone() for _, value in sorted((acting | biases).items())]


@pytest.mark.parametrize("model", MODELS)
def test_the_keys_and_shapes_are_torchs(model: str) -> None:
    mine, other = ours(MODELS[model]()), theirs(MODELS[model]())
    assert {key: value.shape for key, value in mine.state_dict().items()} == {
        key: value.shape for key, value in other.state_dict().items()
    }
    other.load_state_dict(mine.state_dict())
    for a, b in zip(weights(mine), weights(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_plain_state_dicts_load_bit_for_bit(model: str, assign: bool) -> None:
    source, target = MODELS[model](), ours(MODELS[model]())
    saved = source.state_dict()
    before = {key: value.clone() for key, value in saved.items()}
    keys = list(target.state_dict())
    parameters = dict(target.named_parameters())
    assert not any(target.load_state_dict(saved, strict=True, assign=assign))
    for a, b in zip(weights(target), weights(source), strict=True):
        assert torch.equal(a, b)
    assert list(target.state_dict()) == keys
    # What was given is not rewritten.
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[key], before[key]) for key in before)
    if not assign:
        assert all(parameters[key] is value for key, value in target.named_parameters())
        ends = {value.data_ptr() for value in saved.values()}
        assert not ends & {value.data_ptr() for value in target.state_dict().values()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [legacy, theirs, ours])
def test_weight_normed_state_dicts_load(
    layout: Callable[[nn.Module], nn.Module], model: str, assign: bool
) -> None:
    source, target = layout(MODELS[model]()), ours(MODELS[model]())
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            if key.endswith(("_g", "original0")):
                parameter.mul_(1.7)
    assert not any(target.load_state_dict(source.state_dict(), strict=True, assign=assign))
    wn.migrate(source)  # a legacy weight is stale until the next forward
    for a, b in zip(weights(target), weights(source), strict=True):
        assert torch.equal(a, b)
    held = [value for key, value in target.state_dict().items() if "original" in key]
    saved = [value for key, value in source.state_dict().items() if "original" in key]
    assert all(map(torch.equal, held, saved))


@pytest.mark.parametrize("model", ["linear", "nested", "attention"])
def test_a_module_on_the_meta_device(model: str) -> None:
    source = MODELS[model]()
    with torch.device("meta"):
        target = ours(MODELS[model]())
    other = copy.deepcopy(target)
    assert all(parameter.is_meta for parameter in target.parameters())
    target.to_empty(device="cpu").load_state_dict(source.state_dict())
    other.load_state_dict(source.state_dict(), assign=True)
    for loaded in (target, other):
        assert all(type(parameter) is nn.Parameter for parameter in loaded.parameters())
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        for a, b in zip(weights(loaded), weights(source), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("saved", "held"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
    ],
)
def test_values_of_another_dtype(saved: torch.dtype, held: torch.dtype) -> None:
    source, target = nn.Linear(30, 4, dtype=saved), ours(nn.Linear(30, 4, dtype=held))
    target.load_state_dict(source.state_dict())
    # g is the norm of the rounded values, so that it still cancels.
    assert torch.equal(target.weight, source.weight.to(held))  # type: ignore[arg-type]


def test_options_are_honoured() -> None:
    weight = torch.randn(4, 3)
    weight[1] = 0
    target = ours(nn.Linear(3, 4), eps=1e-6)
    target.load_state_dict({"weight": weight, "bias": torch.zeros(4)})
    assert torch.equal(target.weight, weight)  # type: ignore[arg-type]
    assert target.state_dict()["parametrizations.weight.original0"][1] == 1e-6
    target = ours(nn.Linear(3, 4), dim=1, norm_dtype=torch.float64)
    target.load_state_dict({"weight": weight, "bias": torch.zeros(4)})
    torch.testing.assert_close(target.weight.detach(), weight)  # type: ignore[operator]
    assert target.state_dict()["parametrizations.weight.original0"].shape == (1, 3)


def test_frozen_parameters_stay_frozen() -> None:
    for assign in (False, True):
        target = ours(nn.Linear(3, 4).requires_grad_(False))
        target.load_state_dict(nn.Linear(3, 4).state_dict(), assign=assign)
        assert not any(parameter.requires_grad for parameter in target.parameters())


def ones(*missing: str, **more: Any) -> StateDict:
    state: StateDict = {"weight": torch.ones(4, 3), "bias": torch.ones(4), **more}
    return {key: value for key, value in state.items() if key not in missing}


def zero_row() -> Tensor:
    weight = torch.ones(4, 3)
    weight[2] = 0
    return weight


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("state", "match"),
    [
        (ones(weight=torch.ones(2, 2)), r"size mismatch for .*original1.*\[2, 2\].*\[4, 3\]"),
        (ones(weight=torch.ones(12)), r"size mismatch for .*original1"),
        (ones(weight=zero_row()), r"weight: the new weight has 1 slice\(s\) along dim=0"),
        (ones(weight=torch.full((4, 3), torch.nan)), "not finite"),
        (ones(weight=[1.0]), r"expected torch.Tensor .* but received"),
        (ones(weight=torch.empty(4, 3, device="meta")), "weight: .* on the meta device"),
    ],
)
def test_what_cannot_be_loaded_leaves_g_and_v(state: StateDict, match: str, strict: bool) -> None:
    model = nn.Sequential(ours(nn.Linear(3, 4)), nn.Linear(4, 2))
    before = {key: value.clone() for key, value in model.state_dict().items() if "orig" in key}
    prefixed = {f"0.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=match) as caught:
        model.load_state_dict({**model[1].state_dict(prefix="1."), **prefixed}, strict=strict)
    # One error for one cause: nothing is missing, and nothing unexpected.
    assert "key(s)" not in str(caught.value)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)


G, V = "parametrizations.weight.original0", "parametrizations.weight.original1"


@pytest.mark.parametrize(
    ("state", "missing", "unexpected"),
    [
        (ones("weight"), {G, V}, set()),
        (ones("weight", weight_v=torch.ones(4, 3)), {G, V}, {"weight_v"}),
        (ones("weight", weight_g=torch.ones(4, 1)), {G, V}, {"weight_g"}),
        (ones(**{G: torch.ones(4, 1), V: torch.ones(4, 3)}), set(), {"weight"}),
        (ones(weight_g=torch.ones(4, 1), weight_v=torch.ones(4, 3)), set(), {"weight"}),
        (ones(**{G: torch.ones(4, 1)}), {V}, {"weight"}),
    ],
)
def test_keys_that_do_not_fit_are_reported(
    state: StateDict, missing: set[str], unexpected: set[str]
) -> None:
    layer = ours(nn.Linear(3, 4))
    before = layer.state_dict()[V].clone()
    found = layer.load_state_dict(state, strict=False)
    assert set(found.missing_keys) == missing and set(found.unexpected_keys) == unexpected
    assert torch.equal(layer.state_dict()[V], before) is (V in missing)
    with pytest.raises(RuntimeError, match=r"key\(s\)"):
        layer.load_state_dict(state)


def test_the_plain_state_dict_of_a_parent_with_a_prefix_of_its_own() -> None:
    source = nn.Linear(3, 4)
    model = nn.Module()
    model.net = nn.Sequential(ours(nn.Linear(3, 4)))
    state = {f"net.0.{key}": value for key, value in source.state_dict().items()}
    # A key that only looks like the layer's must be left to the one that it belongs to.
    found = model.load_state_dict({**state, "weight": torch.zeros(1)}, strict=False)
    assert found.unexpected_keys == ["weight"] and not found.missing_keys
    assert torch.equal(model.net[0].weight, source.weight)


def test_a_removed_site_no_longer_adopts() -> None:
    layer = ours(nn.Linear(3, 4))
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    wn.remove(layer)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)
    layer.load_state_dict(ones())
    assert torch.equal(layer.weight, torch.ones(4, 3))  # type: ignore[arg-type]


def test_whole_numbers_are_converted_but_not_assigned() -> None:
    layer = ours(nn.Linear(3, 4))
    layer.load_state_dict(ones(weight=torch.ones(4, 3, dtype=torch.int64)))
    torch.testing.assert_close(layer.weight, torch.ones(4, 3))
    before = layer.state_dict()[V].clone()
    with pytest.raises(RuntimeError, match=r"weight: expected a floating-point tensor .*int64"):
        layer.load_state_dict(ones(weight=torch.ones(4, 3, dtype=torch.int64)), assign=True)
    assert torch.equal(layer.state_dict()[V], before)
