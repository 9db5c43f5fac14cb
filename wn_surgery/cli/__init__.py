"""The command line ``wn-surgery``."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always, with the exit code; without typer and rich, with the extra to install.
    """
    try:
        from .commands import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        raise SystemExit(
            f"the command line needs {missing.name}: pip install 'wn-surgery[cli]'"
        ) from missing
    app()
