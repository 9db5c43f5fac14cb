"""What there is to see of a model or an optimizer, as one flat mapping that can be compared.

With ``identity`` two fingerprints are equal only if nothing has happened in between: the same
objects, the same bytes, no in-place write. Without it they compare two models of one kind: a
copy, or what surgery gave back. Objects are then numbered in the order they are met, so what is
shared must still be shared.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from wn_surgery.norm.module_class import beneath, is_managed

__all__ = [
    "Fingerprint",
    "assert_same",
    "difference",
    "effective",
    "of_model",
    "of_optimizer",
    "outputs",
]

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_OWN = ("_parameters", "_buffers", "_modules")


class Fingerprint(dict[str, Any]):
    """Facts by name. It keeps what it has seen alive, so that no id is used twice."""

    def __init__(self, identity: bool) -> None:
        super().__init__()
        self.identity = identity
        self._alive: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, key: Any, thing: Any) -> int:
        """Which object it is: its id, or the how-manieth it is."""
        self._alive.append(thing)
        return id(thing) if self.identity else self._numbers.setdefault(key, len(self._numbers))

    def describe(self, value: Any, depth: int = 0) -> Any:
        """A value of an attribute, as something with a meaningful ``==``."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor):
            return (self.number(id(value), value) if self.identity else "tensor", data_of(value))
        if isinstance(value, type):
            return value
        if isinstance(value, nn.Module):
            return ("module", type(value), id(value) if self.identity else None)
        mark = self.number(id(value), value) if self.identity else None
        if isinstance(value, Mapping):
            items = [(_key(k), self.describe(v, depth + 1)) for k, v in value.items()]
            return (type(value).__name__, mark, items)
        if isinstance(value, list | tuple):
            return (type(value).__name__, mark, [self.describe(v, depth + 1) for v in value])
        if isinstance(value, set | frozenset):
            return (type(value).__name__, mark, sorted(map(repr, value)))
        if isinstance(value, weakref.ref):
            return ("weakref", id(value()) if self.identity else None)
        if depth < 3 and hasattr(value, "__dict__") and not callable(value):
            return (type(value), mark, self.describe(vars(value), depth + 1))
        return (getattr(value, "__qualname__", type(value).__qualname__), mark)

    def hooks(self, hooks: Mapping[int, Any]) -> Any:
        """Hooks in their order, with what each of them holds."""
        found = []
        for key, wrapped in hooks.items():
            # torch's wrapper of a load hook forgets, when copied, what it took from the hook.
            hook = getattr(wrapped, "hook", wrapped)
            held = vars(hook) if hasattr(hook, "__dict__") else {}
            found.append(
                (
                    (key, id(wrapped)) if self.identity else "hook",
                    self.describe(hook),
                    [(name, self.describe(value)) for name, value in held.items()],
                )
            )
        return found

    def parameter(self, where: str, tensor: Tensor | None, own_memory: bool) -> None:
        """A parameter or a buffer: what it is, and apart from that its bytes."""
        if tensor is None:
            self[f"{where}: tensor"] = None
            return
        # Ties by memory count as ties; a v that lies in some other weight's memory is no tie.
        by_memory = own_memory and tensor.numel() > 0 and not self.identity
        key: Any = id(tensor)
        if by_memory:
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        self[f"{where}: which"] = self.number(key, tensor)
        self[f"{where}: tensor"] = (
            type(tensor),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.requires_grad,
            tensor.is_leaf,
            self.describe(vars(tensor)),
        )
        if self.identity:
            grad = tensor.grad if tensor.is_leaf else None
            self._alive.append(grad)
            self[f"{where}: written"] = (tensor._version, tensor.data_ptr(), id(grad))
        self[f"{where}: data"] = data_of(tensor)


def of_model(model: nn.Module, *, identity: bool = False) -> Fingerprint:
    """Everything in the module tree, by path; a shared module counts under each of its paths."""
    found = Fingerprint(identity)
    _visit(found, model, "", {})
    found["state_dict: keys"] = list(model.state_dict())
    found["state_dict: metadata"] = dict(getattr(model.state_dict(), "_metadata", {}))
    found["named_parameters: order"] = [name for name, _ in model.named_parameters()]
    return found


def _visit(found: Fingerprint, module: nn.Module, path: str, seen: dict[int, str]) -> None:
    where = path or "(root)"
    if id(module) in seen:
        found[f"{where}: same module as"] = seen[id(module)]
        return
    seen[id(module)] = where
    attributes = module.__dict__
    # The class itself, and what it holds: torch's functions add and delete properties of it.
    cls: Any = type(module)
    held = frozenset(vars(cls))
    # A copy of what torch parametrized on top of ours has a class of ours for all of it.
    if is_managed(cls) and not found.identity:
        cls = (beneath(cls), cls.__name__)
    found[f"{where}: class"] = (cls, held)
    found[f"{where}: object"] = found.number(id(module), module)
    found[f"{where}: attributes"] = list(attributes) if found.identity else sorted(attributes)
    for container in _OWN:
        content = attributes[container]
        mark = id(content) if found.identity else None
        found[f"{where}: {container}"] = (type(content), mark, list(content))
    for key, value in attributes.items():
        if "_hooks" in key and isinstance(value, dict):
            found[f"{where}: {key}"] = found.hooks(value)
        elif key not in _OWN:
            found[f"{where}: .{key}"] = found.describe(value)
    legacy = {name[:-2] for name in attributes["_parameters"] if name.endswith("_v")}
    for name, parameter in attributes["_parameters"].items():
        part = name.startswith("original") or (name[-2:] in ("_g", "_v") and name[:-2] in legacy)
        found.parameter(f"{where}: {name}", parameter, own_memory=not part)
    for name, buffer in attributes["_buffers"].items():
        found.parameter(f"{where}: {name}", buffer, own_memory=False)
    for name, child in attributes["_modules"].items():
        if child is not None:
            _visit(found, child, f"{path}.{name}" if path else name, seen)


