"""The WeightNorm parametrization, and the list that holds its g and v, in torch's layout.

What makes ``module.weight`` read them is :mod:`wn_surgery.norm.module_class`.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.utils.parametrize import ParametrizationList

from wn_surgery.errors import ModelError, ZeroNormError
from wn_surgery.norm import savers
from wn_surgery.norm.cuts import write
from wn_surgery.norm.limits import zero_slices
from wn_surgery.norm.math import magnitude
from wn_surgery.norm.naming import keys_for
from wn_surgery.norm.operator import weight_norm
from wn_surgery.norm.options import Dim, NormOptions, dtype_name

__all__ = ["WeightNorm", "WeightNormList", "is_weight_norm", "parts_of"]


class WeightNorm(nn.Module):
    """The parametrization (g, v) → g · v / max(‖v‖, eps), with the fields of its options."""

    def __init__(
        self, dim: Dim = 0, eps: float = 0.0, norm_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.norm_dtype = dim, eps, norm_dtype

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight; see :func:`wn_surgery.norm.operator.weight_norm`."""
        return weight_norm(v, g, self.dim, self.eps, self.norm_dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The g and v that give ``weight``, as :func:`parts_of`."""
        return parts_of(weight, self.options)

    @property
    def options(self) -> NormOptions:
        """The three options as one value."""
        return NormOptions(self.dim, self.eps, self.norm_dtype)

    def extra_repr(self) -> str:
        """``dim``, and the options that differ from torch's."""
        return str(self.options)


def parts_of(weight: Tensor, norm: NormOptions) -> tuple[Tensor, Tensor]:
    """The g and v that give ``weight``; v is a copy, never an alias.

    A ``ModelError`` says that the weight is not floating-point or not dense, a ``ZeroNormError``
    that weight norm cannot compute one of its slices.
    """
    if not (weight.is_floating_point() or weight.is_complex()) or weight.itemsize < 2:
        found = f"has dtype {weight.dtype}; expected a floating-point tensor of 16 bits or more"
        raise ModelError(f"the new weight {found}; convert it first", kind="dtype")
    if weight.layout is not torch.strided:
        found = f"is stored as {dtype_name(weight.layout)}; expected a dense tensor"
        raise ModelError(f"the new weight {found}; call to_dense() first", kind="dtype")
    if not (weight.is_meta or is_fake(weight)) and (bad := zero_slices(weight, *norm)):
        raise ZeroNormError(
            f"the new weight has {bad} slice(s) along dim={norm.dim} whose norm is zero, not "
            "finite, or too small or large for its dtype; write a weight without them, or "
            f"apply weight norm with {'a larger eps' if norm.eps else 'eps > 0'} or a wider "
            "norm_dtype"
        )
    g = magnitude(weight, *norm)
    return g, weight.detach().clone(memory_format=torch.preserve_format)


def is_weight_norm(plist: Any) -> TypeGuard[WeightNormList]:
    """Whether a list holds g and v of this library, and no other parametrization is on them."""
    return isinstance(plist, WeightNormList) and len(plist) == 1


class WeightNormList(ParametrizationList):
    """The value of ``module.parametrizations.<name>``: g, v and the parametrization.

    Unlike its base it takes g and v as they are, so that Parameters keep their identity, and copies
    into them on assignment. ``order`` is the names in the module's ``_parameters`` before surgery,
    for removal. For ``hold`` and ``slot`` see :mod:`wn_surgery.norm.slots`; ``exact`` may compute
    the weight of what FSDP2 has gathered (:mod:`wn_surgery.model.exact`).
    """

    # Not annotated: torch.jit.script would have to understand it.
    g_init = None  # what a rule has filled g with, where that is known
    renormalize = None  # the norm that a rule wants v put back to, or "rms"
    hold = None
    slot = None
    exact = None

    def __init__(
        self, norm: NormOptions, g: nn.Parameter, v: nn.Parameter, order: Iterable[str] = ()
    ) -> None:
        nn.ModuleList.__init__(self, [WeightNorm(*norm)])
        self.unsafe = True
        self.is_tensor = False
        self.ntensors = 2
        self.order = tuple(order)
        self.original0, self.original1 = g, v

    def forward(self) -> Tensor:
        """The weight; later parametrizations that torch stacked on it are applied too."""
        if len(self._modules) > 1:
            return super().forward()
        g, v = self._parameters.get("original0"), self._parameters.get("original1")
        if g is None or v is None:  # a replica of DataParallel has them as attributes
            g, v = self.original0, self.original1
        exact = getattr(self, "exact", None)
        if exact is not None and (weight := exact.weight(g, v)) is not None:
            return cast(Tensor, weight)
        # Called as a module, so that hooks on it run.
        return cast(Tensor, self._modules["0"](g, v))

    def right_inverse(self, value: Tensor) -> None:
        """Set g and v, in place, so that the weight becomes ``value``."""
        if len(self) > 1:
            super().right_inverse(value)
            return
        if value.shape != self.original1.shape:
            raise ValueError(
                f"expected a weight of shape {tuple(self.original1.shape)}, "
                f"got {tuple(value.shape)}; remove weight norm first to change the shape"
            )
        if value.is_complex() and not self.original1.is_complex():
            raise ValueError(
                f"expected a real weight, got one of dtype {value.dtype}; assign its real part"
            )
        with torch.no_grad():
            if value.layout is torch.strided:
                value = value.detach().to(self.original1)
            g, v = cast(WeightNorm, self[0]).right_inverse(value)
            write(self.original0, g)
            write(self.original1, v)

    def _replicate_for_data_parallel(self) -> WeightNormList:
        replica = cast(WeightNormList, cast(Any, super())._replicate_for_data_parallel())
        for name in ("hold", "slot"):
            replica.__dict__.pop(name, None)
        return replica

    def _save_to_state_dict(
        self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        layout = savers.layout_for(destination, self)
        if layout is None or len(self) > 1:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        owner, _, param = prefix.removesuffix(".").rpartition("parametrizations.")
        if layout == "plain":
            with torch.no_grad():
                destination[owner + param] = self()
            return
        parts = self.original0, self.original1
        for key, part in zip(keys_for(owner + param, "legacy"), parts, strict=True):
            destination[key] = part if keep_vars else part.detach()
