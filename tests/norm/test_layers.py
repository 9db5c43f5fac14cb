"""Every layer of torch that has a weight computes what the plain layer computes, both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from wn_surgery.norm.operator import weight_norm

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN",
    "ignore:enable_nested_tensor is True, but",
)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def tokens() -> Tensor:
    return torch.tensor([[0, 1, 2, 1], [3, 0, 6, 5]])


Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(3, 4), lambda: (randn(2, 3),)),
    "no bias": (lambda: nn.Linear(3, 4, bias=False), lambda: (randn(2, 3),)),
    "bilinear": (lambda: nn.Bilinear(3, 2, 4), lambda: (randn(5, 3), randn(5, 2))),
    "embedding": (lambda: nn.Embedding(7, 3), lambda: (tokens(),)),
    "padded embedding": (lambda: nn.Embedding(7, 3, padding_idx=0), lambda: (tokens(),)),
    "mean bag": (lambda: nn.EmbeddingBag(7, 3, mode="mean"), lambda: (tokens(),)),
    "padded bag": (lambda: nn.EmbeddingBag(7, 3, mode="sum", padding_idx=0), lambda: (tokens(),)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same"), lambda: (randn(2, 4, 8),)),
    "conv1d, grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: (randn(2, 4, 8),)),
    "conv2d, depthwise": (
        lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular"),
        lambda: (randn(2, 4, 5, 5),),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), lambda: (randn(1, 2, 4, 4, 4),)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), lambda: (randn(2, 4, 5),)),
    "transposed 2d, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        lambda: (randn(2, 4, 5, 5),),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: (randn(1, 2, 3, 3, 3),)),
    "rnn": (lambda: nn.RNN(3, 4), lambda: (randn(5, 2, 3),)),
    "gru": (lambda: nn.GRU(3, 4, 2, batch_first=True), lambda: (randn(2, 5, 3),)),
    "lstm": (lambda: nn.LSTM(3, 4, bias=False), lambda: (randn(5, 2, 3),)),
    "lstm, every option": (
        lambda: nn.LSTM(3, 4, num_layers=2, proj_size=2, bidirectional=True),
        lambda: (randn(5, 2, 3),),
    ),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), lambda: (randn(2, 3),)),
    "gru cell": (lambda: nn.GRUCell(3, 4), lambda: (randn(2, 3),)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), lambda: (randn(5, 2, 4),) * 3),
    "attention, other keys": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        lambda: (randn(5, 2, 4), randn(6, 2, 3), randn(6, 2, 5)),
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
        lambda: (randn(5, 2, 4),),
    ),
}


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors in nested outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for each in outputs for tensor in tensors(each)]


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_plain_layer(case: str, dim: int | None) -> None:
    torch.manual_seed(0)
    build, draw = CASES[case]
    plain, inputs = build(), draw()
    # A padded row is zero, and has no direction.
    eps = 1e-6 if "padded" in case else 0.0
    layer = copy.deepcopy(plain)
    report = wn.apply(layer, {"names": "**", "params": "*weight*", "dim": dim, "eps": eps})
    matrices = {name for name, value in plain.named_parameters() if value.ndim > 1}
    assert set(report.changed) == matrices

    def run(module: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
        given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = tensors(module(*given))
        torch.stack([output.pow(2).sum() for output in outputs]).sum().backward()
        return outputs, [x.grad for x in given]

    outputs, gradients = run(layer)
    expected, wanted = run(plain)
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]

    weights = dict(plain.named_parameters())
    for site in wn.sites(layer):
        held, weight = site.held, weights[site.name]
        assert held is not None and held.g is not None and held.v is not None
        again = weight_norm(held.v, held.g, dim, eps)
        for tensor, gradient in zip(
            (held.g, held.v), torch.autograd.grad(again, (held.g, held.v), weight.grad), strict=True
        ):
            torch.testing.assert_close(tensor.grad, gradient)


def test_the_padded_row_of_an_embedding_stays_zero() -> None:
    layer: Any = nn.Embedding(7, 3, padding_idx=2)
    with pytest.raises(wn.ZeroNormError, match="eps > 0"):
        wn.apply(layer, {"names": ""})
    wn.apply(layer, {"names": "", "eps": 1e-6})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.arange(7)).sin().sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight[2], torch.zeros(3))
    assert layer.weight.isfinite().all() and layer.weight[[0, 1, 3]].abs().min() > 0


def test_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(4, 3)
    plain = copy.deepcopy(layer)
    wn.apply(layer, "linears")
    assert wn.sites(layer)[0].dim == 1  # its weight is (in, out)
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_fast_path_of_a_transformer(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval mode torch hands the weights of a whole layer to one operator."""
    fast = torch._transformer_encoder_layer_fwd
    calls: list[int] = []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return fast(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model = copy.deepcopy(plain)
    assert len(wn.apply(model, {"params": "*weight*"}).changed) == 8
    x = torch.randn(3, 5, 4)
    if frozen:
        model.requires_grad_(False)
        plain.requires_grad_(False)
    with torch.set_grad_enabled(frozen):
        expected, plainly = plain(x), len(calls)
        assert torch.equal(model(x), expected)
    assert plainly == 2 and len(calls) == 4


def test_a_recurrent_network_follows_every_change_of_g_and_v() -> None:
    """It keeps a list of its own weights, which must not go stale."""
    layer: Any = nn.LSTM(3, 4, 2)
    wn.apply(layer, {"names": "", "params": "weight_*"})
    x = torch.randn(5, 2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(2):
        before = layer(x)[0]
        optimizer.zero_grad()
        before.pow(2).sum().backward()
        optimizer.step()
        assert not torch.equal(layer(x)[0], before)
    trained = layer(x)[0]
    torch.testing.assert_close(layer.double()(x.double())[0].float(), trained)
    assert torch.equal(layer.float()(x)[0], trained)
    wn.remove(layer)
    assert torch.equal(layer(x)[0], trained)
    assert all(type(weight) is nn.Parameter for weight in layer._flat_weights)
