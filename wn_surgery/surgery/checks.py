"""What can be wrong with one step, found before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from wn_surgery.errors import ModelError, RuleError, WeightNormError, ZeroNormError
from wn_surgery.model.layouts import Normed
from wn_surgery.model.sites import Node, Site, is_folded
from wn_surgery.norm.limits import has_easy_norms, zero_slices
from wn_surgery.norm.math import weight_norm
from wn_surgery.norm.options import Dim, NormOptions, dtype_name, kept_axes
from wn_surgery.rules.sources import Rule

__all__ = ["floating", "quantizer", "resolve_dim"]


def before_any_change(site: Site) -> Iterator[WeightNormError]:
    """Problems that stand against every change of a site."""
    node, tensor = site.node, site.tensor
    if is_folded(node):
        yield ModelError(
            f"{site.name} is inside folded() or writable() now; leave the context first",
            kind="folded",
            site=site.name,
        )
    if holder := node.wrapped or _sharded(tensor):
        yield ModelError(
            f"{site.name} is held by {holder}, which keeps references to the parameters it was "
            "given; change weight norm before wrapping or sharding the model",
            kind="wrapped",
            site=site.name,
        )
    if torch.is_inference_mode_enabled() or (tensor is not None and tensor.is_inference()):
        yield ModelError(
            f"{site.name} cannot be changed under torch.inference_mode(): tensors made there can "
            "never be trained; leave inference mode, or use torch.no_grad()",
            kind="inference",
            site=site.name,
        )


def before_apply(site: Site) -> Iterator[WeightNormError]:
    """Problems that stand against putting weight norm on a plain parameter."""
    tensor = site.tensor
    assert tensor is not None  # a plain site always has its parameter
    if nn.parameter.is_lazy(tensor):
        yield ModelError(
            f"{site.name} is uninitialised ({type(site.module).__name__}); run one forward pass "
            "to give it a shape, then apply weight norm",
            kind="lazy",
            site=site.name,
        )
        return
    if maker := quantizer(site.node, tensor):
        yield ModelError(
            f"{site.name} is quantized by {maker}; apply weight norm to the floating-point model "
            "and remove it before quantization, or exclude this module from the rule",
            kind="quantized",
            site=site.name,
        )
        return
    if not floating(tensor):
        yield ModelError(
            f"{site.name} has dtype {tensor.dtype}; expected a floating-point or complex "
            "parameter; exclude it from the rule",
            kind="dtype",
            site=site.name,
        )
        return
    layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    if layout != "strided" or not isinstance(tensor, nn.Parameter):
        what = "a plain tensor where a Parameter should be"
        if layout != "strided":
            what = f"stored as {layout}"
        yield ModelError(
            f"{site.name} is {what}; expected a dense nn.Parameter; exclude it from the rule, or "
            "assign one first",
            kind="dtype",
            site=site.name,
        )
        return
    if tensor.numel() == 0:
        yield ZeroNormError(
            f"{site.name} of shape {site.shape} has no elements and so no norm; exclude it from "
            "the rule",
            site=site.name,
        )
        return
    yield from before_any_change(site)


def before_norm(site: Site, norm: NormOptions, g_init: float | None) -> Iterator[WeightNormError]:
    """Problems of the weight's dtype with the options of the rule."""
    tensor = site.tensor
    assert tensor is not None  # checked by the caller
    for what, value, dtype in (
        ("g_init", abs(g_init or 0.0), tensor.dtype),
        ("eps", norm.eps, norm.norm_dtype or tensor.dtype),
        ("eps", norm.eps, tensor.dtype),  # in which a g of that size is stored
    ):
        limits = torch.finfo(dtype)
        if value > limits.max or (what == "g_init" and 0.0 < value < limits.smallest_normal):
            yield RuleError(
                f"{what}={value} does not fit {_short(dtype)} for {site.name}; expected at most "
                f"{limits.max:.3g}, and 0 or at least {limits.smallest_normal:.3g}",
                site=site.name,
            )
            return
    if norm.eps == 0.0:
        return
    working = norm.norm_dtype or tensor.dtype
    if norm.eps < torch.finfo(working).smallest_normal:
        yield ZeroNormError(
            f"eps={norm.eps} is below the smallest normal number of {working} for {site.name}; "
            f"use eps >= {torch.finfo(working).smallest_normal:.3g} or norm_dtype=torch.float32",
            site=site.name,
        )


