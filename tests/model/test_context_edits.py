"""Inside folded and writable: what is refused, and what a body changes besides the weights."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wn_surgery as wn
from tests.fingerprints import assert_same, of_model
from tests.makers import Double, legacy, ours
from wn_surgery.norm.module_class import FOLDED, is_managed
from wn_surgery.norm.parametrization import WeightNormList

MAKERS = pytest.mark.parametrize("make", [legacy, parametrizations.weight_norm, ours])
CLASSES = pytest.mark.parametrize("make", [parametrizations.weight_norm, ours])
CONTEXTS = pytest.mark.parametrize("context", [wn.folded, wn.writable])
Maker = Callable[[nn.Module], Any]
X = torch.linspace(-1, 1, 6).view(2, 3)


def run(layer: nn.Module) -> Tensor:
    with torch.no_grad():  # with a graph, legacy weights could not be copied
        out: Tensor = layer(X)
    return out


# The weight as an attribute, inside folded ----------------------------------------------------

EDITS: dict[str, Callable[[Any], object]] = {
    "Parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(4, 3))),
    "tensor": lambda layer: setattr(layer, "weight", torch.ones(4, 3)),
    "None": lambda layer: setattr(layer, "weight", None),
    "del": lambda layer: delattr(layer, "weight"),
}


@pytest.mark.parametrize("edit", EDITS)
@CLASSES
def test_a_folded_weight_is_not_replaced(make: Maker, edit: str) -> None:
    layer = make(nn.Linear(3, 4))
    with wn.folded(layer):
        inside, weight = of_model(layer, identity=True), layer.weight
        with pytest.raises(wn.FoldedModelError, match=r"Linear\.weight .*writable\(\).*leave"):
            EDITS[edit](layer)
        assert layer.weight is weight
        assert_same(inside, of_model(layer, identity=True))
        layer.note = layer.weight  # other attributes are nobody's business
        del layer.note
        layer.bias = nn.Parameter(torch.zeros(4))
    assert not layer.bias.any()
    assert wn.remove(layer).changed == ("weight",) and type(layer) is nn.Linear


def test_a_folded_weight_of_several_is_not_replaced() -> None:
    lstm: Any = nn.LSTM(3, 4)
    wn.apply(lstm, {"names": "", "params": "weight_*"})
    with wn.folded(lstm):
        for name in ("weight_ih_l0", "weight_hh_l0"):
            inside = list(lstm._flat_weights)
            with pytest.raises(wn.FoldedModelError, match=name):
                setattr(lstm, name, nn.Parameter(torch.ones_like(getattr(lstm, name))))
            assert all(a is b for a, b in zip(inside, lstm._flat_weights, strict=True))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_folded_legacy_weight_that_is_replaced_is_put_back(nested: bool, edit: str) -> None:
    model = nn.Sequential(ours(nn.Linear(3, 3)), legacy(nn.Linear(3, 4)))
    expected, before = model(X), of_model(model, identity=True)
    with pytest.raises(wn.FoldedModelError, match=r"1\.weight .*writable\(\)"), wn.folded(model):  # noqa: PT012
        if nested:
            with wn.folded(model):
                pass
        EDITS[edit](model[1])
    assert not FOLDED
    assert_same(before, of_model(model, identity=True))
    with pytest.raises(ZeroDivisionError), wn.folded(model):  # noqa: PT012
        EDITS[edit](model[1])
        raise ZeroDivisionError
    assert_same(before, of_model(model, identity=True))
    assert torch.equal(model(X), expected)
    assert wn.remove(model).changed == ("0.weight", "1.weight")
    assert torch.equal(model(X), expected)


# Other parametrizations -----------------------------------------------------------------------


@MAKERS
def test_a_parametrization_of_another_parameter_stays(make: Maker) -> None:
    layer, other = make(nn.Linear(3, 4)), make(nn.Linear(3, 4))
    expected, beside = run(layer), run(other)
    keys, cls = list(other.state_dict()), type(other)
    with torch.no_grad(), wn.folded(layer), wn.folded(other):
        parametrize.register_parametrization(layer, "bias", Double())
        assert torch.equal(run(layer), expected)
    assert not FOLDED
    assert torch.equal(run(layer), expected)
    assert parametrize.is_parametrized(layer, "bias") and "bias" not in layer._parameters
    assert {site.param: site.layout for site in wn.sites(layer)}["weight"] != "plain"
    assert torch.equal(run(copy.deepcopy(layer)), expected)
    layer(X).sum().backward()
    assert layer.parametrizations.bias.original.grad is not None
    assert list(other.state_dict()) == keys and type(other) is cls
    assert torch.equal(run(other), beside)
    with wn.folded(layer), wn.folded(layer):
        assert torch.equal(run(layer), expected) and layer.weight is layer.weight
    with wn.writable(layer):
        nn.init.ones_(layer.weight)
    wn.remove(layer)
    torch.testing.assert_close(layer.weight.detach(), torch.ones(4, 3))
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}


@MAKERS
def test_a_parametrization_that_is_removed_stays_away(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    parametrize.register_parametrization(layer, "bias", Double())
    expected, bias = run(layer), layer.bias.detach().clone()
    with torch.no_grad(), wn.folded(layer):
        parametrize.remove_parametrizations(layer, "bias")
        assert torch.equal(run(layer), expected)
    assert torch.equal(run(layer), expected) and type(layer.bias) is nn.Parameter
    assert [key for key in layer.state_dict() if "bias" in key] == ["bias"]
    assert torch.equal(run(copy.deepcopy(layer)), expected)
    wn.remove(layer)
    assert type(layer) is nn.Linear and torch.equal(layer.bias, bias)


@CLASSES
def test_a_second_weight_norm_that_comes_inside_is_folded_by_the_next(make: Maker) -> None:
    layer: Any = make(nn.Bilinear(2, 3, 4))
    layer.register_parameter("gate", nn.Parameter(torch.randn(4, 3)))
    inputs = torch.ones(1, 2), torch.ones(1, 3)
    expected = layer(*inputs).detach()
    first, second = wn.folded(layer), wn.folded(layer)
    with torch.no_grad():
        first.__enter__()
        parametrizations.weight_norm(layer, "gate")
        second.__enter__()
        assert torch.equal(layer(*inputs), expected)
        first.__exit__(None, None, None)
        assert layer.weight is layer.weight
        second.__exit__(None, None, None)
    assert not FOLDED and layer.weight is not layer.weight and layer.gate is not layer.gate
    assert torch.equal(layer(*inputs), expected)
    assert set(wn.remove(layer).changed) == {"weight", "gate"}
    assert type(layer) is nn.Bilinear


# Surgery inside -------------------------------------------------------------------------------


@CONTEXTS
@MAKERS
def test_surgery_inside_changes_nothing(make: Maker, context: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), make(nn.Linear(3, 4)))
    verbs: list[Callable[[nn.Module], object]] = [
        wn.remove,
        partial(wn.remove, rules={"types": "Linear"}),
        wn.migrate,
        partial(wn.migrate, to="legacy"),
        partial(wn.apply, rules={"types": "Linear", "dim": 1, "replace": True}),
    ]
    before = of_model(model, identity=True)
    with context(model):
        inside = of_model(model, identity=True)
        for verb in verbs:
            with pytest.raises(wn.FoldedModelError, match=r"1\.weight.*leave the context"):
                verb(model)
        assert_same(inside, of_model(model, identity=True))
        assert wn.remove(model, {"names": "0"}).changed == ()  # not that module's business
    assert_same(before, of_model(model, identity=True))
    assert wn.remove(model).changed == ("1.weight",)


# Failures, and several contexts at once -------------------------------------------------------


@CONTEXTS
def test_a_weight_that_cannot_be_computed_leaves_nothing_behind(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(ours(nn.Linear(3, 3)), legacy(nn.Linear(3, 4)), ours(nn.Linear(4, 2)))
    before = of_model(model, identity=True)
    last = model[2].parametrizations.weight  # type: ignore[union-attr]
    forward = WeightNormList.forward

    def fail(self: Any) -> Tensor:
        if self is last:
            raise MemoryError("no room")
        return forward(self)

    with monkeypatch.context() as patch:
        patch.setattr(WeightNormList, "forward", fail)
        with pytest.raises(MemoryError, match="no room"):
            context(model).__enter__()
    assert not FOLDED
    assert_same(before, of_model(model, identity=True))
    assert len(wn.remove(model).changed) == 3


@MAKERS
def test_threads_that_fold_and_open_one_model(make: Maker) -> None:
    model = nn.Sequential(make(nn.Linear(3, 4)), make(nn.Linear(4, 2)))
    expected, before = model(X).detach(), of_model(model, identity=True)
    unexpected: list[BaseException] = []

    def work(context: Any) -> None:
        for _ in range(50):
            try:
                with torch.no_grad(), context(model):
                    _ = model[0].weight.mean()
            except wn.FoldedModelError:
                continue  # the other one was there first
            except BaseException as error:  # noqa: BLE001
                unexpected.append(error)

    threads = [threading.Thread(target=work, args=(wn.folded,)) for _ in range(2)]
    threads.append(threading.Thread(target=work, args=(wn.writable,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not unexpected and not FOLDED
    assert_same(before, of_model(model, identity=True))
    assert torch.equal(model(X), expected)


def test_pickles_made_inside_with_another_parametrization() -> None:
    layer = ours(nn.Linear(3, 4))
    with torch.no_grad(), wn.folded(layer):
        parametrize.register_parametrization(layer, "bias", Double())
        copied = pickle.loads(pickle.dumps(layer))
    assert is_managed(type(copied)) and torch.equal(copied(X), layer(X))
    assert copied.weight is not copied.weight and copied.bias is not copied.bias


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], object]] = {
    "added": lambda layer: parametrize.register_parametrization(layer, "gate", Double()),
    "weight norm": lambda layer: parametrizations.weight_norm(layer, "gate"),
    "removed": lambda layer: parametrize.remove_parametrizations(layer, "bias"),
}


@pytest.mark.parametrize("change", PARAMETRIZATIONS)
@MAKERS
def test_writable_refuses_parametrizations_that_come_or_go(make: Maker, change: str) -> None:
    model = nn.Sequential(ours(nn.Linear(3, 3)), make(nn.Linear(3, 4)))
    model[1].register_parameter("gate", nn.Parameter(torch.randn(4, 3)))
    parametrize.register_parametrization(model[1], "bias", Double())
    expected, before = model(X), of_model(model)
    refused = pytest.raises(wn.FoldedModelError, match="parametrizations of 1 were added or remo")
    with refused, wn.writable(model):
        nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
        PARAMETRIZATIONS[change](model[1])
    assert not FOLDED
    assert_same(before, of_model(model))
    with pytest.raises(ZeroDivisionError), wn.writable(model):  # noqa: PT012
        PARAMETRIZATIONS[change](model[1])
        raise ZeroDivisionError
    assert_same(before, of_model(model))
    assert torch.equal(model(X), expected)
    with wn.writable(model):  # beside a parametrization that stays
        nn.init.ones_(model[1].weight)  # type: ignore[arg-type]
    model(X)
    torch.testing.assert_close(model[1].weight, torch.ones(4, 3))


def test_weight_norm_that_comes_inside_writable() -> None:
    layer: Any = ours(nn.Bilinear(2, 3, 4))
    layer.register_parameter("gate", nn.Parameter(torch.randn(4, 3)))
    inputs = torch.ones(1, 2), torch.ones(1, 3)
    expected = layer(*inputs).detach()
    before = of_model(layer, identity=True)
    outer, inner = wn.writable(layer), wn.folded(layer)
    with torch.no_grad():
        outer.__enter__()
        parametrizations.weight_norm(layer, "gate")
        inner.__enter__()
        with pytest.raises(wn.FoldedModelError, match="leave that context first"):
            wn.writable(layer).__enter__()
        with pytest.raises(wn.FoldedModelError, match="were added or removed"):
            outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
    assert not FOLDED
    assert_same(before, of_model(layer, identity=True))
    assert torch.equal(layer(*inputs), expected)
    with pytest.raises(wn.FoldedModelError, match="not a Parameter"), wn.writable(layer):  # noqa: PT012
        parametrizations.weight_norm(layer, "weight")
        with pytest.raises(wn.FoldedModelError, match="weight was given weight norm inside"):
            wn.folded(layer).__enter__()
    assert not FOLDED and torch.equal(layer(*inputs), expected)
    assert wn.remove(layer).changed == ("weight",)
