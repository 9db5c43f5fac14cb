"""The command line ``wn-surgery``: inspect, strip and convert checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from wn_surgery.checkpoints.convert import layout_of
from wn_surgery.checkpoints.files import (
    INDEX,
    TORCH_SUFFIXES,
    convert_file,
    index_of,
    load,
    open_shards,
)
from wn_surgery.checkpoints.pairs import find_orphans, find_pairs
from wn_surgery.errors import WeightNormError
from wn_surgery.tables import render

try:
    import typer
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "the command line needs typer: pip install 'wn-surgery[cli]'", name=missing.name
    ) from missing

__all__ = ["app", "main"]

app = typer.Typer(
    name="wn-surgery",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Weight-normed checkpoints without their model. Exit codes: 0 done, 1 refused (the "
    "reason is one line on stderr, and nothing was written), 2 wrong usage, 130 interrupted.",
)
Source = Annotated[Path, typer.Argument(help="A checkpoint file, or a folder with one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dim = Annotated[int | None, typer.Option(help="The axis of g where its shape is ambiguous.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="OUT may be IN; replaced by a rename.")]
Pickle = Annotated[
    bool, typer.Option("--full-pickle", help="Unpickle anything. THE FILE CAN THEN RUN CODE.")
]


def _found(path: Path, dim: int | None, full_pickle: bool) -> dict[str, Any]:
    """What a checkpoint holds, as plain data."""
    chosen: int | str = "auto" if dim is None else dim
    if path.suffix in TORCH_SUFFIXES:
        pairs = layout_of(load(path, full_pickle=full_pickle), dim=chosen)
        orphans: list[str] = []
    else:
        if path.is_dir():
            path = path / INDEX if (path / INDEX).exists() else path / "model.safetensors"
        files = open_shards(path, index_of(path))
        for file in files:
            file.close()
        shapes = {name: entry.shape for file in files for name, entry in file.entries.items()}
        pairs = {pair.weight: pair for pair in find_pairs(shapes, dim=chosen)}
        orphans = find_orphans(shapes)
    return {
        "pairs": [
            {"weight": name, "layout": pair.layout, "dim": pair.dim, "g": pair.g, "v": pair.v}
            for name, pair in pairs.items()
        ],
        "orphans": orphans,
    }


@app.command(epilog="Example: wn-surgery inspect model.safetensors --json")
def inspect(
    source: Source, as_json: Json = False, dim: Dim = None, full_pickle: Pickle = False
) -> None:
    """List the weight-normed tensors of a checkpoint: layout and axes."""
    found = _found(source, dim, full_pickle)
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [[pair["weight"], pair["layout"], str(pair["dim"])] for pair in found["pairs"]]
    if rows:
        typer.echo(render(["weight", "layout", "dim"], rows))
    typer.echo(f"{len(rows)} weight-normed tensors")
    for name in found["orphans"]:
        typer.echo(f"{name}: its other half is missing")


@app.command(epilog="Example: wn-surgery strip vocoder.safetensors plain.safetensors")
def strip(
    source: Source,
    target: Annotated[Path, typer.Argument(help="The file (for shards: the folder) to write.")],
    as_json: Json = False,
    dim: Dim = None,
    in_place: InPlace = False,
    full_pickle: Pickle = False,
) -> None:
    """Write a checkpoint with plain weights."""
    _convert(source, target, "plain", as_json, dim, in_place, full_pickle)


@app.command(epilog="Example: wn-surgery convert old.pt new.pt --to parametrized")
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="The file (for shards: the folder) to write.")],
    to: Annotated[str, typer.Option(help="plain, parametrized or legacy.")],
    as_json: Json = False,
    dim: Dim = None,
    in_place: InPlace = False,
    full_pickle: Pickle = False,
) -> None:
    """Write a checkpoint in another layout."""
    _convert(source, target, to, as_json, dim, in_place, full_pickle)


def _convert(
    source: Path,
    target: Path,
    to: Any,
    as_json: bool,
    dim: int | None,
    in_place: bool,
    full_pickle: bool,
) -> None:
    written = convert_file(
        source,
        target,
        to,
        dim="auto" if dim is None else dim,
        in_place=in_place,
        full_pickle=full_pickle,
    )
    names = [str(path) for path in written]
    typer.echo(json.dumps({"written": names}) if as_json else "\n".join(names))


def main() -> None:
    """Run the command line; what the library refuses is one line and exit code 1."""
    try:
        app()
    except WeightNormError as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(1)
