"""torchrun starts the workers again after one was killed, and nothing shows in the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launching import launch

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("parallel")]


@pytest.mark.parametrize(
    ("framework", "checkpoint"), [("lightning", "last.ckpt"), ("accelerate", "epoch0")]
)
def test_a_killed_worker_changes_no_bit(framework: str, checkpoint: str, tmp_path: Path) -> None:
    launch("elastic_runs.py", framework, tmp_path, processes=2, restarts=1)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    # It was killed in the second epoch, and went on from the end of the first.
    assert (found["attempt"], found["checkpoint"]) == (1, checkpoint)
    restarted, undisturbed = found["restarted"], found["undisturbed"]
    assert any("original1" in key for key in restarted)
    assert restarted.keys() == undisturbed.keys()
    for key, value in restarted.items():
        assert torch.equal(value, undisturbed[key]), key
