"""Run the tests that start processes again and again, beside processes that leave them no time.

``python tests/project/flaky.py 20``: twenty rounds. The exit code says whether one of them failed.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# They end with the process that started them, however it ends.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"


@contextlib.contextmanager
def busy(count: int) -> Generator[None]:
    """Processes that compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(rounds: int, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "processes", *arguments]
    failed = 0
    with busy(2):
        for number in range(1, rounds + 1):
            code = subprocess.run(command, cwd=ROOT, check=False).returncode
            failed += code != 0
            print(f"round {number} of {rounds}: {'failed' if code else 'passed'}", flush=True)
    print(f"{rounds} rounds, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
