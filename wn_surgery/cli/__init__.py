"""The command line ``wn-surgery``.

In: a command line.
Out: files, text or JSON, and an exit code.
Imports: errors, rules, checkpoints, reporting, huggingface.
"""

from __future__ import annotations

import traceback

__all__ = ["main"]

BUG = 70
"""EX_SOFTWARE of sysexits.h."""


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always, with the exit code; without typer and rich, with the extra to install.
    """
    try:
        from wn_surgery.cli.commands import app
        from wn_surgery.cli.printing import UndeliveredError, delivering
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        raise SystemExit(
            f"the command line needs {missing.name}: pip install 'wn-surgery[cli]'"
        ) from missing
    try:
        with delivering():
            app(prog_name="wn-surgery")
    except UndeliveredError as error:
        raise SystemExit(error.code) from error
    except Exception:  # noqa: BLE001 - shown, and the exit code tells
        # Python's own exit code would be 1, which means that a check has found something.
        traceback.print_exc()
        raise SystemExit(BUG) from None
