"""Whether what was exported computes what the model computes, and by how much not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wn_surgery.differences import Difference, difference
from wn_surgery.errors import ExportError
from wn_surgery.export.runners import (
    Exported,
    Inputs,
    copied,
    runner,
)
from wn_surgery.model.sites import as_module
from wn_surgery.tables import render

__all__ = ["Difference", "Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """How an export differs from its model: ``print`` it.

    Attributes:
        outputs: one for each output tensor.
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

    def __str__(self) -> str:
        rows = [
            (
                each.name,
                "x".join(map(str, each.shape)) or "scalar",
                each.dtype,
                f"{each.largest:.2g}",
                f"{each.max_abs:.2g}",
                f"{each.max_ulp:g}",
                str(each.differing),
            )
            for each in self.outputs
        ]
        headers = ["output", "shape", "dtype", "largest", "max abs", "max ulp", "differing"]
        return render(headers, rows)


def verify(model: nn.Module, exported: Exported, inputs: Inputs) -> Verification:
    """Run the model and what was exported of it on the same inputs, and compare the outputs.

    Both run without grad, on copies of the inputs, and from the same state of torch's random
    numbers, which is afterwards as it was.

    Args:
        model: the model, in evaluation mode: weight-normed, or stripped. It is only run.
        exported: a ``torch.export.ExportedProgram``, a TorchScript module, an onnxruntime
            session, any other callable, or a file: ``.onnx``, ``.pt2`` (an exported program or an
            AOTInductor package), ``.pt`` or ``.ts`` (TorchScript). Loading a ``.pt2`` or
            TorchScript file may run what is in it: only load your own.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. An ONNX
            graph takes tensors by name from a dict, by position otherwise.

    Returns:
        The differences, output by output. What is large is for the caller to say.

    Raises:
        ExportError: the model is in training mode, the export takes other inputs, gives other
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
            "each run another; call model.eval() before exporting and verifying"
        )
    run = runner(exported)
    args, kwargs = _arguments(inputs)
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    outputs: list[Any] = []
    for function in (model, run):
        with torch.random.fork_rng(devices), torch.no_grad():
            outputs.append(function(*copied(args), **copied(kwargs)))
    expected, actual = (list(_tensors(output, "")) for output in outputs)
    if len(expected) != len(actual) or not expected:
        raise ExportError(
            f"{type(model).__name__} gives {len(expected)} output tensors "
            f"({', '.join(name for name, _ in expected)}) and the export {len(actual)}; expected "
            "at least one, and as many; export the model with the outputs it has"
        )
    for (name, one), (_, other) in zip(expected, actual, strict=True):
        if one.shape != other.shape:
            raise ExportError(
                f"output {name} has shape {tuple(other.shape)} in the export; expected "
                f"{tuple(one.shape)}, as the model gives for these inputs"
            )
    return Verification(
        tuple(
            difference(name, one, other)
            for (name, one), (_, other) in zip(expected, actual, strict=True)
        )
    )


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, tuple):
        return inputs, {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def _tensors(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested output, in their order; what is no tensor is left out."""
    if isinstance(output, Tensor):
        yield name or "output", output.detach().cpu()
    elif hasattr(output, "__array__"):
        yield name or "output", torch.from_numpy(output)
    else:
        for key, value in _items(output):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _items(output: Any) -> Iterator[tuple[Any, Any]]:
    # Those of transformers are both; as mappings they leave out what is None.
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, list | tuple):
        yield from enumerate(output)
    elif dataclasses.is_dataclass(output):
        for entry in dataclasses.fields(output):
            yield entry.name, getattr(output, entry.name)
