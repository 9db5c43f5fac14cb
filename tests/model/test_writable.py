"""writable: every way in which PyTorch code writes a weight, and everything that must not move."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import wn_surgery as wn
from tests.makers import Tied, legacy, ours

Maker = Callable[[nn.Module], Any]
MAKERS = pytest.mark.parametrize("make", [legacy, parametrizations.weight_norm, ours])
X = torch.linspace(-1, 1, 6).view(2, 3)

PARTS = ("_g", "_v", "original0", "original1")


def g_and_v(module: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if name.endswith(PARTS)]


def set_rows(layer: Any) -> None:
    with torch.no_grad():
        layer.weight[1] = 2.0
        layer.weight[:, 0] *= 3.0


def from_numpy(layer: Any) -> None:
    layer.weight.detach().numpy()[:] = 0.25


def in_a_loop_over_parameters(layer: Any) -> None:
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


WRITES: dict[str, Callable[[Any], object]] = {
    "normal_": lambda layer: nn.init.normal_(layer.weight, std=0.02),
    "orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    "kaiming_": lambda layer: nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"),
    "data.normal_": lambda layer: layer.weight.data.normal_(),
    "data.mul_": lambda layer: layer.weight.data.mul_(3),
    "data =": lambda layer: setattr(layer.weight, "data", torch.rand(4, 3)),
    "rows": set_rows,
    "numpy": from_numpy,
    "parameters()": in_a_loop_over_parameters,
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "apply": lambda layer: layer.apply(lambda module: nn.init.ones_(module.weight)),
    "load_state_dict": lambda layer: nn.Module.load_state_dict(
        layer, {k: torch.rand_like(v) for k, v in layer.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("write", WRITES)
@MAKERS
def test_the_layer_is_then_as_a_plain_one_would_be(make: Maker, write: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(3, 4)
    layer = make(copy.deepcopy(plain))
    torch.manual_seed(1)
    with wn.writable(layer):
        # The stored weight may differ by a rounding from the one that went in.
        layer.weight.data.copy_(plain.weight.detach())
        WRITES[write](layer)
        assert list(layer.state_dict()) == ["weight", "bias"]
        inside = layer(X).detach()
    torch.manual_seed(1)
    WRITES[write](plain)
    assert torch.equal(inside, plain(X))
    torch.testing.assert_close(layer(X), plain(X))
    wn.remove(layer)
    torch.testing.assert_close(layer.weight, plain.weight)
    if make is ours:
        assert torch.equal(layer.weight, plain.weight)


@MAKERS
def test_an_optimizer_that_was_there_goes_on_training(make: Maker) -> None:
    layer = make(nn.Linear(3, 4))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(X).sum().backward()
    optimizer.step()
    held = g_and_v(layer)
    state = copy.deepcopy(optimizer.state_dict())
    with wn.writable(layer):
        nn.init.ones_(layer.weight)
    assert len(held) == 2
    assert all(a is b for a, b in zip(g_and_v(layer), held, strict=True))
    assert str(optimizer.state_dict()) == str(state)
    before = layer(X).detach()
    optimizer.zero_grad()
    layer(X).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(layer(X), before)


@MAKERS
def test_only_what_was_written_changes(make: Maker) -> None:
    model = nn.Sequential(make(nn.Linear(3, 4)), make(nn.Linear(4, 2)), make(nn.Linear(2, 2)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.37)  # v is then not the weight
        model[2].bias.fill_(torch.nan)
        g_and_v(model[2])[1].fill_(torch.nan)  # as in a model that has diverged
    before = {key: value.clone() for key, value in model.state_dict().items()}
    versions = [parameter._version for parameter in model[0].parameters()]
    with wn.writable(model):
        nn.init.ones_(model[1].weight)
        _ = model[0].weight.mean(), model[0](X)  # reading is no writing
    for key, value in model.state_dict().items():
        same = torch.allclose(value, before[key], rtol=0, atol=0, equal_nan=True)
        assert same is (not key.startswith("1.") or key == "1.bias"), key
    assert versions == [parameter._version for parameter in model[0].parameters()]


@MAKERS
def test_parameters_and_hooks_keep_their_order(make: Maker) -> None:
    layer = nn.Linear(3, 4)
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("first"))
    layer = make(layer)
    layer.register_forward_pre_hook(lambda *_: calls.append("last"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_parameter("more", nn.Parameter(torch.ones(1)))
    layer.register_load_state_dict_post_hook(lambda *_: None)

    def look() -> list[Any]:
        return [
            [(name, id(parameter)) for name, parameter in layer.named_parameters()],
            list(layer._forward_pre_hooks.items()),
            list(layer._forward_hooks.items()),
            list(layer._load_state_dict_pre_hooks.items()),
            list(layer._load_state_dict_post_hooks.items()),
            list(layer.__dict__),
            [(name, id(module)) for name, module in layer.named_modules()],
            type(layer),
        ]

    before = look()
    with wn.writable(layer):
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "more"]
        nn.init.ones_(layer.weight)
    assert look() == before
    calls.clear()
    layer(X)
    assert calls == ["first", "last", "after"]


@MAKERS
def test_what_the_body_registers_stays(make: Maker) -> None:
    layer, calls = make(nn.Linear(3, 4)), []
    with wn.writable(layer):
        layer.note = "here"
        layer.register_buffer("scale", torch.ones(1))
        layer.register_parameter("shift", nn.Parameter(torch.ones(1)))
        layer.add_module("child", nn.ReLU())
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        layer.eval()
        nn.init.ones_(layer.weight)
    assert layer.note == "here" and not layer.training
    assert {"scale", "shift"} <= layer.state_dict().keys() and hasattr(layer, "child")
    layer(X)
    assert calls == [1]
    handle.remove()
    layer(X)
    assert calls == [1]
    torch.testing.assert_close(layer.weight.detach(), torch.ones(4, 3))


def test_a_nested_writable_does_nothing() -> None:
    layer = ours(nn.Linear(3, 4))
    with wn.writable(layer):
        with wn.writable(layer):
            nn.init.ones_(layer.weight)
        assert type(layer.weight) is nn.Parameter  # the outer one is still open
        layer.weight.data.mul_(2)
    assert torch.equal(layer.weight, torch.full((4, 3), 2.0))
    before = layer.weight.detach().clone()
    with pytest.raises(KeyError), wn.writable(layer):  # noqa: PT012
        with wn.writable(layer):
            nn.init.ones_(layer.weight)
        raise KeyError
    assert torch.equal(layer.weight, before)


def test_folded_and_writable_together() -> None:
    layer = ours(nn.Linear(3, 4))
    expected = layer(X).detach()
    with wn.folded(layer), pytest.raises(wn.FoldedModelError, match="leave that context first"):
        wn.writable(nn.Sequential(layer)).__enter__()
    assert torch.equal(layer(X), expected)
    with wn.writable(layer):
        nn.init.ones_(layer.weight)
        with wn.folded(layer):  # what is plain already is read as it is
            assert torch.equal(layer.weight, torch.ones(4, 3))
    assert torch.equal(layer.weight, torch.ones(4, 3))


@pytest.mark.parametrize("end", ["embed", "head"])
def test_tied_ends_stay_tied(end: str) -> None:
    model: Any = Tied()
    wn.apply(model, {"types": ["Embedding", "Linear"], "tied": "together"})
    held = [list(model.get_submodule(name).parameters()) for name in ("embed", "head")]
    with wn.writable(model):
        assert model.embed.weight is model.head.weight
        nn.init.constant_(getattr(model, end).weight, 0.5)
    assert torch.equal(model.embed.weight, torch.full((5, 3), 0.5))
    assert torch.equal(model.head.weight, model.embed.weight)
    now = [list(model.get_submodule(name).parameters()) for name in ("embed", "head")]
    for tensors in zip(*held, *now, strict=True):
        assert len({id(tensor) for tensor in tensors}) == 1
    wn.remove(model)
    assert model.embed.weight is model.head.weight


def test_a_padded_embedding_needs_eps() -> None:
    layer = ours(nn.Embedding(5, 3))
    layer.padding_idx = 2
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(wn.ZeroNormError, match=r"weight: .*1 slice"), wn.writable(layer):
        layer.reset_parameters()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    padded: Any = nn.Embedding(5, 3, padding_idx=2)
    wn.apply(padded, {"names": "", "eps": 1e-6})
    with wn.writable(padded):
        padded.reset_parameters()
    assert not padded.weight[2].any() and not torch.equal(
        padded.weight, before["parametrizations.weight.original1"]
    )


def test_one_failing_weight_holds_back_all_of_them() -> None:
    model = nn.Sequential(ours(nn.Linear(3, 4)), ours(nn.Linear(4, 2)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(wn.ZeroNormError, match=r"1\.weight"), wn.writable(model):  # noqa: PT012
        nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
        nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("frozen", [False, True])
@MAKERS
def test_requires_grad_is_kept(make: Maker, frozen: bool) -> None:
    layer = make(nn.Linear(3, 4)).requires_grad_(not frozen)
    with torch.no_grad(), wn.writable(layer):
        assert layer.weight.requires_grad is not frozen
        nn.init.ones_(layer.weight)
    assert all(parameter.requires_grad is not frozen for parameter in layer.parameters())


def test_an_lstm_runs_inside() -> None:
    lstm: Any = nn.LSTM(3, 4, num_layers=2)
    wn.apply(lstm, {"names": "", "params": "weight_*"})
    x = torch.randn(5, 1, 3)
    with wn.writable(lstm):
        for name in ("weight_ih_l0", "weight_hh_l1"):
            nn.init.orthogonal_(getattr(lstm, name))
        inside = lstm(x)[0].detach()
    assert torch.equal(lstm(x)[0], inside)


def test_wav2vec2_and_its_own_initialisation() -> None:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(4, 4),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=11,
    )

    def made() -> Any:
        torch.manual_seed(4)  # an early transformers 5 does not draw all of it again below
        return transformers.Wav2Vec2Model(config).eval()

    model, plain = made(), made()
    wn.remove(plain)  # transformers builds it with torch's weight norm on one convolution
    wn.apply(model, "linears")
    assert {site.held.maker for site in wn.sites(model) if site.held} == {"torch", "wn_surgery"}
    for network in (plain, model):
        torch.manual_seed(5)
        with wn.writable(network):
            for module in network.modules():
                network._init_weights(module)
    x = torch.randn(1, 400)
    with torch.no_grad():
        torch.testing.assert_close(model(x).last_hidden_state, plain(x).last_hidden_state)
    wn.remove(model)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


@pytest.mark.parametrize(
    "make",
    [lambda w: w.to(torch.int32), lambda w: w.to(torch.float8_e4m3fn), lambda w: w.to_sparse()],
)
def test_a_weight_that_has_no_norm(make: Any) -> None:
    layer = nn.Linear(3, 4)
    wn.apply(layer, {"names": ""})
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    refused = pytest.raises(ValueError, match="expected a dense floating-point one")
    with refused as caught, wn.writable(layer):
        layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)
    assert "\n" not in str(caught.value)
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
