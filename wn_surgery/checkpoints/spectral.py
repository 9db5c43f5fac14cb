"""Spectral norm in checkpoints: both of torch's forms, recognised and removed.

W / σ with σ = uᵀ W v (Miyato et al. 2018, arXiv:1802.05957); u and v are the buffers that
``torch.nn.utils.spectral_norm`` and ``torch.nn.utils.parametrizations.spectral_norm`` keep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wn_surgery.checkpoints.pairs import Shape
from wn_surgery.errors import CheckpointError

__all__ = ["Spectral", "axes_of_spectral", "find_spectral", "spectral_weight"]

_LEGACY = re.compile(r"(?P<weight>.*)_orig", re.DOTALL)
_PARAMETRIZED = re.compile(
    r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<param>[^.]+)\.original", re.DOTALL
)
# After a step of training u is W v, up to what the step has changed; along another axis u and W v
# have nothing to do with each other.
SURE = 0.9


@dataclass(frozen=True)
class Spectral:
    """One spectral-normed tensor: the key of its plain weight, and those of W, u and v."""

    weight: str
    layout: str
    original: str
    u: str
    v: str

    @property
    def parts(self) -> tuple[str, str, str]:
        """The keys of W, u and v."""
        return self.original, self.u, self.v


def find_spectral(shapes: Mapping[str, Shape]) -> list[Spectral]:
    """The spectral-normed tensors of a state dict, in the order of the keys."""
    found = [one for name in shapes if (one := _reading(name)) and {one.u, one.v} <= shapes.keys()]
    for one in found:
        if one.weight in shapes:
            raise CheckpointError(
                f"{one.weight!r} is there beside {one.original!r}; delete the one that is stale"
            )
        beside = one.original.removesuffix("original")
        if one.layout == "parametrized" and any(
            name.startswith(beside) and name not in one.parts for name in shapes
        ):
            raise CheckpointError(
                f"{one.weight!r} has another parametrization besides spectral norm; remove that in "
                "its model first"
            )
        if not axes_of_spectral(*(shapes[part] for part in one.parts)):
            raise CheckpointError(
                f"{one.u!r} {shapes[one.u]} and {one.v!r} {shapes[one.v]} are no singular vectors "
                f"of {one.original!r} {shapes[one.original]}; one of them is from another model"
            )
    return found


def _reading(name: str) -> Spectral | None:
    if found := _LEGACY.fullmatch(name):
        weight = found["weight"]
        return Spectral(weight, "legacy", name, f"{weight}_u", f"{weight}_v")
    if found := _PARAMETRIZED.fullmatch(name):
        stem = name.removesuffix("original")
        weight = found["prefix"] + found["param"]
        return Spectral(weight, "parametrized", name, f"{stem}0._u", f"{stem}0._v")
    return None


def axes_of_spectral(weight: Shape, u: Shape, v: Shape) -> list[int]:
    """The axes of W that can be the rows of the matrix whose singular vectors u and v are."""
    if len(u) != 1 or len(v) != 1 or math.prod(weight) != u[0] * v[0]:
        return []
    return [axis for axis, size in enumerate(weight) if size == u[0] and size]


def spectral_weight(parts: Iterable[Tensor], key: str, dim: Any = "auto") -> Tensor:
    """W / σ of W, u and v, in the dtype of W, computed as the live model in eval mode does it.

    Where the shapes fit several axes, u and v tell which it is: for the right one u is nearly W v.
    In a model that never trained u and v are random, and then ``dim`` has to tell.
    """
    weight, u, v = parts
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        w, u, v = weight.to(wide), u.to(wide), v.to(wide)
        axes = axes_of_spectral(tuple(w.shape), tuple(u.shape), tuple(v.shape))
        axis = axes[0] if len(axes) == 1 else _rows(w, u, v, axes, key, dim)
        sigma = torch.dot(u, torch.mv(_matrix(w, axis), v))
        if not (sigma.isfinite() and sigma != 0):
            raise CheckpointError(f"{key!r} has the spectral norm {float(sigma)}: W/σ is undefined")
        return (w / sigma).to(weight.dtype)


def _rows(w: Tensor, u: Tensor, v: Tensor, axes: list[int], key: str, dim: Any) -> int:
    if dim in axes:
        return int(dim)
    products = {axis: torch.mv(_matrix(w, axis), v) for axis in axes}
    sure = [
        axis
        for axis, product in products.items()
        if float(torch.dot(u, product) / (u.norm() * product.norm())) >= SURE
    ]
    if len(sure) == 1:
        return sure[0]
    raise CheckpointError(
        f"the u and v of {key!r} {tuple(w.shape)} fit its axes {' and '.join(map(str, axes))}: "
        f"pass dim={' or '.join(map(str, axes))} to say which are the rows; they are 1 for "
        "transposed convolutions, else 0"
    )


def _matrix(w: Tensor, axis: int) -> Tensor:
    return w.movedim(axis, 0).reshape(w.shape[axis], -1)
