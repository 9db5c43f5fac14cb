"""folded and writable."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import wn_surgery as wn
from tests.makers import legacy, ours
from wn_surgery.norm.module_class import FOLDED

MAKERS = pytest.mark.parametrize("make", [legacy, parametrizations.weight_norm, ours])
Maker = Callable[[nn.Module], Any]
X = torch.ones(2, 3)


@MAKERS
def test_a_folded_weight_is_one_tensor(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    expected, cls, keys = layer(X), type(layer), list(layer.state_dict())
    with torch.no_grad(), wn.folded(layer):
        assert layer.weight is layer.weight
        assert isinstance(layer, nn.Linear)
        assert torch.equal(layer(X), expected)
        assert list(layer.state_dict()) == keys
    assert type(layer) is cls
    assert torch.equal(layer(X), expected)
    for parameter in layer.parameters():
        parameter.data.mul_(2)
    assert not torch.equal(layer(X), expected)


@MAKERS
def test_folded_restores_on_exceptions_and_nests(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    cls = type(layer)
    with pytest.raises(KeyError), wn.folded(layer), wn.folded(layer):
        raise KeyError
    assert type(layer) is cls and not (make is not legacy and "weight" in layer.__dict__)
    first, second = wn.folded(layer), wn.folded(layer)
    with first:
        outer = layer.weight
        with second:
            assert layer.weight is outer
        assert layer.weight is outer
    assert type(layer) is cls


@MAKERS
def test_contexts_that_overlap(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    first, second = wn.folded(layer), wn.folded(layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    held = layer.weight
    layer(X)
    assert layer.weight is held
    second.__exit__(None, None, None)
    layer(X)
    assert layer.weight is not held


def test_grad_inside_no_grad_and_the_other_way_round() -> None:
    layer = ours(nn.Linear(3, 4))
    with torch.no_grad(), wn.folded(layer):
        assert not layer.weight.requires_grad
        with torch.enable_grad(), wn.folded(layer):
            layer(X).sum().backward()
        assert not layer.weight.requires_grad
    assert layer.parametrizations.weight.original0.grad is not None
    with wn.folded(layer), torch.no_grad(), wn.folded(layer):
        assert layer.weight.requires_grad


@MAKERS
def test_gradients_through_a_recurrent_loop(make: Maker) -> None:
    torch.manual_seed(0)
    cell = make(nn.Linear(4, 4))

    def loss() -> torch.Tensor:
        state = torch.ones(2, 4)
        for _ in range(20):
            state = torch.tanh(cell(state))
        return state.sum()

    loss().backward()
    expected = [parameter.grad.clone() for parameter in cell.parameters()]
    cell.zero_grad()
    with wn.folded(cell):
        loss().backward()
    for parameter, gradient in zip(cell.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def in_a_thread(work: Callable[[], object]) -> object:
    """What ``work`` returns, or the exception it raises, in a thread of its own."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001 - handed to the test
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@MAKERS
def test_a_fold_belongs_to_its_model_and_its_thread(make: Maker) -> None:
    one, other = make(nn.Linear(3, 4)), ours(nn.Linear(3, 4))
    with torch.no_grad(), wn.folded(one):
        assert one.weight is one.weight and other.weight is not other.weight
        elsewhere = in_a_thread(lambda: one(X).requires_grad)
        if make is legacy:
            assert isinstance(elsewhere, wn.WeightNormError) and "migrate" in str(elsewhere)
        else:
            assert elsewhere is True
    assert in_a_thread(lambda: one(X).requires_grad) is True


@pytest.mark.processes
def test_a_thread_that_validates_takes_no_gradient_from_one_that_trains() -> None:
    model = nn.Sequential(ours(nn.Linear(3, 6)), parametrizations.weight_norm(nn.Linear(6, 2)))
    stop = threading.Event()

    def validate() -> None:
        while not stop.is_set():
            with torch.no_grad(), wn.folded(model):
                model(X)

    thread = threading.Thread(target=validate)
    thread.start()
    without = 0
    try:
        for _ in range(200):
            model.zero_grad()
            model(X).sum().backward()
            without += sum(parameter.grad is None for parameter in model.parameters())
    finally:  # or an error here would leave the thread running, and the process with it
        stop.set()
        thread.join()
    assert without == 0