def before_division(
    wanted: Iterable[tuple[Site, NormOptions, float | None]],
) -> Iterator[WeightNormError]:
    """Sites whose weight would be divided by a norm that is zero, infinite or lost.

    Args:
        wanted: the sites, each with the options and the ``g_init`` that it is to have.
    """
    groups: dict[tuple[Any, ...], list[tuple[Site, Tensor]]] = {}
    for site, norm, g_init in wanted:
        weight = site.held.weight() if isinstance(site.held, Normed) else site.tensor
        assert weight is not None  # nothing is planned for a site without a tensor
        if not weight.is_meta and not is_fake(weight):
            options = (norm.eps, norm.norm_dtype, g_init)
            key = (norm.dim, options, weight.shape, weight.dtype, weight.device)
            groups.setdefault(key, []).append((site, weight.detach()))
    for (dim, (eps, norm_dtype, g_init), *_), members in groups.items():
        # Models have few shapes and many layers: small weights are looked at together.
        together = max(1, _STACKED // max(1, members[0][1].numel()))
        for start in range(0, len(members), together):
            chunk = members[start : start + together]
            easy = g_init is None and len(chunk) > 1
            if easy and has_easy_norms(*_stacked(chunk, dim), norm_dtype):
                continue
            for site, weight in chunk:
                if bad := zero_slices(weight, dim, eps, norm_dtype, g_init):
                    yield _undivided(site, weight, bad, NormOptions(dim, eps, norm_dtype), g_init)


_STACKED = 1 << 18


def _stacked(chunk: Sequence[tuple[Site, Tensor]], dim: Dim) -> tuple[Tensor, Dim]:
    return torch.stack([w for _, w in chunk]), (0, *(axis + 1 for axis in kept_axes(dim)))


def _undivided(
    site: Site,
    weight: Tensor,
    bad: int,
    norm: NormOptions,
    g_init: float | None,
) -> ZeroNormError:
    stored = f"g is stored in {_short(weight.dtype)}" if g_init is None else f"g_init={g_init}"
    return ZeroNormError(
        f"{site.name} has {bad} slice(s) along dim={norm.dim} whose norm is zero, not finite, or "
        f"too small or large for {_short(norm.norm_dtype or weight.dtype)} ({stored}), so v/‖v‖ is "
        "no number that can be trusted; initialise them, or give the rule "
        f"{'a larger eps' if norm.eps else 'eps > 0'} or a wider norm_dtype",
        site=site.name,
    )


def _short(dtype: torch.dtype) -> str:
    return dtype_name(dtype)


def resolve_dim(site: Site, rule: Rule) -> Dim | ModelError:
    """The rule's ``dim`` for this weight, or what is wrong with it."""
    dim = rule.dim
    ndim = len(site.shape)
    if dim == "out":
        return output_axis(site)
    if any(axis >= ndim for axis in kept_axes(dim)):
        return ModelError(
            f"dim={dim} is out of range for {site.name} of shape {site.shape}; expected axes "
            f"from 0 to {ndim - 1}, None for the whole tensor, or 'out'",
            kind="dim",
            site=site.name,
        )
    return dim


def output_axis(site: Site) -> Dim | ModelError:
    module = site.module
    if isinstance(module, _ConvTransposeNd):
        # The weight is (in, out / groups, kernel): with one channel a group, each output
        # channel is one slice along both axes; in between, no set of axes separates them.
        if module.groups == 1:
            return 1
        if module.groups == module.in_channels:
            return (0, 1)
        return ModelError(
            f"dim='out' has no axes for {site.name}, a transposed convolution with "
            f"groups={module.groups}; use dim=0 (torch's default) or dim=1",
            kind="dim",
            site=site.name,
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 1
    if isinstance(
        module,
        (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
    ):
        return 0
    if is_conv1d(module):
        return 1
    return ModelError(
        f"dim='out' is not known for {site.node.base.__name__} ({site.name}); give the axis as "
        "a number",
        kind="dim",
        site=site.name,
    )


def before_migration(site: Site, to: str) -> Iterator[WeightNormError]:
    """Problems of moving a weight-normed site to another layout."""
    held = site.held
    assert isinstance(held, Normed)
    norm = held.norm
    if to == "legacy" and runs_no_hook(site):
        yield ModelError(
            f"{site.name} is read by attention, which never calls the module it is in, so a legacy "
            "hook would never compute it; leave it parametrized, or remove its weight norm",
            kind="stacked",
            site=site.name,
        )
        return
    if to == "legacy" and (
        isinstance(norm.dim, tuple) or norm.eps != 0.0 or norm.norm_dtype is not None
    ):
        yield ModelError(
            f"{site.name} has {norm}, which torch's legacy hook cannot compute; it "
            "knows a single dim, eps=0 and no norm_dtype",
            kind="stacked",
            site=site.name,
        )
    if held.maker not in ("torch", "wn_surgery") and not held.v.is_meta:
        with torch.no_grad():
            same = torch.equal(weight_norm(held.v, held.g, *norm), held.compute())
        if not same:
            yield ModelError(
                f"{site.name} is computed by {held.maker}, which gives other values than "
                "g · v/‖v‖; it can be removed, not migrated",
                kind="stacked",
                site=site.name,
            )


def runs_no_hook(site: Site) -> bool:
    """Whether the weight is read without a call of its module, so that its hooks never run.

    ``nn.MultiheadAttention`` reads ``out_proj.weight`` so, in each of its paths.
    """
    # The type says it where the model that was given is that layer alone.
    return site.node.uncalled or isinstance(site.module, NonDynamicallyQuantizableLinear)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers whose weight is (in, out)."""
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(module).__mro__}
    return "transformers.pytorch_utils.Conv1D" in names


def lazy(tensor: Tensor) -> bool:
    """Whether the parameter has no shape yet."""
    return bool(nn.parameter.is_lazy(tensor))


def floating(tensor: Tensor) -> bool:
    """Whether weight norm is defined for the dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def quantizer(node: Node, tensor: Tensor | None) -> str | None:
    """What quantized the weight, if anything did."""
    owner = node.base.__module__
    if ".quantized" in owner or owner.startswith(("bitsandbytes", "torchao")):
        return f"{owner}.{node.base.__name__}"
    if tensor is None:
        return None
    kind = type(tensor)
    if kind.__module__.startswith(("torchao", "bitsandbytes")):
        return f"{kind.__module__}.{kind.__name__}"
    if tensor.is_quantized or (tensor.is_floating_point() and tensor.element_size() == 1):
        return str(tensor.dtype)
    return None


def _sharded(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    if type(tensor).__name__ == "DTensor":
        return "a DTensor"
    return "DeepSpeed ZeRO" if hasattr(tensor, "ds_id") else None
