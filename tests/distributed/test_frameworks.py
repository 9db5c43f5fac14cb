"""Models that transformers and Lightning cut, on two processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("framework_runs.py")
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("parallel")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("frameworks")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(SCRIPT), str(folder / "found.pt"), str(folder)],
        env={
            **{key: value for key, value in os.environ.items() if "RANK" not in key},
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize(("name", "changed"), [("llama", 9), ("mixtral", 7)])
def test_models_of_transformers_that_it_has_cut(found: Any, name: str, changed: int) -> None:
    results = found[name]
    assert results["changed"] == changed and results["cut"] >= 6
    for case in ("logits", "trained", "logits after", "folded", "removed", "logits plain"):
        assert results[case] <= 1e-5, case
    assert results["generated alike"]
    there, left = results["hooks"]
    assert there > left == 0


@pytest.mark.parametrize("who", [0, 1], ids=["configure_model", "callback"])
def test_a_lightning_module_that_cuts_its_layers(found: Any, who: int) -> None:
    results = found["lightning"][who]
    assert results["cut"]
    assert results["trained"] <= 1e-5
    assert results["steps"] == list(range(1, 21))
