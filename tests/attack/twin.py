"""What a weight-normed network should be: float64, the naive formula, and nothing of the library.

It holds numbers by name and computes with them; whoever changes the network changes it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["plain", "parametrized", "legacy"]
LAYERS = ("a", "b", "c")
KEYS: dict[Layout, tuple[str, ...]] = {
    "plain": ("weight",),
    "parametrized": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    "legacy": ("weight_g", "weight_v"),
}


@dataclass
class Layer:
    """A linear layer: its bias, and its weight or g and v."""

    values: dict[str, Tensor]
    trains: dict[str, bool]
    layout: Layout = "plain"
    dim: int | None = 0
    eps: float = 0.0

    def norm(self, v: Tensor) -> Tensor:
        axes = [axis for axis in range(2) if axis != self.dim]
        norm = (
            (v * v).sum(axes, keepdim=True).sqrt() if self.dim is not None else (v * v).sum().sqrt()
        )
        return norm.clamp_min(self.eps) if self.eps else norm

    def weight(self, values: dict[str, Tensor]) -> Tensor:
        if self.layout == "plain":
            return values["w"]
        return values["v"] * (values["g"] / self.norm(values["v"]))

    def put_on(self, layout: Layout, dim: int | None, eps: float, train_g: bool) -> None:
        w = self.values.pop("w")
        self.layout, self.dim, self.eps = layout, dim, eps
        self.values |= {"g": self.norm(w), "v": w.clone()}
        trains = self.trains.pop("w")
        self.trains |= {"g": trains and train_g, "v": trains}

    def take_off(self) -> None:
        w = self.weight(self.values)
        trains = self.trains.pop("g") | self.trains.pop("v")
        del self.values["g"], self.values["v"]
        self.layout = "plain"
        self.values["w"], self.trains["w"] = w, trains

    def write(self, w: Tensor) -> None:
        """The weight becomes ``w``."""
        if self.layout == "plain":
            self.values["w"] = w
        else:
            self.values |= {"g": self.norm(w), "v": w.clone()}

    def names(self) -> dict[str, str]:
        """By what it is here, what it is called in a state dict."""
        held = {"bias": "bias"}
        if self.layout == "plain":
            return held | {"w": "weight"}
        g, v = KEYS[self.layout]
        return held | {"g": g, "v": v}


@dataclass
class Twin:
    layers: dict[str, Layer]
    grads: dict[str, Tensor | None] = field(default_factory=dict)

    def leaves(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {
                what: value.detach().clone().requires_grad_(layer.trains[what])
                for what, value in layer.values.items()
            }
            for name, layer in self.layers.items()
        }

    def forward(
        self,
        x: Tensor,
        skip: bool,
        leaves: dict[str, dict[str, Tensor]],
        middle: Callable[[], dict[str, dict[str, Tensor]]] | None = None,
    ) -> Tensor:
        def linear(name: str, h: Tensor) -> Tensor:
            held = leaves[name]
            return h @ self.layers[name].weight(held).T + held["bias"]

        h = torch.tanh(linear("a", x))
        if not skip:
            h = torch.tanh(linear("b", h))
        if middle is not None:
            leaves = middle()
        h = h + torch.tanh(h @ self.layers["a"].weight(leaves["a"]))
        return linear("c", h)

    def backward(self, loss: Callable[[dict[str, dict[str, Tensor]]], Tensor]) -> None:
        leaves = self.leaves()
        flat = {
            f"{name}.{what}": leaf
            for name, held in leaves.items()
            for what, leaf in held.items()
            if leaf.requires_grad
        }
        value = loss(leaves)
        found: tuple[Tensor | None, ...] = (None,) * len(flat)
        if value.requires_grad and flat:
            found = torch.autograd.grad(value, list(flat.values()), allow_unused=True)
        self.grads = dict(zip(flat, found, strict=True))

    def step(self, update: Callable[[Tensor, Tensor], Tensor]) -> None:
        for key, grad in self.grads.items():
            name, what = key.split(".")
            if grad is not None:
                values = self.layers[name].values
                values[what] = update(values[what], grad)

    def scale(self, name: str, what: str, factor: float) -> None:
        self.layers[name].values[what] = self.layers[name].values[what] * factor
