"""Data-dependent initialization: unit variance and zero mean after every layer, on one batch.

Salimans & Kingma 2016 (arXiv:1602.07868), section 3: with t = v · x / ‖v‖ over a batch, g becomes
1/σ[t] and b becomes -μ[t]/σ[t]. Here the current output y replaces t, which gives the same without
a second computation: g becomes g/σ[y], and b becomes (b - μ[y])/σ[y].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from wn_surgery.errors import ModelError, WeightNormError
from wn_surgery.model.sites import NormedSite, as_module, walk, whole
from wn_surgery.norm.cuts import gathered, is_dtensor, write
from wn_surgery.norm.options import dtype_name, kept_axes
from wn_surgery.rules import fields
from wn_surgery.rules.patterns import PatternSet
from wn_surgery.surgery.checks import is_conv1d, output_axis
from wn_surgery.tables import render

__all__ = ["Initialization", "initialize_from_batch", "initializing"]


@dataclass
class Initialization:
    """What was initialized; ``print`` it.

    Attributes:
        initialized: for each site, its mean and standard deviation before, over all channels.
        skipped: for each other weight-normed site, why it was left as it was.
        constant: how many output channels of a site do not vary over the batch, where there are
            such; these only lose their mean.
    """

    initialized: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    constant: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Initialization: {len(self.initialized)} initialized, {len(self.skipped)} skipped>"

    def __str__(self) -> str:
        rows = []
        for name, (mean, std) in self.initialized.items():
            note = f"{self.constant[name]} constant channels" if name in self.constant else ""
            rows.append((name, f"{mean:.4g}", f"{std:.4g}", note))
        rows += [(name, "", "", f"skipped: {why}") for name, why in self.skipped.items()]
        return render(["site", "mean before", "std before", "note"], rows)


def initialize_from_batch(
    model: nn.Module, /, *inputs: Any, names: str | Iterable[str] | None = None, **kwargs: Any
) -> Initialization:
    """Set g and the biases so that each layer's output has zero mean and unit variance.

    Calls ``model(*inputs, **kwargs)`` once, without gradients. Each weight-normed linear layer or
    convolution is set at its first call, before later layers see its output. v, buffers and random
    number generators stay as they were. In a process group, every rank calls it with its own part
    of the batch; the statistics are those of all parts, and g and biases the same on all. Where g
    is a DTensor, each rank sets its part, from the gathered output of the layer.

    Args:
        model: weight-normed, before it is compiled or exported; best in training mode.
        inputs: positional arguments of the forward: one batch.
        names: patterns (docs/rules.md) over module paths; only these layers are set. For a forward
            with an argument ``names`` of its own, use :func:`initializing`.
        kwargs: keyword arguments of the forward.

    Returns:
        What was done. Layers without a trainable bias keep their mean. Of layers that share a g or
        a bias, the first to be called is set. Where g does not have one element for each output
        channel (``dim=None``, a transposed convolution with ``dim=0``), one number scales the
        whole output.

    Raises:
        ModelError: no layer that can be initialized ran, a layer has one value for each channel
            only, its output is not finite or too small for g to be, or ``names`` could be meant
            for the forward. Nothing has changed then, nor when the forward raises.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> _ = wn.apply(model, "linears")
        >>> x = torch.randn(64, 4)
        >>> sorted(wn.initialize_from_batch(model, x).initialized)
        ['0.weight', '1.weight']
        >>> y = model(x)
        >>> torch.testing.assert_close(y.std(0, correction=0), torch.ones(2))
        >>> torch.testing.assert_close(y.mean(0), torch.zeros(2))
    """
    forwards = [node.module.forward for node in walk(model) if "" in node.paths]  # and wrapped ones
    if names is not None and any("names" in inspect.signature(f).parameters for f in forwards):
        raise _error(
            f"the forward of {type(model).__name__} has an argument names, so names={names!r} is "
            "ambiguous; pass patterns to `with wn_surgery.initializing(model, names=...):` and "
            "call the model inside, or pass the forward's names by position"
        )
    # The forward may write into a buffer, or put another one in its place.
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        try:
            with initializing(model, names=names) as result:
                model(*inputs, **kwargs)
        finally:
            for module, name, buffer, before in buffers:
                if buffer.shape == before.shape:
                    buffer.copy_(before)
                else:
                    buffer.data = before
                module._buffers[name] = buffer
    return result


@contextmanager
def initializing(
    model: nn.Module, *, names: str | Iterable[str] | None = None
) -> Generator[Initialization]:
    """Inside, each weight-normed layer is initialized by its first call, whoever makes it.

    For a first training step, which goes on with the new g and biases: a layer is set before its
    weight is used, so gradients flow as usual. :func:`initialize_from_batch` says what is set.

    Args:
        model: weight-normed.
        names: patterns over module paths; only these are set.

    Yields:
        What was done, complete on exit.

    Raises:
        ModelError: see :func:`initialize_from_batch`. Whatever is raised inside, g and biases are
            as on entry.

    Example:
        >>> import torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> _ = wn.apply(model, "linears")
        >>> with wn.initializing(model) as result:
        ...     loss = model(torch.randn(64, 4)).square().mean()
        >>> print(f"{loss:.3f}")
        1.000
    """
    modules = as_module(model).modules()
    if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl for m in modules):
        raise _error(
            f"{type(model).__name__} holds a compiled module, whose layers are not called one by "
            "one; initialize before torch.compile"
        )
    result = Initialization()
    layers = list(_layers(model, names, result))
    if not layers:
        raise _error(
            f"{type(model).__name__} has no layer that can be initialized from a batch"
            + "".join(f"\n{name}: {why}" for name, why in result.skipped.items())
            + "\napply weight norm to linear layers or convolutions first"
        )
    try:
        yield result
        unreached = [layer.site.name for layer in layers if not layer.done]
        if len(unreached) == len(layers):
            more = ", ..." if len(unreached) > 3 else ""
            raise _error(
                f"the forward called none of {', '.join(unreached[:3])}{more}; a layer is "
                "initialized when it is called"
            )
        result.skipped |= {name: "not called" for name in unreached if name not in result.skipped}
    except BaseException:
        for layer in layers:
            layer.restore()
        raise
    finally:
        for layer in layers:
            layer.handle.remove()


def _error(message: str) -> WeightNormError:
    return ModelError(message, kind="initialization")


def _layers(
    model: nn.Module, names: str | Iterable[str] | None, result: Initialization
) -> Generator[_Layer]:
    wanted = None if names is None else PatternSet.of(fields.strings("names", names))
    taken: dict[int, str] = {}
    for site in whole(model, written=True):
        if wanted is not None and not any(wanted.matches(path) for path in site.node.paths):
            result.skipped[site.name] = "not in names"
        elif why := _why_not(site):
            result.skipped[site.name] = why
        else:
            yield _Layer(site, result, taken)


def _why_not(site: NormedSite) -> str:
    held, module = site.held, site.module
    if held.layout == "legacy":
        return "legacy layout: call wn_surgery.migrate(model) first"
    if not held.g.requires_grad:
        return "its g is frozen"
    if site.param != "weight" or _channel_axis(module, 4) is None:
        return f"the output of {site.node.base.__name__} is not linear in it"
    if module._parameters.get("bias") is None and getattr(module, "bias", None) is not None:
        return "its bias is computed, by a parametrization or a hook"
    if held.g.is_meta:
        return "it is on the meta device and has no values"
    if is_dtensor(held.g):
        by = site.node.wrapped
        return f"its g is held by {by}: initialize before that" if by else ""
    if type(held.g) is not nn.Parameter:
        return f"its g is a {type(held.g).__name__}"
    return ""


def _channel_axis(module: nn.Module, ndim: int) -> int | None:
    """The axis of the output channels in an output of ``ndim`` axes."""
    if isinstance(module, _ConvNd):
        return ndim - len(module.kernel_size) - 1  # 0 without a batch axis
    last = isinstance(module, (nn.Linear, nn.Bilinear)) or is_conv1d(module)
    return ndim - 1 if last else None


class _Layer:
    """One layer that waits for its first call; ``taken`` names the owners of what is set, by id."""

    def __init__(self, site: NormedSite, result: Initialization, taken: dict[int, str]) -> None:
        self.site, self._result, self._taken = site, result, taken
        self.done = False
        bias = site.module._parameters.get("bias")
        self._held: list[Tensor] = [site.held.g]  # what is set: g, and a bias that is trained
        if bias is not None and bias.requires_grad:
            self._held.append(bias)
        self._before: list[tuple[Tensor, Tensor]] = []
        # After the existing pre-hooks, so that it sees the arguments that forward will see.
        self.handle = site.module.register_forward_pre_hook(self._first_call, with_kwargs=True)

    def _first_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.done:
            return
        before = next((self._taken[id(t)] for t in self._held if id(t) in self._taken), None)
        if before is not None:
            # What they share already fits the layer that was called first.
            self._result.skipped[self.site.name] = f"its g or bias is that of {before}"
            return
        self._taken.update((id(t), self.site.name) for t in self._held)
        with torch.no_grad():
            self._set(cast(Tensor, module.forward(*args, **kwargs)))
        self.done = True

    def _set(self, y: Tensor) -> None:
        name, (g, *biases) = self.site.name, self._held
        if is_dtensor(g) and not is_dtensor(y):
            raise _error(
                f"g of {name} is a DTensor, but its layer gives a plain tensor, of which this rank "
                "may have a part only; initialize before the model is cut"
            )
        y = gathered(y.detach())
        axis = _channel_axis(self.site.module, y.ndim)
        assert axis is not None  # or there would be no layer
        mean, variance = _moments(y, axis, name)
        total = math.sqrt(float(variance.mean()))
        std = variance.sqrt()
        # A channel that varies only by rounding has no scale to take away.
        constant = std <= 1e-7 * mean.abs()
        channels = output_axis(self.site)
        per_channel = not isinstance(channels, WeightNormError) and (
            set(kept_axes(self.site.dim)) == set(kept_axes(channels))
        )
        std = torch.where(constant, 1.0, std) if per_channel else std.new_tensor(total or 1.0)
        self._before = [(tensor, tensor.clone()) for tensor in self._held]
        scale = std.expand(g.numel()) if not per_channel else std
        write(g, gathered(g) / scale.reshape(g.shape).to(g.dtype))
        for bias in biases:
            write(bias, (gathered(bias).to(mean.dtype) - mean) / std)
        if not all(bool(gathered(tensor).isfinite().all()) for tensor in self._held):
            raise _error(
                f"the output of {name} varies by {total:.3g}, and a g or bias that makes it 1 does "
                f"not fit {dtype_name(g.dtype)}; scale the inputs"
            )
        self._result.initialized[name] = (float(mean.mean()), total)
        if count := int(constant.sum()):
            self._result.constant[name] = count

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, before in self._before:
                tensor.copy_(before)


def _moments(y: Tensor, axis: int, name: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, over the batches of all ranks."""
    # float64 where there is any: E[y²] - E[y]² is not used, but sums are long.
    wide = torch.float32 if y.device.type == "mps" else torch.float64
    flat = y.detach().to(wide).movedim(axis, -1).flatten(0, -2)
    count = torch.tensor([float(flat.shape[0])], dtype=wide, device=y.device)
    total = flat.sum(0)
    _reduce(count, total)
    if count.item() < 2:
        raise _error(
            f"{name} gives {int(count.item())} value for each output channel in this batch, which "
            "has no variance; use a larger batch"
        )
    mean = total / count
    squares = (flat - mean).square().sum(0)
    _reduce(squares)
    variance = squares / count
    if not bool(torch.isfinite(variance).all()):
        raise _error(
            f"the output of {name} is not finite on this batch; look at the inputs, or at layers "
            "before it that have no weight norm"
        )
    return mean, variance


def _reduce(*tensors: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