@MAKERS
@pytest.mark.processes
def test_threads_that_fold_one_model(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    keys = layer.__dict__.keys()
    expected = layer(X).detach()
    wrong: list[object] = []

    def work() -> None:
        for _ in range(50):
            try:
                with torch.no_grad(), wn.folded(layer):
                    if not torch.equal(layer(X), expected):
                        wrong.append(1)
            except wn.WeightNormError as error:  # one thread at a time, for that layout
                if make is not legacy or "another thread" not in str(error):
                    wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and layer.__dict__.keys() == keys and not FOLDED


@MAKERS
def test_copies_made_inside_are_live(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    with torch.no_grad(), wn.folded(layer):
        other = copy.deepcopy(layer)
    assert other.__dict__.keys() == layer.__dict__.keys()
    before = other(X)
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if key.endswith(("_g", "original0")):
                parameter.mul_(2)
    assert not torch.equal(other(X), before)
    assert torch.equal(layer(X), before)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_lstm() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, proj_size=2)
    plain = copy.deepcopy(lstm)
    wn.apply(lstm, {"names": "", "params": "weight_*"})
    x = torch.randn(5, 1, 3)
    assert torch.equal(lstm(x)[0], plain(x)[0])
    with wn.folded(lstm):
        lstm(x)[0].sum().backward()
        copy.deepcopy(lstm)
        assert torch.equal(pickle.loads(pickle.dumps(lstm))(x)[0], plain(x)[0])
    plain(x)[0].sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original1.grad is not None  # type: ignore[union-attr]
    assert torch.equal(lstm(x)[0], plain(x)[0])


@pytest.mark.parametrize("context", [wn.folded, wn.writable])
@MAKERS
def test_surgery_inside_is_refused(make: Maker, context: Any) -> None:
    model = nn.Sequential(make(nn.Linear(3, 4)))
    with context(model):
        if context is wn.folded:
            for verb in (
                wn.remove,
                partial(wn.migrate, to="parametrized" if make is legacy else "legacy"),
            ):
                with pytest.raises(wn.FoldedModelError):
                    verb(model)
        with pytest.raises(wn.FoldedModelError):
            wn.apply(model, {"types": "Linear", "dim": 1, "replace": True})
        if context is wn.folded:
            with pytest.raises(wn.FoldedModelError):
                wn.writable(model).__enter__()
    assert wn.remove(model).changed == ("0.weight",)


# writable -------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any], object]] = {
    "init": lambda layer: nn.init.constant_(layer.weight, 0.5),
    "copy_": lambda layer: layer.weight.detach().copy_(torch.full((4, 3), 0.5)),
    "data": lambda layer: layer.weight.data.fill_(0.5),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(torch.full((4, 3), 0.5))),
    "loaded": lambda layer: layer.load_state_dict(
        {"weight": torch.full((4, 3), 0.5), "bias": torch.zeros(4)}
    ),
}


@pytest.mark.parametrize("write", WRITES)
@MAKERS
def test_writes_take_effect(make: Maker, write: str) -> None:
    layer = make(nn.Linear(3, 4))
    before = {id(p) for p in layer.parameters()}
    keys, cls, hooks = list(layer.state_dict()), type(layer), dict(layer._forward_pre_hooks)
    with wn.writable(layer):
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        WRITES[write](layer)
    layer(X)
    torch.testing.assert_close(layer.weight, torch.full((4, 3), 0.5))
    assert {id(p) for p in layer.parameters()} == before
    assert list(layer.state_dict()) == keys and type(layer) is cls
    assert dict(layer._forward_pre_hooks) == hooks


@MAKERS
def test_what_is_not_written_stays_bit_for_bit(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.37)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with wn.writable(layer):
        nn.init.zeros_(layer.bias)
    before["bias"].zero_()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@MAKERS
def test_a_body_that_raises_writes_nothing(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(KeyError), wn.writable(layer):  # noqa: PT012
        nn.init.ones_(layer.weight)
        raise KeyError
    with pytest.raises(wn.ZeroNormError, match="weight"), wn.writable(layer):
        nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="shape"), wn.writable(layer):
        layer.weight = nn.Parameter(torch.ones(2, 2))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    layer(X)


@pytest.mark.parametrize(
    ("build", "params"),
    [
        (lambda: nn.Linear(3, 4), "weight"),
        (lambda: nn.Conv2d(2, 4, 3), "weight"),
        (lambda: nn.LSTM(3, 4), "weight_*"),
        (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
    ],
)
def test_reset_parameters(build: Callable[[], Any], params: str) -> None:
    layer = build()
    plain = copy.deepcopy(layer)
    wn.apply(layer, {"names": "", "params": params})
    reset = "_reset_parameters" if isinstance(layer, nn.MultiheadAttention) else "reset_parameters"
    torch.manual_seed(3)
    with wn.writable(layer):
        getattr(layer, reset)()
    torch.manual_seed(3)
    getattr(plain, reset)()
    wn.remove(layer)
    for key, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)


def test_what_the_body_adds_to_the_module_stays() -> None:
    layer = ours(nn.Linear(3, 4))
    with wn.writable(layer):
        layer.note = "here"
        layer.register_buffer("scale", torch.ones(1))
        layer.register_forward_pre_hook(lambda module, inputs: None)
        layer.bias = None
    assert layer.note == "here" and "scale" in layer.state_dict() and layer.bias is None
    assert len(layer._forward_pre_hooks) == 1
    assert wn.sites(layer)[0].layout == "parametrized"


def test_the_init_weights_of_a_transformer() -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=11,
        max_position_embeddings=6,
        pad_token_id=None,
    )
    model, plain = (transformers.BertModel(config) for _ in range(2))
    wn.apply(model, "linears")
    for network, context in ((plain, wn.folded), (model, wn.writable)):
        torch.manual_seed(5)
        with context(network):
            for module in network.modules():
                network._init_weights(module)
    wn.remove(model)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
