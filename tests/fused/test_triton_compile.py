"""The Triton kernels, compiled ahead of time: that they compile, do not spill, and move 16 bytes.

No GPU is needed. What is compiled is what the evaluator launches for a group of every kind.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fused.models import spec_of
from tests.torch_facts.versions import OLD_TRITON
from wn_surgery.norm.math import g_shape

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton not installed"),
    pytest.mark.skipif(OLD_TRITON, reason="older than the kernels need"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
POINTERS = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    F32: "*fp32",
    BF16: "*bf16",
    F16: "*fp16",
}
FORWARD = {"rows_forward", "split_sums", "finish_forward", "split_forward"}
BACKWARD = {"rows_backward", "split_sums", "finish_backward", "split_backward"}
# Two programs of 8 warps to a multiprocessor, which has 65,536 registers.
REGISTERS = 128

Launch = tuple[Any, tuple[Tensor, ...], dict[str, Any]]


def launches_of(dtype: torch.dtype, out: torch.dtype, patch: pytest.MonkeyPatch) -> list[Launch]:
    """What the evaluator launches, forward and backward, without launching it."""
    from wn_surgery.fused.triton import evaluator as module

    found: list[Launch] = []

    def record(self: Any, kernel: Any, items: Any, *args: Any, **constants: Any) -> None:
        found.append((kernel, args, constants))

    patch.setattr(module, "why_not", lambda device, dtype, spec: None)
    patch.setattr(module.TritonEvaluator, "_launch", record)
    specs = [spec_of((4, 3), 0), spec_of((40, 8), 1)]
    v = [torch.ones(spec.shape, dtype=dtype) for spec in specs]
    g = [torch.ones(g_shape(spec.shape, spec.norm.dim), dtype=dtype) for spec in specs]
    evaluator = module.TritonEvaluator(specs, dtype, torch.device("cpu"))
    _, norms = evaluator.forward(v, g, out)
    assert {kernel.__name__ for kernel, *_ in found} == FORWARD
    evaluator.backward(v, g, norms, [x.to(out) for x in v])
    assert {kernel.__name__ for kernel, *_ in found} == FORWARD | BACKWARD and len(found) == 8
    return found


def compiled(launch: Launch, capability: int) -> Any:
    """The binary that a GPU of this capability would run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wn_surgery.fused.triton.kernels import WARPS

    kernel, args, constants = launch
    names = list(kernel.arg_names)
    assert set(names[len(args) :]) == set(constants)
    signature = {name: POINTERS[t.dtype] for name, t in zip(names, args, strict=False)}
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # What Triton finds out about tensors of their own at the launch.
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(args))},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": WARPS})


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, by NVIDIA's own tool."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.parametrize(
    ("capability", "dtype", "out"),
    [(80, F32, F32), (80, F16, F16), (90, F32, BF16), (90, BF16, BF16), (100, F32, F32)],
    ids=str,
)
def test_every_kernel_compiles_without_spills(
    capability: int,
    dtype: torch.dtype,
    out: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in launches_of(dtype, out, monkeypatch):
        name = launch[0].__name__
        binary = compiled(launch, capability)
        used = resources(binary.asm["cubin"], tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= REGISTERS, (name, used)
        ptx = binary.asm["ptx"]
        if not name.startswith("finish"):
            assert re.search(r"ld\.global[.\w]*\.v4\.b32", ptx), name
        if name in ("rows_forward", "split_forward", "rows_backward", "split_backward"):
            assert re.search(r"st\.global[.\w]*\.v4\.b32", ptx), name
        # Rounded to the nearest, which the interpreter does not show.
        assert not re.search(r"cvt\.r[zmp][.\w]*\.f32", ptx), name
        if "forward" in name and BF16 in {t.dtype for t in launch[1]}:
            assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx), name
        # Atomics would make sums depend on who comes first.
        assert not re.search(r"\b(atom|red)\.", ptx), name


def test_the_hint_of_alignment_is_what_makes_accesses_wide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, args, constants in launches_of(F32, F32, monkeypatch):
        if kernel.__name__ == "split_forward":
            binary = compiled((kernel, args, constants | {"vector": 1}), 80)
            assert not re.search(r"\.v4\.b32", binary.asm["ptx"])
            return
    pytest.fail("split_forward was not launched")
