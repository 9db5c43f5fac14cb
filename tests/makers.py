"""Modules, models and layouts that many tests start from."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wn_surgery as wn

__all__ = [
    "DECODER",
    "Double",
    "Tied",
    "legacy",
    "llama",
    "normed",
    "ours",
    "parametrized",
    "shaken",
]

# A small decoder of transformers.
DECODER: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def legacy(module: nn.Module, name: str = "weight", dim: int | None = 0) -> Any:
    """Put torch's old weight norm on, the one with a hook, without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module, name, dim)  # type: ignore[arg-type]


def parametrized(module: nn.Module, name: str = "weight", dim: int | None = 0) -> Any:
    """Put torch's parametrized weight norm on."""
    return parametrizations.weight_norm(module, name, dim)  # type: ignore[arg-type]


def ours(module: nn.Module, name: str = "weight", dim: Any = 0, **options: Any) -> Any:
    """Put this library's weight norm on a parameter of the module itself."""
    wn.apply(module, {"names": "", "params": name, "dim": dim, **options})
    return module


def normed(model: nn.Module) -> list[str]:
    """The names of the weights that have weight norm."""
    return [site.name for site in wn.sites(model) if site.normed]


def shaken(model: Any, amount: float = 1.0) -> Any:
    """Make g and ‖v‖ differ, as training does."""
    with torch.no_grad():
        for site in wn.sites(model):
            if site.held is not None and site.held.g is not None and site.held.v is not None:
                site.held.g.mul_(1 + amount * torch.rand(site.held.g.shape))
                site.held.v.mul_(1.5)
    return model


class Double(nn.Module):
    """A parametrization that is not weight norm."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(tokens))
        return out


def llama(**sizes: Any) -> Any:
    """A small Llama, with the same weights at each call."""
    import transformers as hf

    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, **sizes}))
