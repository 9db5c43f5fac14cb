"""Whether what was exported computes what the model computes, and how much they differ."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from wn_surgery.differences import Difference, difference
from wn_surgery.errors import ExportError
from wn_surgery.model.sites import as_module
from wn_surgery.tables import render

__all__ = ["Difference", "Verification", "verify"]


class Session(Protocol):
    """The part of an onnxruntime ``InferenceSession`` that is used here."""

    def get_inputs(self) -> list[Any]: ...

    def run(self, output_names: None, input_feed: dict[str, Any], /) -> list[Any]: ...


Exported: TypeAlias = (
    str | PathLike[str] | torch.export.ExportedProgram | Session | Callable[..., Any]
)
"""What can be run: a file, an exported program, an onnxruntime session, a callable."""

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor, positional arguments, or keyword arguments."""


@dataclass(frozen=True)
class Verification:
    """How an export differs from its model: ``print`` it.

    Attributes:
        outputs: one difference for each output tensor.
    """

    outputs: tuple[Difference, ...] = field(repr=False)

    @property
    def max_abs(self) -> float:
        """The largest absolute difference in any output."""
        return max(each.max_abs for each in self.outputs)

    @property
    def max_ulp(self) -> float:
        """The largest difference in units in the last place, in any output."""
        return max(each.max_ulp for each in self.outputs)

    @property
    def exact(self) -> bool:
        """Whether every element of every output is equal."""
        return all(each.differing == 0 for each in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """The differences as plain data."""
        return {
            "exact": self.exact,
            "max_abs": self.max_abs,
            "max_ulp": self.max_ulp,
            "outputs": [each.to_dict() for each in self.outputs],
        }

    def __repr__(self) -> str:
        said = "exact" if self.exact else f"max_abs={self.max_abs:.2g} max_ulp={self.max_ulp:g}"
        return f"<Verification of {len(self.outputs)} outputs: {said}>"

    def __str__(self) -> str:
        rows = []
        for each in self.outputs:
            shape = "x".join(map(str, each.shape)) or "scalar"
            sizes = f"{each.largest:.2g}", f"{each.max_abs:.2g}", f"{each.max_ulp:g}"
            rows.append((each.name, shape, each.dtype, *sizes, str(each.differing)))
        headers = ["output", "shape", "dtype", "largest", "max abs", "max ulp", "differing"]
        return render(headers, rows)


def verify(model: nn.Module, exported: Exported, inputs: Inputs) -> Verification:
    """How the outputs of an export differ from the model's, on the same inputs.

    Both run without grad, on copies of the inputs, and from the same state of torch's random
    numbers, which is restored.

    Args:
        model: the model, in evaluation mode: weight-normed, or stripped. It is only run.
        exported: a ``torch.export.ExportedProgram``, an onnxruntime session, any callable, such
            as a TorchScript module, or a file: ``.onnx``, ``.pt2`` (an exported program or an
            AOTInductor package), ``.pt`` or ``.ts`` (TorchScript). Loading a file that is not
            ``.onnx`` may run code in it: only load your own.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. An ONNX
            graph takes tensors by name from a dict, by position otherwise.

    Returns:
        The differences, output by output. You decide which are too large.

    Raises:
        ExportError: the model is in training mode, or the export takes other inputs, gives other
            outputs, or is of an unknown kind.
        ModuleNotFoundError: onnxruntime is needed and is not installed.

    Example:
        >>> import torch
        >>> from wn_surgery.export import verify
        >>> model = torch.nn.Linear(4, 2).eval()
        >>> x = torch.ones(3, 4)
        >>> print(verify(model, torch.export.export(model, (x,)), x))
        output  shape  dtype    largest  max abs  max ulp  differing
        ------  -----  -------  -------  -------  -------  ---------
        output  3x2    float32  ...      0        0        0
    """
    if as_module(model).training:
        raise ExportError(
            f"{type(model).__name__} is in training mode, where dropout and batch statistics make "
            "every run differ; call model.eval() before exporting and verifying"
        )
    run = _runner(exported)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    outputs: list[Any] = []
    for function in (model, run):
        with torch.random.fork_rng(devices), torch.no_grad():
            outputs.append(function(*_copied(args), **_copied(kwargs)))
    expected, actual = (list(_tensors(output, "")) for output in outputs)
    if len(expected) != len(actual) or not expected:
        raise ExportError(
            f"{type(model).__name__} gives {len(expected)} output tensors "
            f"({', '.join(name for name, _ in expected)}) and the export {len(actual)}; expected "
            "the same number, at least one; export the model with all its outputs"
        )
    found = []
    for (name, one), (_, other) in zip(expected, actual, strict=True):
        if one.shape != other.shape:
            raise ExportError(
                f"output {name} has shape {tuple(other.shape)} in the export; expected "
                f"{tuple(one.shape)}, as the model gives for these inputs"
            )
        found.append(difference(name, one, other))
    return Verification(tuple(found))


def _tensors(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested output, in order; other values are left out."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Tensor):
        yield name or "output", output.detach().cpu()
    elif hasattr(output, "__array__"):
        yield name or "output", torch.from_numpy(output)
    # Outputs of transformers are mappings and dataclasses; as mappings they leave out None.
    elif isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    elif dataclasses.is_dataclass(output):
        items = [(each.name, getattr(output, each.name)) for each in dataclasses.fields(output)]
    for key, value in items:
        yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _runner(exported: Exported) -> Callable[..., Any]:
    """What was exported, as a function of the model's inputs."""
    if isinstance(exported, str | PathLike):
        return _from_file(Path(exported))
    if isinstance(exported, torch.export.ExportedProgram):
        return cast("Callable[..., Any]", exported.module())
    if hasattr(exported, "get_inputs") and hasattr(exported, "run"):
        return _calling(cast(Session, exported))
    if callable(exported):
        return exported
    raise ExportError(
        f"cannot run a {type(exported).__name__}; expected a file, an ExportedProgram, an "
        "onnxruntime session, or a callable"
    )


def _from_file(path: Path) -> Callable[..., Any]:
    if not path.is_file():
        raise ExportError(f"{path} is not a file; expected what was exported")
    if path.suffix == ".onnx":
        return _calling(_open(path))
    if path.suffix == ".pt2":
        if not zipfile.is_zipfile(path):
            raise ExportError(
                f"{path} is not a .pt2 archive; expected one that torch.export or AOTInductor wrote"
            )
        with zipfile.ZipFile(path) as archive:
            compiled = any("/aotinductor/" in name for name in archive.namelist())
        if compiled:
            from torch._inductor import aoti_load_package

            return cast("Callable[..., Any]", aoti_load_package(str(path)))
        return cast("Callable[..., Any]", torch.export.load(path).module())
    if path.suffix in (".pt", ".ts"):
        return cast("Callable[..., Any]", torch.jit.load(path))  # type: ignore[no-untyped-call]
    raise ExportError(
        f"{path.name}: expected .onnx, .pt2, or for TorchScript .pt or .ts; load it and give "
        "verify() a callable instead"
    )


def _open(path: Path) -> Session:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"running {path.name} needs onnxruntime; pip install 'wn-surgery[export]'"
        ) from error
    return cast(Session, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))


def _calling(session: Session) -> Callable[..., list[Any]]:
    """An onnxruntime session as a function, called like the model."""
    names = [each.name for each in session.get_inputs()]

    def call(*args: Any, **kwargs: Any) -> list[Any]:
        tensors = list(_flat(args))
        feed = dict(zip(names, tensors, strict=False))
        feed |= {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        given = len(tensors) + len(kwargs)
        if set(feed) != set(names) or given > len(names):
            named = f", named {list(kwargs)}" if kwargs else ""
            raise ExportError(
                f"the ONNX graph takes {len(names)} inputs ({', '.join(names)}); got "
                f"{given}{named}; give it what the model takes"
            )
        return session.run(None, {name: _array(name, tensor) for name, tensor in feed.items()})

    return call


def _array(name: str, tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise ExportError(
            f"input {name} is bfloat16, which numpy and so onnxruntime's run() cannot take; export "
            "with inputs in float32 or float16"
        )
    return tensor.detach().cpu().numpy()


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)


def _copied(value: Any) -> Any:
    """The value with its tensors cloned, since a run may write into its inputs."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
