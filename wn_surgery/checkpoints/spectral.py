"""Spectral norm in checkpoints: both of torch's forms, recognised and removed.

W / σ with σ = uᵀ W v (Miyato et al. 2018, arXiv:1802.05957); u and v are the buffers that
``torch.nn.utils.spectral_norm`` and ``torch.nn.utils.parametrizations.spectral_norm`` keep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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
# After a step of training u is W v, up to what the step has changed; of another axis it is noise.
SURE = 0.9


@dataclass(frozen=True)
class Spectral:
    """One spectral-normed tensor.

    Attributes:
        weight: its key without spectral norm.
        form: ``"legacy"`` or ``"parametrized"``.
        original: the key of W.
        u: the key of the left singular vector.
        v: the key of the right singular vector.
    """

    weight: str
    form: str
    original: str
    u: str
    v: str


def find_spectral(shapes: Mapping[str, Shape]) -> list[Spectral]:
    """The spectral-normed tensors of a state dict.

    Args:
        shapes: the shape of every tensor by its key.

    Returns:
        In the order of the keys.

    Raises:
        CheckpointError: the weight is there a second time, or under another parametrization too.

    Example:
        >>> from wn_surgery.checkpoints.spectral import find_spectral
        >>> shapes = {"fc.weight_orig": (3, 2), "fc.weight_u": (3,), "fc.weight_v": (2,)}
        >>> find_spectral(shapes)[0].weight
        'fc.weight'
    """
    found = [one for name in shapes if (one := _reading(name)) and {one.u, one.v} <= shapes.keys()]
    for one in found:
        if one.weight in shapes:
            raise CheckpointError(
                f"{one.weight!r} is there beside {one.original!r}; delete the one that is stale"
            )
        beside = one.original.removesuffix("original")
        if one.form == "parametrized" and any(
            name.startswith(beside) and name not in (one.original, one.u, one.v) for name in shapes
        ):
            raise CheckpointError(
                f"{one.weight!r} has another parametrization beside spectral norm; load it into "
                "its model and remove the other one first"
            )
        if not axes_of_spectral(shapes[one.original], shapes[one.u], shapes[one.v]):
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
    """The axes that may stand first in the matrix whose singular vectors u and v are.

    Args:
        weight: the shape of W.
        u: the shape of the left vector.
        v: the shape of the right vector.

    Returns:
        Axes of W.

    Example:
        >>> from wn_surgery.checkpoints.spectral import axes_of_spectral
        >>> axes_of_spectral((8, 4, 3), (8,), (12,)), axes_of_spectral((4, 4), (4,), (4,))
        ([0], [0, 1])
    """
    if len(u) != 1 or len(v) != 1:
        return []
    count = math.prod(weight)
    return [
        axis for axis, size in enumerate(weight) if size == u[0] and count == u[0] * v[0] and size
    ]


def spectral_weight(weight: Tensor, u: Tensor, v: Tensor, key: str, dim: Any = "auto") -> Tensor:
    """W / σ, as the live model in eval mode computes it.

    Where the shapes fit several axes, u and v tell: of the right one u is nearly W v. A model
    that never trained has u and v that are noise, and then ``dim`` has to say it.

    Args:
        weight: W, floating-point.
        u: the left singular vector, one axis.
        v: the right singular vector, one axis.
        key: W's name, for errors.
        dim: the axis to take where several fit.

    Returns:
        The weight, in W's dtype, computed in float32 or better.

    Raises:
        CheckpointError: the axis cannot be told, or σ is zero or not a number.

    Example:
        >>> import torch
        >>> from wn_surgery.checkpoints.spectral import spectral_weight
        >>> u, v = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> spectral_weight(torch.eye(2, 3) * 4, u, v, "weight")
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        w, u, v = weight.to(wide), u.to(wide), v.to(wide)
        axes = axes_of_spectral(tuple(w.shape), tuple(u.shape), tuple(v.shape))
        axis = axes[0] if len(axes) == 1 else _told(w, u, v, axes, key, dim)
        sigma = torch.dot(u, torch.mv(_matrix(w, axis), v))
        if not (sigma.isfinite() and sigma != 0):
            raise CheckpointError(f"{key!r} has the spectral norm {float(sigma)}: W/σ is undefined")
        return (w / sigma).to(weight.dtype)


def _told(w: Tensor, u: Tensor, v: Tensor, axes: list[int], key: str, dim: Any) -> int:
    if dim in axes:
        return int(dim)
    likeness = {}
    for axis in axes:
        product = torch.mv(_matrix(w, axis), v)
        likeness[axis] = float(torch.dot(u, product) / (u.norm() * product.norm()))
    best = max(likeness, key=lambda axis: likeness[axis])
    if likeness[best] >= SURE and all(likeness[a] < SURE for a in axes if a != best):
        return best
    raise CheckpointError(
        f"the u and v of {key!r} {tuple(w.shape)} fit its axes {' and '.join(map(str, axes))}: say "
        "which stands for the rows, dim=0, or 1 for transposed convolutions (--dim)"
    )


def _matrix(w: Tensor, axis: int) -> Tensor:
    order = [axis, *(each for each in range(w.ndim) if each != axis)]
    return w.permute(order).reshape(w.shape[axis], -1)
