"""The Triton kernels in Triton's interpreter, which needs no GPU.

The interpreter has to be chosen before triton is first imported, and torch.compile imports it
too. So these tests run in a process of their own: with ``TRITON_INTERPRET=1`` this file holds
the tests of triton_cases.py, and without it one test, which runs this file again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.fused.models import spec_of
from tests.torch_facts.versions import OLD_TRITON
from wn_surgery.fused.triton.evaluator import why_not
from wn_surgery.fused.triton.tables import Work

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]

# numpy computes what the kernels mask, too.
pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:(invalid|divide|overflow).*:RuntimeWarning"),
]

if INTERPRETED:
    pytest.register_assert_rewrite("triton_tools", "triton_cases")
    from tests.fused.triton_cases import *  # noqa: F403

    @pytest.fixture
    def device() -> torch.device:
        return torch.device("cpu")

else:

    @pytest.mark.skipif(find_spec("triton") is None or OLD_TRITON, reason="no triton 3.7")
    def test_in_the_interpreter() -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            cwd=ROOT,
            env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        print(run.stdout, run.stderr)
        assert run.returncode == 0, run.stdout[-5000:]
        assert " passed" in run.stdout and "skipped" not in run.stdout

    def test_nothing_imports_triton_before_it_is_used() -> None:
        code = (
            "import sys, wn_surgery.fused.triton.evaluator, wn_surgery.fused.triton.tables\n"
            "assert 'triton' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=900)

    def test_the_work_of_a_group() -> None:
        work = Work([spec_of((4, 6)), spec_of((50, 2), dim=1)])
        assert (work.rows, work.finish) == ([(0, 0, 32)], [(1, 0)])
        assert work.split == [(1, 0, 0), (1, 1, 0)]
        assert (work.weights_size, work.norms_size, work.parts_size) == (192, 128, 4)

    @pytest.mark.skipif(OLD_TRITON, reason="it is too old, which comes first")
    def test_why_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
        spec, cpu, cuda = spec_of((4, 3)), torch.device("cpu"), torch.device("cuda", 0)

        def blocked(name: str) -> None:
            raise ModuleNotFoundError(name)

        for missing in (lambda name: None, blocked):
            monkeypatch.setattr("importlib.util.find_spec", missing)
            assert why_not(cuda, torch.float32, spec) == (
                "triton is not installed; pip install 'wn-surgery[triton]'"
            )
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        assert why_not(cpu, torch.float32, spec) == "Triton has no kernels for the CPU"
        other = why_not(torch.device("meta"), torch.float32, spec)
        assert other == "the Triton kernels are for NVIDIA's devices"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert why_not(cuda, torch.float32, spec) == "no CUDA device"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert why_not(cuda, torch.float16, spec) is None
        assert why_not(cuda, torch.bfloat16, spec) == (
            "bfloat16 needs compute capability 8.0; Some GPU has 7.5"
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
        assert "7.0" in (why_not(cuda, torch.float32, spec) or "")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert why_not(cpu, torch.float32, spec) is None
        assert "interpreter works on the CPU only" in (why_not(cuda, torch.float32, spec) or "")
