"""Starts a script of this folder in processes of its own, and ends one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(
    script: str, *arguments: object, processes: int | None = None, restarts: int = 0
) -> None:
    """Run a script, on several ranks if ``processes`` says so; its last words if it fails."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    ranks.append(f"--max-restarts={restarts}")
    done = subprocess.run(
        [sys.executable, *(ranks if processes else ()), HERE / script, *map(str, arguments)],
        # No rank of a launcher above, and no CUDA where there is one.
        env={
            **{key: value for key, value in os.environ.items() if "RANK" not in key},
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # Or a second attempt shares the store of the first, and may read where its dead workers
            # listened.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def leave() -> NoReturn:
    """End this process now that its work is done, without taking Python down.

    DTensor's caches hold the process group, so ``destroy_process_group`` does not end its threads
    (tests/torch_facts/test_distributed.py). One of them that lets go of a tensor while Python takes
    itself down would abort the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
