"""The Trainer of transformers on two processes over gloo, by accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import wn_surgery as wn

SCRIPT = Path(__file__).with_name("trainer_run.py")
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("transformers ddp")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trainer")
    env = {
        **{key: value for key, value in os.environ.items() if "RANK" not in key},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    commands = {2: [*launch, str(SCRIPT)], 1: [str(SCRIPT)]}
    for count, command in commands.items():
        done = subprocess.run(
            [sys.executable, *command, str(made), str(count)],
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return made


@pytest.mark.parametrize(
    ("case", "tolerance"), [("usual", 1e-4), ("accumulated", 1e-4), ("bf16", 2e-2)]
)
def test_two_processes_get_what_one_gets(folder: Path, case: str, tolerance: float) -> None:
    one, two = (torch.load(folder / f"{count}.pt", weights_only=True)[case] for count in (1, 2))
    assert list(one) == list(two)
    assert any("parametrizations" in key for key in one)
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=tolerance, msg=key)


def test_a_plain_copy_is_exported_by_the_first(folder: Path) -> None:
    model: Any = hf.LlamaForCausalLM.from_pretrained(folder / "plain")
    assert not any(site.normed for site in wn.sites(model))
