"""The application: its help, its exit codes, and what every command has in common."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from wn_surgery import __version__
from wn_surgery.cli.printing import print_error, print_json
from wn_surgery.errors import CheckpointFileError, WeightNormError

if TYPE_CHECKING:
    from wn_surgery.checkpoints.pairs import Axes

__all__ = ["FullPickle", "Json", "Reading", "Source", "Verify", "Writing", "app", "command"]

FOUND, REFUSED, SYSTEM = 1, 3, 4

app = typer.Typer(
    name="wn-surgery",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Weight norm in checkpoints and models: inspect it, strip it, apply it.",
    epilog=(
        "Exit codes: **0** done; **1** `diff` found differences, or `doctor` errors; **2** wrong "
        "usage; **3** refused, because of what is in the files or rules; **4** a file or standard "
        "output cannot be read or written; **70** a bug; **130** interrupted; **141** nobody reads "
        "standard output any more. Unless the code is 0, 1 or 141, stderr says why, and no file "
        "was changed (unless only standard output was full)."
    ),
)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        typer.echo(f"wn-surgery {__version__}")
        raise typer.Exit


def _flag(name: str, text: str) -> Any:
    return typer.Option(name, help=text)


Source = Annotated[
    Path,
    typer.Argument(
        metavar="IN",
        help="A .safetensors, .pt, .pth, .ckpt or .bin file, an index of shards, or a folder (of "
        "transformers, or of torch.distributed.checkpoint).",
        show_default=False,
    ),
]
Json = Annotated[bool, _flag("--json", "Print one JSON object on stdout.")]
FullPickle = Annotated[
    bool,
    _flag(
        "--full-pickle",
        "Unpickle everything in a PyTorch file. A file from a stranger can then run any program "
        "on this machine.",
    ),
]
Verify = Annotated[
    bool, _flag("--verify", "Read the output back and compare it before it gets its name.")
]


@dataclass(frozen=True)
class Reading:
    """The options of every command that reads weight-normed checkpoints."""

    dim: Annotated[
        str | None,
        typer.Option(
            help="The axis that keeps its norms, if the shape of g does not determine it: 0, 1, "
            "..., or none for the whole tensor.",
            show_default=False,
        ),
    ] = None
    full_pickle: FullPickle = False
    as_json: Json = False

    def arguments(self) -> dict[str, Any]:
        """The arguments of the library's function."""
        return {"dim": self._axes(), "full_pickle": self.full_pickle}

    def _axes(self) -> Axes:
        if self.dim is None:
            return "auto"
        if self.dim.lower() == "none":
            return None
        if self.dim.isdecimal():
            return int(self.dim)
        raise typer.BadParameter(f"expected the number of an axis or none, got {self.dim!r}")


@dataclass(frozen=True)
class Writing(Reading):
    """The options of every command that writes what it has read in another layout."""

    keep_orphans: Annotated[
        bool, _flag("--keep-orphans", "Copy a g without its v, and a v without its g.")
    ] = False
    keep_non_finite: Annotated[
        bool, _flag("--keep-non-finite", "Write weights that hold NaN or infinities.")
    ] = False
    in_place: Annotated[
        bool, _flag("--in-place", "OUT may be IN, which is then replaced by a rename.")
    ] = False
    verify: Verify = False
    dry_run: Annotated[
        bool,
        _flag(
            "--dry-run",
            "Write nothing: say, from names and shapes alone, what would be read, written and held "
            "in memory.",
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        """The arguments of the library's function."""
        return super().arguments() | {
            "dry_run": self.dry_run,
            "orphans": "keep" if self.keep_orphans else "error",
            "non_finite": "keep" if self.keep_non_finite else "error",
            "in_place": self.in_place,
            "verify": self.verify,
        }


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command, with examples in its help and one line for each refusal.

    A parameter that is a dataclass, such as :class:`Reading`, stands for an option per field.
    """
    epilog = "Examples:\n\n" + "\n\n".join(f"`wn-surgery {example}`" for example in examples)

    def made(function: Callable[..., None]) -> Callable[..., None]:
        options = []
        groups: dict[str, Any] = {}
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in inspect.signature(function).parameters.items():
            if is_dataclass(hints[name]):
                groups[name] = hints[name]
                within = get_type_hints(hints[name], include_extras=True)
                options += [(f.name, f.default, within[f.name]) for f in fields(groups[name])]
            else:
                options.append((name, parameter.default, hints[name]))

        @functools.wraps(function)
        def run(**given: Any) -> None:
            as_json = bool(given.get("as_json"))
            for name, group in groups.items():
                given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
            try:
                function(**given)
            except (WeightNormError, ModuleNotFoundError) as error:
                raise typer.Exit(_refused(error, as_json)) from error

        parameters = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
            )
            for name, default, hint in options
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {name: hint for name, _, hint in options}
        app.command(epilog=epilog)(run)
        return function

    return made


_FLAGS = {
    r"\bin_place=True": "--in-place",
    r"\bfull_pickle=True": "--full-pickle",
    r"\borphans='keep'": "--keep-orphans",
    r"\bnon_finite='keep'": "--keep-non-finite",
    r"\bkeep=\(\)": "--all",
    r"(?<=pass )dim=(?=\d)|(?<=which it is, )dim=(?=\d)": "--dim ",
}
"""The options by what the library's errors call them."""


def _refused(error: Exception, as_json: bool) -> int:
    text = " ".join(str(error).split())
    for argument, flag in _FLAGS.items():
        text = re.sub(argument, flag, text)
    if isinstance(error, ModuleNotFoundError):
        text = f"this needs {error.name}: pip install 'wn-surgery[transformers]'"
    print_error(text)
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": text}})
    return SYSTEM if isinstance(error, CheckpointFileError) else REFUSED
