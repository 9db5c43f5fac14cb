"""One small module of every kind that has weights, users' own among them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LAYERS", "Block", "Gated", "Registered", "Scaled", "noted"]


class Scaled(nn.Linear):
    """A subclass with a parameter and an attribute of its own."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.note = {"made by": ["a user"]}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Gated(nn.Module):
    """An unusual order of parameters, one that is None, an integer one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_parameter("absent", None)
        self.gate = nn.Parameter(torch.randn(2, 4, 2))
        self.steps = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3))
        self.inputs = 3

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x - self.mean, self.weight, self.bias) * self.gate.sum()


class _Registering(type):
    """A metaclass of a user: the library's classes have one too."""


class Registered(nn.Linear, metaclass=_Registering):
    def __init__(self) -> None:
        super().__init__(3, 4)


class Block(nn.Module):
    """Holds its children as attributes, as most models do."""

    def __init__(self, children: list[nn.Module]) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        for name, child in zip(("inner", "fc", "proj"), children, strict=False):
            setattr(self, name, child)


def noted(module: nn.Module, inputs: Any) -> None:
    """A user's forward pre-hook, which must stay where it is."""


def _gpt_conv() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 3)


def _channels_last() -> nn.Module:
    return nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# Every kind of layer.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "bare": lambda: nn.Linear(3, 4, bias=False),
    "complex": lambda: nn.Linear(3, 4, dtype=torch.complex64),
    "bilinear": lambda: nn.Bilinear(3, 3, 4),
    "embedding": lambda: nn.Embedding(4, 3),
    "padded": lambda: nn.Embedding(4, 3, padding_idx=0),  # its row 0 is zero
    "conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "conv2d": _channels_last,
    "conv3d": lambda: nn.Conv3d(2, 2, 2),
    "transposed1d": lambda: nn.ConvTranspose1d(3, 4, 2),
    "transposed1d_depthwise": lambda: nn.ConvTranspose1d(3, 3, 2, groups=3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 4, 2, groups=2),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "lstm_projected": lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 4, bias=False),
    "rnn_cell": lambda: nn.RNNCell(3, 4),
    "lstm_cell": lambda: nn.LSTMCell(3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "cross_attention": lambda: nn.MultiheadAttention(4, 2, kdim=4, vdim=2),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0),
    "layer_norm": lambda: nn.LayerNorm(3),
    "layer_norm2d": lambda: nn.LayerNorm((2, 3)),
    "scaled": Scaled,
    "gated": Gated,
    "registered": Registered,
    "parameter_list": lambda: nn.ParameterList([torch.randn(4, 3), torch.randn(2)]),
}
if importlib.util.find_spec("transformers"):
    LAYERS["gpt_conv"] = _gpt_conv
