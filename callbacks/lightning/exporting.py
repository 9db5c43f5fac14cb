"""Exporting the model at the end of training: a file of plain weights, or a program."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import wn_surgery as wn
from wn_surgery.export import stripped_copy
from wn_surgery.model.state_keys import plain_state_dict

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["SUFFIXES", "check", "export"]

_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt")
_PROGRAMS = (".onnx", ".pt2")
SUFFIXES = (*_WEIGHTS, *_PROGRAMS)
"""What a file to export to may be called."""


def export(pl_module: LightningModule, path: Path) -> None:
    """Write the module without weight norm, atomically; the module itself is not changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        write = _write_program if path.suffix in _PROGRAMS else _write_weights
        write(pl_module, temporary)
        temporary.replace(path)


def check(pl_module: LightningModule, path: Path) -> None:
    """Raise at the start of a run for a program that cannot be exported at its end."""
    if path.suffix in _PROGRAMS and pl_module.example_input_array is None:
        raise wn.CallbackError(
            f"export_to={str(path)!r} needs an example of the input: set "
            f"self.example_input_array in {type(pl_module).__name__}, or export the weights alone "
            "(.safetensors)"
        )


def _write_weights(pl_module: LightningModule, path: Path) -> None:
    state = plain_state_dict(pl_module)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        # The format has one name for each memory; tied weights are written twice.
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    else:
        torch.save({"state_dict": state} if path.suffix == ".ckpt" else state, path)


def _write_program(pl_module: LightningModule, path: Path) -> None:
    plain = stripped_copy(pl_module).eval()
    inputs: Any = plain.example_input_array
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(plain, args), path)
    else:
        torch.onnx.export(plain, args, path, dynamo=True, external_data=False, verbose=False)
