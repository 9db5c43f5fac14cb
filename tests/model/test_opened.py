"""writable: weights that are moved or go while they are open, and how modules are closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import wn_surgery as wn
from tests.fingerprints import assert_same, of_model
from tests.makers import Double, legacy, ours
from wn_surgery.norm.module_class import FOLDED

MAKERS = pytest.mark.parametrize("make", [legacy, parametrizations.weight_norm, ours])
Maker = Callable[[nn.Module], Any]
X = torch.linspace(-1, 1, 6).view(2, 3)


# Weights that go ----------------------------------------------------------------------------

GONE: dict[str, Callable[[Any], object]] = {
    "del": lambda layer: delattr(layer, "weight"),
    "None": lambda layer: setattr(layer, "weight", None),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "weight norm": parametrizations.weight_norm,
    "legacy": legacy,
    "buffer": lambda layer: (
        delattr(layer, "weight"),
        layer.register_buffer("weight", torch.ones(4, 3)),
    ),
    "tensor": lambda layer: (delattr(layer, "weight"), setattr(layer, "weight", torch.ones(4, 3))),
}


@pytest.mark.parametrize("gone", GONE)
@MAKERS
def test_an_open_weight_that_goes_is_put_back(make: Maker, gone: str) -> None:
    model = nn.Sequential(make(nn.Linear(3, 3)), make(nn.Linear(3, 4)))
    expected, before = model(X), of_model(model, identity=True)
    with pytest.raises(wn.FoldedModelError, match=r"1\.weight .*Parameter"), wn.writable(model):  # noqa: PT012
        nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
        GONE[gone](model[1])
    assert not FOLDED
    assert_same(before, of_model(model, identity=True))
    with pytest.raises(ZeroDivisionError), wn.writable(model):  # noqa: PT012
        GONE[gone](model[1])
        raise ZeroDivisionError
    assert_same(before, of_model(model, identity=True))
    assert torch.equal(model(X), expected)
    assert wn.remove(model).changed == ("0.weight", "1.weight")


# Weights that move --------------------------------------------------------------------------

MOVES: dict[str, Callable[[nn.Module], object]] = {
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "to meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("move", MOVES)
@MAKERS
def test_g_and_v_move_as_they_do_outside(make: Maker, move: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(make(nn.Linear(3, 4)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.37)  # v is then not the weight
        model(X).sum().backward()
        return model

    model, other = build(), build()
    held = list(model.parameters())
    with wn.writable(model):
        MOVES[move](model)
    MOVES[move](other)
    for name, now in model.named_parameters():
        expected = other.get_parameter(name)
        assert any(now is parameter for parameter in held) is (move != "to meta")
        assert now.dtype is expected.dtype and now.device == expected.device and now.requires_grad
        if move != "to meta":
            assert now.grad is not None and now.grad.dtype is now.dtype
            assert torch.equal(now, expected) and torch.equal(now.grad, expected.grad)
    parameter = next(model.parameters())
    assert model(X.to(parameter)).dtype is parameter.dtype


@MAKERS
def test_a_weight_that_is_moved_and_written(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    with wn.writable(layer):
        layer.double()
        nn.init.constant_(layer.weight, 0.1)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    wn.remove(layer)
    torch.testing.assert_close(layer.weight.detach(), torch.full((4, 3), 0.1, dtype=torch.float64))


@MAKERS
def test_a_model_that_is_moved_fails_with_one_dtype(make: Maker) -> None:
    model = nn.Sequential(make(nn.Linear(3, 4)), make(nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].bias.fill_(0.3)  # type: ignore[union-attr, operator]
    expected = model(X).detach().double()
    for error, body in ((wn.ZeroNormError, nn.init.zeros_), (KeyError, {}.__getitem__)):
        with pytest.raises(error), wn.writable(model):  # noqa: PT012
            model.double()
            nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
            body(model[1].weight)  # type: ignore[operator]
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        torch.testing.assert_close(model(X.double()).detach(), expected, rtol=1e-5, atol=1e-6)


def test_an_assigned_parameter_of_another_dtype_takes_g_and_v_along() -> None:
    layer, plain = ours(nn.Linear(3, 4, bias=False)), nn.Linear(3, 4, bias=False)
    new = torch.linspace(1, 2, 12, dtype=torch.float64).view(4, 3)
    for module, context in ((layer, wn.writable), (plain, wn.folded)):
        with context(module):
            module.weight = nn.Parameter(new.clone())
    wn.remove(layer)
    assert torch.equal(layer.weight, plain.weight) and layer.weight.dtype is torch.float64
    with pytest.raises(KeyError), wn.writable(ours(layer)):  # noqa: PT012
        layer.weight = nn.Parameter(new.float())
        raise KeyError
    assert {p.dtype for p in layer.parameters()} == {torch.float64}  # it was not the model's


def test_to_empty_and_reset_inside() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))
    wn.apply(model, {"params": "weight*"})
    plain = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))
    names = [name for name, _ in model.named_parameters()]
    model.to("meta")
    for module, context in ((model, wn.writable), (plain, wn.folded)):
        torch.manual_seed(3)
        with context(module):
            module.to_empty(device="cpu")
            module[0].reset_parameters()
            module[1].reset_parameters()
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(X)[0], plain(X)[0])
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_tied_ends_move_together() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    wn.apply(model, {"types": "Linear", "tied": "together"})
    with wn.writable(model):
        model.double()
    one, two = (list(model[i].parametrizations.weight.parameters()) for i in (0, 1))
    assert [*map(id, one)] == [*map(id, two)]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
