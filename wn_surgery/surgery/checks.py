"""What can be wrong with one step, found before anything is changed."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from wn_surgery.errors import WeightNormError
from wn_surgery.model.holders import ZERO3, in_parts, is_ordinary
from wn_surgery.model.layouts import Normed
from wn_surgery.model.sites import Node, Site, is_folded
from wn_surgery.norm.cuts import is_dtensor, why_uncut
from wn_surgery.norm.limits import has_easy_norms, zero_slices
from wn_surgery.norm.math import wanted_norm
from wn_surgery.norm.module_class import FOLDED
from wn_surgery.norm.operator import weight_norm
from wn_surgery.norm.options import Dim, NormOptions, dtype_name, kept_axes
from wn_surgery.rules.rule import Rule, has_axes

__all__ = ["error_at", "output_axis", "quantizer", "refused_norm", "resolve_norm", "runs_no_hook"]


def error_at(site: Site, kind: str, message: str) -> WeightNormError:
    """The error of a kind, about one site."""
    return WeightNormError(message, kind=kind, site=site.name)


def before_any_change(site: Site) -> Iterable[WeightNormError]:
    """What prevents every change of a site."""
    tensor = site.tensor
    if (
        is_ordinary(tensor)
        and site.node.wrapped is None
        and not FOLDED
        and not tensor.is_inference()
        and not torch.is_inference_mode_enabled()
    ):
        return ()
    return _before_any_change(site, tensor)


def _before_any_change(site: Site, tensor: Tensor | None) -> Iterator[WeightNormError]:
    if is_folded(site.node):
        message = f"{site.name} is inside folded() or writable() now; leave the context first"
        yield error_at(site, "folded", message)
    if holder := site.holder:
        message = (
            f"{site.name} is held by {holder}, which keeps references to the parameters it was "
            "given; change weight norm before wrapping or sharding the model"
        )
        if holder == ZERO3:
            message = (
                f"{site.name} is partitioned by {ZERO3}: each rank has a part of its elements, and "
                "no slices; change weight norm before deepspeed.initialize, outside zero.Init"
            )
        if site.held is not None and (site.normed or "WeightNorm" in site.held.maker):
            message += _plain_state(holder)
        yield error_at(site, "wrapped", message)
    elif tensor is not None and (why := why_uncut(tensor)):
        yield error_at(site, "wrapped", f"{site.name} {why}")
    if torch.is_inference_mode_enabled() or (tensor is not None and tensor.is_inference()):
        message = (
            f"{site.name} cannot be changed under torch.inference_mode(), whose tensors can never "
            "be trained; leave inference mode, or use torch.no_grad()"
        )
        yield error_at(site, "inference", message)


def _plain_state(holder: str) -> str:
    """The lines that give plain weights where ``remove`` cannot."""
    lines = "    state = model.state_dict()"
    if "FSDP" in holder:
        lines = """\
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"""
    elif holder == ZERO3:
        lines = """\
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        state = {key: value.clone() for key, value in model.state_dict().items()}"""
    plain = "    plain = wn_surgery.checkpoints.convert(state)"
    return f". For plain weights, write on every rank:\n{lines}\n{plain}"


def kind_of(site: Site, rule: Rule) -> Hashable | None:
    """Equal for plain weights of which a rule makes the same, but for :func:`before_any_change`.

    ``None`` where more than this counts.
    """
    tensor = site.tensor
    if type(tensor) is not nn.Parameter or rule.dim == "out" or rule.renormalize == "rms":
        return None
    return (
        id(rule), site.node.base, tensor.dtype, tensor.layout, tensor.is_nested, tensor.ndim,
        tensor.numel() == 0,
    )  # fmt: skip


def before_apply(site: Site) -> list[WeightNormError]:
    """What prevents weight norm on a plain parameter."""
    tensor = site.tensor
    assert tensor is not None  # a plain site always has its parameter
    if in_parts(tensor):  # which says nothing about what it is a part of
        return list(before_any_change(site))
    if wrong := _unsuitable(site, tensor):
        kind, message = wrong
        return [error_at(site, kind, f"{site.name} {message}")]
    return list(before_any_change(site))


def _unsuitable(site: Site, tensor: Tensor) -> tuple[str, str] | None:
    """Why weight norm is not defined for the parameter, as a kind and a message."""
    exclude = "exclude it from the rule"
    if nn.parameter.is_lazy(tensor):
        layer = type(site.module).__name__
        return "lazy", f"is uninitialised ({layer}); run one forward pass, then apply weight norm"
    if maker := quantizer(site.node, tensor):
        advice = "apply and remove weight norm before quantization"
        return "quantized", f"is quantized by {maker}; {advice}, or {exclude}"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return "dtype", f"has dtype {tensor.dtype}, not a floating or complex one; {exclude}"
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else dtype_name(tensor.layout)
        return "dtype", f"is stored as {layout}, not as a dense tensor; {exclude}"
    if not isinstance(tensor, nn.Parameter):
        return "dtype", f"is a plain tensor; assign a Parameter first, or {exclude}"
    if tensor.numel() == 0:
        return "zero_norm", f"of shape {site.shape} has no elements and so no norm; {exclude}"
    return None


def before_norm(site: Site, norm: NormOptions, rule: Rule) -> list[WeightNormError]:
    """What is wrong with the options of the rule for the weight's dtype."""
    assert site.tensor is not None  # checked by the caller
    if wrong := _misfit(site.tensor.dtype, norm, rule.g_init):
        kind, said, advice = wrong
        return [error_at(site, kind, f"{said} for {site.name}; {advice}")]
    if rule.renormalize is None:
        return []
    wanted = wanted_norm(rule.renormalize, site.shape, norm.dim)
    problem = refused_norm(wanted, norm, site.tensor.dtype)
    return [error_at(site, "rule", f"{site.name} {problem}")] if problem else []


