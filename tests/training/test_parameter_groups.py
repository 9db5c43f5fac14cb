"""Parameter groups: what decays, what does not, and that optimizers do as told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import wn_surgery as wn

G, V = "parametrizations.weight.original0", "parametrizations.weight.original1"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)


@pytest.mark.parametrize("layout", ["parametrized", "legacy", "torch"])
def test_g_biases_and_norms_do_not_decay(layout: str) -> None:
    model = Model()
    if layout == "torch":
        parametrizations.weight_norm(model.conv)
        parametrizations.weight_norm(model.head)
    else:
        wn.apply(model, [{"types": "Conv1d"}, {"types": "Linear"}])
        if layout == "legacy":
            wn.migrate(model, to="legacy")
    g, v = ("weight_g", "weight_v") if layout == "legacy" else (G, V)
    groups = wn.parameter_groups(model, weight_decay=0.1)
    assert groups.decayed == ("embed.weight", f"conv.{v}", f"head.{v}")
    assert groups.exempt == {
        "conv.bias": "fewer than two axes",
        f"conv.{g}": "magnitude g",
        "norm.weight": "fewer than two axes",
        "norm.bias": "fewer than two axes",
        "head.bias": "fewer than two axes",
        f"head.{g}": "magnitude g",
    }
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("decay", 0.1),
        ("no_decay", 0.0),
    ]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert str(groups).endswith("3 with weight decay, 6 without")


def test_names_are_those_without_weight_norm() -> None:
    model = Model()
    wn.apply(model, {"types": "Linear"})
    groups = wn.parameter_groups(model, weight_decay=0.1, no_decay=["embed.*", "head.weight"])
    assert groups.decayed == ("conv.weight",)
    assert groups.exempt[f"head.{V}"] == "no_decay='head.weight'"
    assert groups.exempt["embed.weight"] == "no_decay='embed.*'"


def test_frozen_tied_and_shared_parameters() -> None:
    model = Model()
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    model.head.weight = model.embed.weight
    model.again = model.conv
    model.conv.bias.requires_grad_(False)  # type: ignore[union-attr]
    wn.apply(model, [{"types": "Conv1d"}])
    groups = wn.parameter_groups(model, weight_decay=0.1)
    held = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_optimizer_decays_v_and_nothing_else_of_weight_norm() -> None:
    model = Model()
    wn.apply(model, {"types": ["Conv1d", "Linear"]})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = wn.parameter_groups(model, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in groups.decayed else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)
    other = torch.optim.AdamW(wn.parameter_groups(model, weight_decay=0.5), lr=0.1)
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"weight_decay": -0.1}, "weight_decay=-0.1; expected"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"weight_decay": 0.1, "no_decay": "embd.*"}, r"no_decay='embd\.\*' matches no trainable"),
        ({"weight_decay": 0.1, "no_decay": "{a"}, "{a"),
    ],
)
def test_bad_input(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wn.parameter_groups(Model(), **arguments)


def test_the_repr_is_one_line() -> None:
    groups = wn.parameter_groups(nn.Linear(2, 2), weight_decay=0.1)
    assert repr(groups) == "<ParameterGroups: 1 with weight decay, 1 without>"


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="ReLU has no trainable parameter"):
        wn.parameter_groups(nn.ReLU(), weight_decay=0.1)
    only = wn.parameter_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)
    assert [group["name"] for group in only] == ["decay"]


def test_g_with_a_learning_rate_of_its_own() -> None:
    model = Model()
    wn.apply(model, [nn.Conv1d, nn.Linear])
    groups = wn.parameter_groups(model, weight_decay=0.1, g_lr=0.5)
    assert [group["name"] for group in groups] == ["decay", "no_decay", "magnitudes"]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    g = [site.held.g for site in wn.sites(model) if site.normed]  # type: ignore[union-attr]
    assert [id(p) for p in optimizer.param_groups[2]["params"]] == [id(p) for p in g]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.5]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.001, 0.05])
    assert schedule.base_lrs == [0.01, 0.01, 0.5]
    for wrong in (-1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match=r"g_lr=.*; expected a finite number"):
            wn.parameter_groups(model, weight_decay=0.1, g_lr=wrong)  # type: ignore[arg-type]


def test_what_is_renormalized_does_not_decay() -> None:
    model = Model()
    wn.apply(model, [{"types": "Conv1d", "renormalize": True}, {"types": "Linear"}])
    groups = wn.parameter_groups(model, weight_decay=0.1)
    assert groups.decayed == ("embed.weight", f"head.{V}")
    assert groups.exempt[f"conv.{V}"] == "renormalized"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 brings Muon")
def test_muon_gets_the_directions_that_are_matrices() -> None:
    model = Model()
    wn.apply(model, [nn.Conv1d, nn.Linear, nn.Embedding])
    for_muon, others = wn.parameter_groups(model, weight_decay=0.1).split_matrices()
    v = model.head.parametrizations.weight.original1  # type: ignore[union-attr]
    assert [id(p) for group in for_muon for p in group["params"]] == [id(v)]
    muon, adamw = torch.optim.Muon(for_muon, lr=0.1), torch.optim.AdamW(others, lr=0.01)
    held = [p for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = model.norm(model.embed(torch.arange(5))[None])
    model.head(model.conv(x.transpose(1, 2)).transpose(1, 2)).square().sum().backward()
    for optimizer in (muon, adamw):
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    # A radial step of Muon's does not move the weight; it is put back, and its momentum too.
    assert wn.renormalize(model, 1.0, optimizers=muon, project=True) == ("head.weight",)
    along = (muon.state[v]["momentum_buffer"] * v.detach()).sum(1)  # type: ignore[index,operator,union-attr]
    torch.testing.assert_close(along, torch.zeros(5))


def test_nothing_for_muon() -> None:
    model = Model()
    wn.apply(model, nn.Conv1d)
    with pytest.raises(ValueError, match="no weight-normed layer has a v with two axes"):
        wn.parameter_groups(model, weight_decay=0.1).split_matrices()


def test_lion_takes_the_groups() -> None:
    """lion-pytorch; each value moves by its group's learning rate, and v decays besides."""
    lion = pytest.importorskip("lion_pytorch")
    model = Model()
    wn.apply(model, [nn.Conv1d, nn.Linear])
    groups = wn.parameter_groups(model, weight_decay=0.5, g_lr=1e-3)
    optimizer = lion.Lion(groups, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = 1 - 1e-2 * 0.5 if name in groups.decayed else 1.0
        lr = 1e-3 if name.endswith(G) else 1e-2
        torch.testing.assert_close(parameter.detach(), decayed * before[name] - lr, msg=name)
