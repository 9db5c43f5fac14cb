"""What torch does with a process group at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.torch_facts.versions import newer_torch

pytestmark = [
    newer_torch,
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc"),
]

SCRIPT = """
import gc, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard

def threads():
    names = (task / "comm" for task in Path("/proc/self/task").iterdir())
    return sum("gloo" in name.read_text() for name in names)

def run():
    model = torch.nn.Linear(2, 2)
    if sys.argv[2] == "sharded":
        fully_shard(model)
    else:
        dist.all_reduce(torch.ones(1))

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
run()
during = threads()
dist.destroy_process_group()
gc.collect()
# A thread that has been joined may be listed for a moment longer.
while sys.argv[2] == "plain" and threads():
    time.sleep(0.01)
print(during, threads(), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_a_group_that_dtensor_has_seen_outlives_its_destruction(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    during, after = map(int, done.stdout.split())
    assert during > 0
    assert after == (during if kind == "sharded" else 0)