@functools.lru_cache
def _misfit(
    stored: torch.dtype, norm: NormOptions, g_init: float | None
) -> tuple[str, str, str] | None:
    """Why options do not suit weights of a dtype: a kind, what is wrong, and what to do."""
    working = norm.norm_dtype or stored
    for what, value, dtype in (
        ("g_init", abs(g_init or 0.0), stored),
        ("eps", norm.eps, working),
        ("eps", norm.eps, stored),  # in which a g of that size is stored
    ):
        limits = torch.finfo(dtype)
        if value > limits.max or (what == "g_init" and 0.0 < value < limits.smallest_normal):
            advice = (
                f"expected at most {limits.max:.3g}, and 0 or at least {limits.smallest_normal:.3g}"
            )
            return "rule", f"{what}={value} does not fit {dtype_name(dtype)}", advice
    least = torch.finfo(working).smallest_normal
    if 0.0 < norm.eps < least:
        said = f"eps={norm.eps} is below the smallest normal number of {working}"
        return "zero_norm", said, f"use eps >= {least:.3g} or norm_dtype=torch.float32"
    return None


def refused_norm(wanted: float, norm: NormOptions, dtype: torch.dtype) -> str:
    """Why v cannot be put back to a norm, or nothing."""
    limits = torch.finfo(dtype)
    if wanted < norm.eps:
        return (
            f"has eps={norm.eps}, which bounds ‖v‖ from below, and v would be put back to norm "
            f"{wanted:g}; give renormalize=, or a norm, of at least eps"
        )
    if not limits.smallest_normal <= wanted <= limits.max:
        return (
            f"has a v of {dtype_name(dtype)}, which norm {wanted:g} does not fit; expected "
            f"{limits.smallest_normal:.3g} to {limits.max:.3g}"
        )
    return ""


_TOGETHER = 1 << 18  # elements


