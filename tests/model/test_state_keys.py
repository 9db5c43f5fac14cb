"""State dicts without weight norm from live models, and optimizer states by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import wn_surgery as wn
from wn_surgery.model.state_keys import keys_of, plain_state_dict
from wn_surgery.training.optimizer_states import names_in, names_in_layout, remap

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3)
        self.net = nn.Sequential(self.conv, nn.Conv1d(2, 1, 1))


class Own(nn.Module):
    """Parameters of its own beside children, before and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.inner = nn.Linear(3, 4)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x * self.scale + self.shift) @ self.weight
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def attention() -> nn.Module:
    return nn.MultiheadAttention(4, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), [{"types": "Linear"}]),
    "shared": (Shared, [{"types": "Conv1d"}]),
    "own": (Own, [{"names": "**"}]),
    "attention": (attention, [{"names": "**", "params": ["weight", "in_proj_weight"]}]),
    "lstm": (lambda: nn.LSTM(3, 4, 2, proj_size=2), [{"names": "", "params": "weight_*"}]),
    "tied": (Tied, [{"names": "**", "tied": "together"}]),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
        [{"types": "Conv2d", "eps": 1e-6}],
    ),
}


def without_uncalled(model: nn.Module) -> None:
    """Attention reads its output weight without a call, which a legacy hook would wait for."""
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        wn.remove(model, {"names": "**.out_proj"}, on_unmatched="ignore")


def to_legacy(model: nn.Module) -> None:
    without_uncalled(model)
    wn.migrate(model, to="legacy")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["parametrized", "legacy", "folded"])
def test_the_plain_state_dict_is_what_remove_gives(name: str, layout: str) -> None:
    make, rules = MODELS[name]
    torch.manual_seed(0)
    model = make()
    wn.apply(model, rules)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    bare = copy.deepcopy(model)
    wn.remove(bare)
    expected = bare.state_dict()
    if layout == "legacy":
        if name == "batch norm":
            pytest.skip("eps has no legacy layout")
        to_legacy(model)
    if layout == "folded":
        with torch.no_grad(), wn.folded(model):
            found = plain_state_dict(model)
    else:
        found = plain_state_dict(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    make().load_state_dict(found)


def test_a_compiled_model_has_its_wrappers_keys() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(2, 3)), backend="eager")
    wn.apply(model, {"names": "0"})
    (key,) = keys_of(model)
    assert key.weight == "_orig_mod.0.weight"
    assert key.legacy == ("_orig_mod.0.weight_g", "_orig_mod.0.weight_v")
    assert set(plain_state_dict(model)) == {"_orig_mod.0.weight", "_orig_mod.0.bias"}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step with gradients that depend on names and shapes alone."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "groups": lambda model: torch.optim.AdamW(wn.parameter_groups(model, weight_decay=0.1)),
}
TRICKY = ["sequence", "shared", "own", "attention", "lstm", "batch norm"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", TRICKY)
@pytest.mark.parametrize("form", ["plain", "legacy"])
def test_names_then_are_those_of_the_model_then(name: str, optimizer: str, form: str) -> None:
    make, rules = MODELS[name]
    if form == "legacy" and name == "batch norm":
        pytest.skip("eps has no legacy layout")
    model = make()
    wn.apply(model, rules)
    then = make()
    if form == "legacy":
        wn.apply(then, rules)
        for each in (model, then):
            without_uncalled(each)
        to_legacy(then)
    expected = names_in(OPTIMIZERS[optimizer](then), then)
    sites = [key.weight for key in keys_of(model)]
    legacy = set(sites) if form == "legacy" else set()
    found = names_in_layout(names_in(OPTIMIZERS[optimizer](model), model), model, legacy)
    assert found == expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["sequence", "own"])
def test_states_go_on_by_name(name: str, optimizer: str) -> None:
    make, rules = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    old = OPTIMIZERS[optimizer](plain)
    step(plain, old, 1)
    model = make()
    wn.apply(model, rules)
    new = OPTIMIZERS[optimizer](model)
    names = names_in(new, model)
    state, fresh = remap(old.state_dict(), names_in_layout(names, model), names, model)
    sites = [key.weight for key in keys_of(model)]
    assert fresh == sites
    new.load_state_dict(state)
    kept = {n: old.state[p] for n, p in plain.named_parameters() if n not in sites}
    found = {n: new.state[p] for n, p in model.named_parameters() if new.state.get(p)}
    assert found.keys() == kept.keys()
    for key, values in kept.items():
        for entry, value in values.items():
            assert torch.equal(torch.as_tensor(found[key][entry]), torch.as_tensor(value))
    step(model, new, 2)  # g and v start without state


def test_a_legacy_state_goes_on_exactly() -> None:
    def layers() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for seed in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    old = layers()
    weight_norm(old[0])
    weight_norm(old[2])
    optimizer = torch.optim.AdamW(old.parameters(), lr=0.01)
    train(old, optimizer)
    new = layers()
    wn.apply(new, "linears")
    new.load_state_dict(old.state_dict())
    other = torch.optim.AdamW(new.parameters(), lr=0.01)
    names = names_in(other, new)
    then = names_in_layout(names, new, {"0.weight", "2.weight"})
    # load_state_dict() goes on with the very tensors it is given.
    state, fresh = remap(copy.deepcopy(optimizer.state_dict()), then, names, new)
    assert not fresh
    other.load_state_dict(state)
    train(old, optimizer)
    train(new, other)
    x = torch.ones(1, 4)
    assert torch.equal(old(x), new(x))


def test_a_mixture_of_torchs_and_plain_layers() -> None:
    def before() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        parametrizations.weight_norm(model[1])
        return model

    model = before()
    wn.apply(model, {"names": "0"})
    names = names_in(torch.optim.SGD(model.parameters()), model)
    found = names_in_layout(names, model, parametrized={"1.weight"})
    assert found == [[name for name, _ in before().named_parameters()]]


def test_what_does_not_fit_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    old = torch.optim.Adam(plain.parameters())
    step(plain, old, 0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    wn.apply(model, "linears")
    names = names_in(torch.optim.Adam(model.parameters()), model)
    then = names_in_layout(names, model)
    with pytest.raises(wn.CheckpointMismatchError, match=r"groups of \[4\] parameters.*\[3\]"):
        remap(old.state_dict(), [then[0][:3]], names, model)
    swapped = [[then[0][i] for i in (1, 0, 2, 3)]]
    with pytest.raises(wn.CheckpointMismatchError, match=r"exp_avg of shape \(8, 4\) where 0.bias"):
        remap(old.state_dict(), swapped, names, model)


class NoOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} ran, where names alone are read")


@pytest.mark.parametrize("layout", ["parametrized", "legacy", "folded"])
@pytest.mark.parametrize("name", TRICKY)
def test_reading_names_computes_and_copies_no_tensor(name: str, layout: str) -> None:
    make, rules = MODELS[name]
    model = make()
    wn.apply(model, rules)
    if layout == "legacy" and name != "batch norm":
        without_uncalled(model)
        to_legacy(model)
    with wn.folded(model) if layout == "folded" else nullcontext(), NoOperators():
        names = names_in(torch.optim.SGD(model.parameters()), model)
        found = names_in_layout(names, model)
    with wn.writable(model):
        assert found == [[name for name, _ in model.named_parameters()]]
