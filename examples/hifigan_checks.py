"""What examples/hifigan.py compares: checkpoints, state dicts, torch with onnxruntime."""

from __future__ import annotations

__all__ = ["NORM_OPS", "compare", "export", "run_onnx", "same"]

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

# What computes a norm in an ONNX graph.
NORM_OPS = {"ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare", "LpNormalization", "Sqrt"}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, list[str]]:
    """How many values two checkpoints hold, and where they differ by a bit."""
    # All but ModelCheckpoint's own notes, which say in which folder each run wrote.
    a, b = ({k: v for k, v in _leaves(c) if "/ModelCheckpoint" not in k} for c in (one, other))
    unlike = [k for k in a.keys() & b.keys() if not _equal(a[k], b[k])]
    return len(a), sorted([*unlike, *(a.keys() ^ b.keys())])


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{name}/{number}")
    else:
        yield name, value


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def export(generator: nn.Module, mel: Tensor, path: Path) -> Counter[str]:
    """Write an ONNX file for spectrograms of any length; count the operators in its graph."""
    with warnings.catch_warnings():
        # The exporter's own imports are full of deprecations.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            generator.eval(),
            (mel,),
            path,
            dynamo=True,
            input_names=["mel"],
            output_names=["samples"],
            dynamic_shapes={"spectrogram": {1: torch.export.Dim("frames", min=2)}},
            external_data=False,
            verbose=False,
        )
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run_onnx(path: Path, mel: Tensor) -> Tensor:
    """``(1, frames, 80)`` to ``(256 * frames,)``, by onnxruntime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (samples,) = session.run(None, {"mel": mel.numpy()})
    return torch.from_numpy(np.asarray(samples))[0]