@torch.no_grad()
def before_division(
    wanted: Iterable[tuple[Site, NormOptions, float | None]], *, in_parts: bool
) -> list[WeightNormError]:
    """Sites, each with its options and ``g_init``, that would be divided by an unusable norm.

    Either the DTensors, for which every rank has to ask, or the others.
    """
    problems: list[WeightNormError] = []
    groups: dict[Any, list[tuple[Site, Tensor]]] = {}
    for site, norm, g_init in wanted:
        if is_dtensor(site.tensor) is not in_parts:
            continue
        weight = site.held.weight() if isinstance(site.held, Normed) else site.tensor
        assert weight is not None  # nothing is planned for a site without a tensor
        # What is exactly a Parameter is not fake, and most are.
        if not (weight.is_meta or (type(weight) is not nn.Parameter and is_fake(weight))):
            key = (norm, g_init, weight.shape, weight.dtype, weight.device)
            groups.setdefault(key, []).append((site, weight))
    for (norm, g_init, *_), members in groups.items():
        # Models have few shapes and many layers: small weights are looked at together.
        together = max(1, _TOGETHER // max(1, members[0][1].numel()))
        axes = (0, *(axis + 1 for axis in kept_axes(norm.dim)))
        for start in range(0, len(members), together):
            chunk = members[start : start + together]
            if g_init is None and len(chunk) > 1 and not in_parts:
                stacked = torch.stack([weight for _, weight in chunk])
                if has_easy_norms(stacked, axes, norm.norm_dtype):
                    continue
            for site, weight in chunk:
                if bad := zero_slices(weight, norm.dim, norm.eps, norm.norm_dtype, g_init):
                    message = _undivided(site, weight, bad, norm, g_init)
                    problems.append(error_at(site, "zero_norm", message))
    return problems


def _undivided(
    site: Site, weight: Tensor, bad: int, norm: NormOptions, g_init: float | None
) -> str:
    g = f"g is stored in {dtype_name(weight.dtype)}" if g_init is None else f"g_init={g_init}"
    return (
        f"{site.name} has {bad} slice(s) along dim={norm.dim} whose norm is zero, not finite, or "
        f"too small or large for {dtype_name(norm.norm_dtype or weight.dtype)} ({g}); initialise "
        f"them, or give {'a larger eps' if norm.eps else 'eps > 0'} or a wider norm_dtype"
    )


def resolve_norm(site: Site, rule: Rule) -> NormOptions | WeightNormError:
    """The options that the rule gives this weight, or what is wrong with its ``dim``."""
    rank = len(site.shape)
    if rule.dim != "out" and not has_axes(rank, rule.dim):
        message = (
            f"dim={rule.dim} is out of range for {site.name} of shape {site.shape}; expected axes "
            f"from 0 to {rank - 1}, None for the whole tensor, or 'out'"
        )
        return error_at(site, "dim", message)
    dim = output_axis(site) if rule.dim == "out" else rule.dim
    if isinstance(dim, WeightNormError):
        return dim
    return _options(dim, rule.eps, rule.norm_dtype)


_options = functools.lru_cache(NormOptions)  # the same for most weights of a model

_ROWS = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def output_axis(site: Site) -> Dim | WeightNormError:
    """The axes of the output channels in this type of layer, or an error if it is not known."""
    module = site.module
    if len(site.shape) == 1 and (isinstance(module, _ConvTransposeNd) or is_conv1d(module)):
        return 0  # of a bias
    if isinstance(module, _ConvTransposeNd):
        # The weight is (in, out / groups, kernel): with one channel a group, each output
        # channel is one slice along both axes; in between, no set of axes separates them.
        if module.groups in (1, module.in_channels):
            return 1 if module.groups == 1 else (0, 1)
        message = (
            f"dim='out' has no axes for {site.name}, a transposed convolution with "
            f"groups={module.groups}; use dim=0 (torch's default) or dim=1"
        )
        return error_at(site, "dim", message)
    if isinstance(module, _ROWS):
        return 0
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_conv1d(module):
        return 1
    kind = site.node.base.__name__
    return error_at(site, "dim", f"dim='out' is not known for {kind} ({site.name}); give the axis")


def before_migration(site: Site, to: str) -> Iterator[WeightNormError]:
    """What prevents moving a weight-normed site to another layout."""
    held = site.held
    assert isinstance(held, Normed)
    norm = held.norm
    if to == "legacy" and (problems := list(before_hook(site))):
        yield from problems
        return
    if to == "legacy" and (isinstance(norm.dim, tuple) or norm.eps or norm.norm_dtype):
        message = (
            f"{site.name} has {norm}, which torch's legacy hook cannot compute; it "
            "knows a single dim, eps=0 and no norm_dtype"
        )
        yield error_at(site, "stacked", message)
    if to == "legacy" and is_dtensor(held.v):
        message = (
            f"{site.name} is a DTensor, for which torch's legacy hook has no backward; leave it "
            "parametrized, or convert the state dict with wn_surgery.checkpoints.convert"
        )
        yield error_at(site, "stacked", message)
    if held.maker not in ("torch", "wn_surgery") and not held.v.is_meta:
        with torch.no_grad():
            same = torch.equal(weight_norm(held.v, held.g, *norm), held.compute())
        if not same:
            message = (
                f"{site.name} is computed by {held.maker}, which gives other values than "
                "g · v/‖v‖; it can be removed, not migrated"
            )
            yield error_at(site, "stacked", message)


def before_hook(site: Site) -> Iterator[WeightNormError]:
    """What prevents a forward pre-hook from computing the weight."""
    if runs_no_hook(site):
        message = (
            f"{site.name} is read by attention, which never calls the module it is in, so a legacy "
            "hook would never compute it; leave it parametrized, or without weight norm"
        )
        yield error_at(site, "stacked", message)
    elif site.tensor is not None and site.tensor.is_complex():
        message = f"{site.name} is complex, which torch's legacy hook cannot compute"
        yield error_at(site, "stacked", message)


def runs_no_hook(site: Site) -> bool:
    """Whether the weight is read without a call of its module, as by ``nn.MultiheadAttention``."""
    # The type says it if the model that was given is that layer alone.
    return site.node.uncalled or isinstance(site.module, NonDynamicallyQuantizableLinear)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers whose weight is (in, out)."""
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(module).__mro__}
    return "transformers.pytorch_utils.Conv1D" in names


def quantizer(node: Node, tensor: Tensor | None) -> str | None:
    """What quantized the weight, if anything did."""
    for kind in (node.base, type(tensor)):
        home = kind.__module__
        quantized = kind is node.base and ".quantized" in home
        if quantized or home.startswith(("bitsandbytes", "torchao")):
            return f"{home}.{kind.__name__}"
    narrow = tensor is not None and tensor.is_floating_point() and tensor.element_size() == 1
    return str(tensor.dtype) if tensor is not None and (tensor.is_quantized or narrow) else None
