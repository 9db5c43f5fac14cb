"""Optimizers stay true: membership, hyperparameters and the state of untouched parameters."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn


def trained(optimizer_class: Any = torch.optim.Adam, **options: Any) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.1},
        {"params": list(model[2].parameters()), "lr": 0.2, "weight_decay": 0.3},
    ]
    optimizer = optimizer_class(groups, lr=0.5, **options)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()


def ids(optimizer: Any) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def test_g_and_v_take_the_weights_place() -> None:
    model, optimizer = trained()
    hyperparameters = [{**group, "params": None} for group in optimizer.param_groups]
    bias_state = copy.deepcopy(optimizer.state[model[2].bias])
    report = wn.apply(model, {"names": "2"}, optimizers=[optimizer])
    plist = model[2].parametrizations.weight
    assert ids(optimizer) == [
        [id(model[0].weight), id(model[0].bias)],
        [id(plist.original0), id(plist.original1), id(model[2].bias)],
    ]
    assert [{**group, "params": None} for group in optimizer.param_groups] == hyperparameters
    assert len(optimizer.state) == 3
    assert torch.equal(optimizer.state[model[2].bias]["exp_avg"], bias_state["exp_avg"])
    (change,) = report.optimizers
    assert change.to_dict() == {
        "optimizer": "Adam",
        "groups": [{"group": 1, "out": 1, "in": 2}],
        "reset": ["2.weight"],
    }
    assert "state reset for 2.weight" in str(report)
    before = plist.original0.detach().clone()
    step(model, optimizer)
    assert not torch.equal(plist.original0, before)


def test_removal_puts_the_weight_back_where_v_was() -> None:
    model, optimizer = trained()
    before = ids(optimizer)[0]
    wn.apply(model, "linears", optimizers=[optimizer])
    step(model, optimizer)
    # g without decay, in a group of its own, as users do.
    g = model[2].parametrizations.weight.original0
    group = optimizer.param_groups[1]
    group["params"] = [parameter for parameter in group["params"] if parameter is not g]
    optimizer.add_param_group({"params": [g], "weight_decay": 0.0})
    report = wn.remove(model, optimizers=[optimizer])
    assert ids(optimizer)[1:] == [[id(model[2].weight), id(model[2].bias)], []]
    assert len(ids(optimizer)[0]) == len(before)
    assert report.optimizers[0].groups == {0: (2, 1), 1: (1, 1), 2: (1, 0)}
    step(model, optimizer)


@pytest.mark.parametrize("only", ["original0", "original1"])
def test_an_optimizer_that_holds_only_one_of_them(only: str) -> None:
    layer = nn.Linear(3, 4)
    wn.apply(layer, {"names": ""})
    optimizer = torch.optim.SGD([getattr(layer.parametrizations.weight, only)], lr=0.1)
    wn.remove(layer, optimizers=[optimizer])
    assert ids(optimizer) == [[id(layer.weight)]]


def test_named_parameters_are_renamed() -> None:
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.named_parameters(), lr=0.1)
    wn.apply(layer, {"names": ""}, optimizers=[optimizer])
    assert optimizer.param_groups[0]["param_names"] == [
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
        "bias",
    ]
    wn.remove(layer, optimizers=[optimizer])
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_migration_needs_no_optimizer() -> None:
    model, optimizer = trained()
    wn.apply(model, "linears", optimizers=[optimizer])
    step(model, optimizer)
    before, state = ids(optimizer), dict(optimizer.state)
    wn.migrate(model, to="legacy")
    assert ids(optimizer) == before and dict(optimizer.state) == state
    assert {id(p) for p in model.parameters()} == {i for group in before for i in group}


def test_lbfgs_starts_afresh() -> None:
    layer = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = wn.apply(layer, {"names": ""}, optimizers=[optimizer])
    assert report.optimizers[0].reset == ["all parameters"]
    assert not optimizer.state
    before = layer.weight.detach().clone()
    optimizer.step(closure)  # its flat state has another length now
    assert not torch.equal(layer.weight, before)


def test_wrapped_optimizers_and_things_that_are_none() -> None:
    model, optimizer = trained()
    wrapped = SimpleNamespace(optimizer=optimizer)
    report = wn.apply(model, {"names": "0"}, optimizers=[wrapped])
    assert report.optimizers[0].optimizer == "Adam"
    parameters = list(model.parameters())
    with pytest.raises(TypeError, match="optimizers holds a list"):
        wn.remove(model, optimizers=[parameters])
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_an_optimizer_of_another_model_is_not_touched() -> None:
    model, _ = trained()
    _, other = trained()
    before = ids(other)
    report = wn.apply(model, "linears", optimizers=[other])
    assert ids(other) == before
    assert str(report.optimizers[0]) == "Adam: holds none of them; nothing to reset"


def test_a_failure_in_the_second_optimizer_restores_both() -> None:
    class Broken(torch.optim.SGD):
        pass

    model, optimizer = trained()
    broken = Broken(model.parameters(), lr=0.1)
    broken.param_groups[0]["param_names"] = ["too", "few"]
    before, state = (ids(optimizer), ids(broken)), dict(optimizer.state)
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match="zip"):
        wn.apply(model, "linears", optimizers=[optimizer, broken])
    assert (ids(optimizer), ids(broken)) == before
    assert dict(optimizer.state) == state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