def of_optimizer(optimizer: torch.optim.Optimizer) -> Fingerprint:
    """Groups, state, and the rest of the object; always by identity."""
    found = Fingerprint(identity=True)
    for number, group in enumerate(optimizer.param_groups):
        found[f"group {number}"] = (id(group), found.describe(group))
    for parameter, state in optimizer.state.items():
        found[f"state of {found.number(0, parameter)}"] = (id(state), found.describe(state))
    found["state: order"] = [id(parameter) for parameter in optimizer.state]
    for key, value in vars(optimizer).items():
        if key not in ("param_groups", "state"):
            found[f".{key}"] = found.describe(value)
    found["containers"] = (id(optimizer.param_groups), id(optimizer.state))
    return found


def assert_same(
    before: Mapping[str, Any], after: Mapping[str, Any], *, skip: Collection[str] = ()
) -> None:
    """Raise an AssertionError with each fact that is not the same."""
    found = difference(before, after, skip)
    if found:
        raise AssertionError(f"not the same as before:\n{found}")


def difference(
    before: Mapping[str, Any], after: Mapping[str, Any], skip: Collection[str] = ()
) -> str:
    """Each fact that is not the same, on a line of its own; empty if all are."""
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key in skip:
            continue
        old, new = before.get(key, "(absent)"), after.get(key, "(absent)")
        if old != new:
            lines.append(f"{key}:\n    before {_short(old)}\n    after  {_short(new)}")
    return "\n".join(lines)


def effective(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """The weights as the layers would use them, by name, whatever their layout."""
    from wn_surgery.model.sites import sites_of, walk

    found = {}
    with torch.no_grad():
        for site in (site for node in walk(model) for site in sites_of(node)):
            if site.held is None:
                weight = getattr(site.module, site.param)
            elif site.normed:
                weight = site.held.compute()
            else:
                continue  # spectral norm in training changes at each look
            found[site.name] = (weight.dtype, data_of(weight))
    return found


def outputs(model: nn.Module) -> dict[str, bytes]:
    """What each layer of the tree gives for a fixed input, bit for bit."""
    found: dict[str, bytes] = {}
    training = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    # It is taken or not by whether there are hooks, so the layout would show in the last bits.
    torch.backends.mha.set_fastpath_enabled(False)
    # Spectral norm takes a step at each forward in training.
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            for path, module in model.named_modules():
                if (inputs := _inputs(module)) is not None:
                    output = module(*inputs)
                    found[path] = data_of(output[0] if isinstance(output, tuple) else output)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training:
            module.training = mode
    return found


def _inputs(module: nn.Module) -> tuple[Tensor, ...] | None:
    held = list(module.parameters())
    # A weight that is channels_last chooses another kernel than a legacy one, which is not.
    if not all(parameter.is_contiguous() for parameter in held):
        return None
    dtypes = sorted((p.dtype for p in held if p.dtype != torch.int64), key=lambda d: d.is_complex)
    dtype = dtypes[-1] if dtypes else torch.float32
    size = _size(module)
    if isinstance(module, nn.Embedding):
        return (torch.arange(module.num_embeddings),)
    if size is None:
        return None
    x = torch.linspace(-1, 1, torch.Size(size).numel()).reshape(size).to(dtype)
    if isinstance(module, nn.MultiheadAttention):
        return x, x[..., : module.kdim], x[..., : module.vdim]
    return (x, x) if isinstance(module, nn.Bilinear) else (x,)


def _size(module: Any) -> tuple[int, ...] | None:
    if isinstance(module, _ConvNd):
        return (1, module.in_channels, *(4 for _ in module.kernel_size))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return (
            (2, 1, module.input_size) if isinstance(module, nn.RNNBase) else (2, module.input_size)
        )
    if isinstance(module, nn.MultiheadAttention):
        return (2, 1, module.embed_dim)
    if isinstance(module, nn.TransformerEncoderLayer):
        return (2, 1, module.linear1.in_features)
    if isinstance(module, nn.LayerNorm):
        return (2, *module.normalized_shape)
    for name in ("in_features", "in1_features", "nx", "inputs"):
        if isinstance(getattr(module, name, None), int):
            return (2, getattr(module, name))
    return None


def data_of(tensor: Tensor) -> bytes:
    """The elements in their logical order, bit for bit."""
    with torch.no_grad():
        flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()


def _key(key: Any) -> Any:
    return ("tensor", id(key)) if isinstance(key, Tensor) else key


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 600 else f"{text[:600]}… ({len(text)} characters)"
