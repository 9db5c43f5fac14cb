"""The application: its help, its exit codes, and what every command has in common."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from wn_surgery.checkpoints.pairs import Axes
from wn_surgery.cli.printing import print_error, print_json
from wn_surgery.errors import CheckpointFileError, WeightNormError

__all__ = ["Dim", "Json", "Pickle", "Source", "app", "axes", "command"]

P = ParamSpec("P")

FOUND, REFUSED, SYSTEM = 1, 3, 4
# The options for the arguments of Python that errors of the library name.
_FLAGS = {
    r"orphans='keep'": "--keep-orphans",
    r"non_finite='keep'": "--keep-non-finite",
    r"in_place=True": "--in-place",
    r"full_pickle=True": "--full-pickle",
    r"pass dim=\w+(?: or \w+)*": "--dim",
    r"keep=\(\)": "--all",
}

app = typer.Typer(
    name="wn-surgery",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Weight norm in checkpoints and models: look at it, strip it, put it on.",
    epilog=(
        "Exit codes: **0** done; **1** `diff` found differences, or `doctor` errors; **2** wrong "
        "usage; **3** refused, for what is in the files or rules; **4** a file cannot be read or "
        "written, standard output among them; **70** a bug; **130** interrupted; **141** nobody "
        "reads standard output any more. Whenever it is not 0, 1 or 141, stderr says why, and no "
        "file was changed (unless only standard output was full)."
    ),
)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        typer.echo(f"wn-surgery {version('wn-surgery')}")
        raise typer.Exit


Source = Annotated[
    Path,
    typer.Argument(
        metavar="IN",
        help="A .safetensors, .pt, .pth, .ckpt or .bin file, an index of shards, or a folder.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Dim = Annotated[
    str | None,
    typer.Option(
        "--dim",
        help="The axis that keeps its norms, where the shape of g does not tell: 0, 1, ..., or "
        "none for the whole tensor.",
        show_default=False,
    ),
]
Pickle = Annotated[
    bool,
    typer.Option(
        "--full-pickle",
        help="Unpickle anything that a PyTorch file holds. A file from a stranger can then run "
        "any program on this machine.",
    ),
]


def axes(dim: str | None) -> Axes:
    """The axes that ``--dim`` names."""
    if dim is None:
        return "auto"
    if dim.lower() == "none":
        return None
    if dim.isdecimal():
        return int(dim)
    raise typer.BadParameter(f"expected the number of an axis or none, got {dim!r}")


def command(*examples: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function a command: with examples in its help, and one line for what is refused.

    Args:
        examples: what to type, without the program's name.
    """
    epilog = "Examples:\n\n" + "\n\n".join(f"`wn-surgery {example}`" for example in examples)

    def made(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except (WeightNormError, ModuleNotFoundError) as error:
                raise typer.Exit(_refused(error, bool(kwargs.get("as_json")))) from error

        app.command(epilog=epilog)(run)
        return function

    return made


def _refused(error: Exception, as_json: bool) -> int:
    text = " ".join(str(error).split())
    for argument, flag in _FLAGS.items():
        text = re.sub(argument, rf"\g<0> ({flag})", text)
    if isinstance(error, ModuleNotFoundError):
        text = f"this needs {error.name}: pip install 'wn-surgery[transformers]'"
    print_error(text)
    if as_json:
        said: dict[str, Any] = {"type": type(error).__name__, "message": text}
        print_json({"error": said})
    return SYSTEM if isinstance(error, CheckpointFileError) else REFUSED
