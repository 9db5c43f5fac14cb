"""The commands, each a thin layer over a function of the library.

A command imports what needs torch, which takes a second: the help does not wait for it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, astuple
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer
from rich.filesize import decimal

from wn_surgery.cli.app import (
    FOUND,
    FullPickle,
    Json,
    Reading,
    Source,
    Verify,
    Writing,
    app,
    command,
)
from wn_surgery.cli.printing import print_json, print_text, progress
from wn_surgery.errors import RuleError

if TYPE_CHECKING:
    from wn_surgery.rules.sources import RulesLike

__all__ = ["app"]

# As in norm/naming.py, which needs torch; a test compares them.
NormedLayout: TypeAlias = Literal["legacy", "parametrized"]
Layout: TypeAlias = Literal["plain", "legacy", "parametrized"]

Target = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="What to write: a file of the same kind, or for a folder a new folder.",
        show_default=False,
    ),
]
RulesText = Annotated[
    str,
    typer.Argument(
        metavar="RULES",
        help="A YAML or JSON file of rules, a preset's name, or JSON such as "
        """'{"names": "decoder.**"}'.""",
        show_default=False,
    ),
]


class Norm(StrEnum):
    """Other norms that can be stripped."""

    spectral_norm = "spectral_norm"


@command("presets", "presets --json")
def presets(as_json: Json = False) -> None:
    """List the presets of rules, each with what it matches and the paper and code it follows."""
    from wn_surgery.rules.presets import PRESETS

    if as_json:
        print_json({name: entry.to_dict() for name, entry in PRESETS.items()})
        return
    for name, entry in PRESETS.items():
        print_text(name, "bold")
        rules = [rule.describe() for rule in entry.rules]
        print_text("\n".join(f"    {line}" for line in (*rules, entry.summary, entry.source)))


@command("inspect model.safetensors", "inspect last.ckpt --json")
def inspect(source: Source, options: Reading) -> None:
    """List the weight-normed tensors: layout, shape, axes, magnitudes, and values that are NaN."""
    from wn_surgery import checkpoints

    found = checkpoints.inspect(source, **options.arguments())
    if options.as_json:
        print_json(found.to_dict())
        return
    print_text(found)
    if found.findings:
        print_text(f"{len(found.findings)} findings: see wn-surgery doctor {source}", "yellow")


@command("doctor vocoder.pt", "doctor my-model/ --json")
def doctor(source: Source, options: Reading) -> None:
    """Report what would go wrong: a g without its v, zero rows, NaN, mixed dtypes and layouts."""
    from wn_surgery import checkpoints

    found = checkpoints.inspect(source, **options.arguments())
    if options.as_json:
        print_json({"sound": found.sound, "findings": found.to_dict()["findings"]})
    else:
        for each in found.findings:
            style = "red" if each.severity == "error" else "yellow"
            print_text(f"{each.severity}: {each.message}", style)
        errors = sum(each.severity == "error" for each in found.findings)
        print_text(
            f"{len(found.tensors)} normed tensors, {errors} errors, "
            f"{len(found.findings) - errors} warnings"
        )
    if not found.sound:
        raise typer.Exit(FOUND)


@command("report vocoder.safetensors -o report.html", "report my-model/ -o report.html")
def report(
    source: Source,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The page to write, an .html file.", show_default=False
        ),
    ],
    options: Reading,
) -> None:
    """Write a page to look at in a browser: layouts, the distributions of g and ‖v‖, zero rows."""
    from wn_surgery import checkpoints
    from wn_surgery.reporting.page import check_path, report

    check_path(output)
    found = checkpoints.inspect(source, **options.arguments())
    report(found, output, title=source.resolve().name)
    if options.as_json:
        print_json({"files": [output], "weights": [each.name for each in found.tensors]})
    else:
        print_text(f"{len(found.tensors)} normed tensors, {len(found.findings)} findings: {output}")


@command(
    "strip vocoder.safetensors plain.safetensors",
    "strip gan.pt plain.pt --also spectral_norm",
    "strip my-model/ plain/ --dry-run",
)
def strip(
    source: Source,
    target: Target,
    options: Writing,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Also strip the weight norm that a transformers class adds by itself."
        ),
    ] = False,
    also: Annotated[
        list[Norm] | None, typer.Option(help="Another norm to strip.", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint with plain weights: what stripping the live model gives, bit for bit."""
    keep = () if everything else _kept(source)
    arguments = options.arguments() | {"also": [norm.value for norm in also or ()], "keep": keep}
    _convert(source, target, "plain", options.as_json, **arguments)


@command("convert old.pt new.pt --to parametrized")
def convert(
    source: Source,
    target: Target,
    to: Annotated[Layout, typer.Option(help="The layout to write.", show_default=False)],
    options: Writing,
) -> None:
    """Write a checkpoint in another layout."""
    keep = _kept(source) if to == "plain" else None
    _convert(source, target, to, options.as_json, keep=keep, **options.arguments())


@command(
    """apply plain.safetensors normed.safetensors '{"names": "decoder.**"}' --rank 3""",
    "apply my-model/ patched/ rules.yaml",
)
def apply(
    source: Source,
    target: Target,
    rules: RulesText,
    to: Annotated[NormedLayout, typer.Option(help="The layout to write (files).")] = "parametrized",
    rank: Annotated[
        list[int] | None,
        typer.Option(help="How many axes a tensor may have (files).", show_default=False),
    ] = None,
    verify: Verify = False,
    full_pickle: FullPickle = False,
    as_json: Json = False,
) -> None:
    """Apply weight norm: to the tensors of a file by their names, or to the model of a folder.

    A folder with a config.json is a transformers model: it is loaded, patched, and saved so that
    from_pretrained gives it back patched. Its rules may use types.
    """
    from wn_surgery.checkpoints.folders import find

    parsed = _rules(rules)
    if find(source).config is None:
        options: dict[str, Any] = {"ranks": rank, "verify": verify, "full_pickle": full_pickle}
        _convert(source, target, to, as_json, rules=parsed, **options)
        return
    if rank or verify or to != "parametrized":
        raise typer.BadParameter(
            "--rank, --to and --verify are for files: a model has types, and transformers saves "
            "its g and v in the parametrized layout"
        )
    from wn_surgery.huggingface.folders import apply_folder

    report = apply_folder(source, target, parsed)
    if as_json:
        print_json({"files": [str(target)], "weights": list(report.changed)})
    else:
        print_text(report)


@command("plan my-model/ rules.yaml", """plan my-model/ '{"types": "Linear"}' --json""")
def plan(
    folder: Annotated[
        Path, typer.Argument(help="A folder with a transformers config.json.", show_default=False)
    ],
    rules: RulesText,
    as_json: Json = False,
) -> None:
    """Show what rules would do to a transformers model; no weight is read or written."""
    import wn_surgery as wn
    from wn_surgery.huggingface.folders import model_on_meta

    found = wn.plan(model_on_meta(folder), _rules(rules))
    if as_json:
        print_json(json.loads(found.to_json()))
    else:
        print_text(found)
    found.check()


@command("diff normed.ckpt plain.safetensors", "diff a.pt b.pt --atol 1e-6")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    options: Reading,
    atol: Annotated[float, typer.Option(min=0.0, help="Absolute tolerance.")] = 0.0,
) -> None:
    """Compare the weights of two checkpoints, whatever their layouts."""
    from wn_surgery import checkpoints

    found = checkpoints.compare(first, second, **options.arguments())
    if options.as_json:
        print_json({"equal": found.equal(atol), **found.to_dict()})
    else:
        print_text(found)
    if not found.equal(atol):
        raise typer.Exit(FOUND)


def _rules(text: str) -> RulesLike:
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        rules: RulesLike = json.loads(text)
    except ValueError as error:
        raise RuleError(f"RULES {text!r} is not JSON: {error}") from None
    return rules


def _kept(source: Path) -> frozenset[str] | None:
    """The weights that the class of a model norms by itself; None where they are not known."""
    from wn_surgery.checkpoints.folders import find

    if not (find(source).config or {}).get("architectures"):
        return None
    try:
        from wn_surgery.huggingface import built_in_keys
    except ModuleNotFoundError:
        return None
    return built_in_keys(source)


def _convert(source: Path, target: Path, to: Layout, as_json: bool, **options: Any) -> None:
    from wn_surgery import checkpoints

    with progress(f"{to}:", source) as shown:
        done = checkpoints.convert_file(source, target, to, progress=shown, **options)
    if as_json:
        names = ("weights", "spectral", "kept_spectral", "kept")
        cost = {} if done.cost is None else {"dry_run": asdict(done.cost)}
        weights = {name: getattr(done, name) for name in names}
        print_json({"files": list(done.files), **weights, **cost})
        return
    if done.cost is not None:
        read, written, memory = map(decimal, astuple(done.cost))
        print_text(
            f"nothing is written: it would read {read}, write {written}, and hold at most {memory} "
            "of tensors in memory"
        )
    print_text(f"{len(done.weights)} weights → {to}: {target}")
    if done.spectral:
        print_text(f"{len(done.spectral)} spectral-normed weights → plain")
    if done.kept_spectral and to == "plain":
        count = f"{len(done.kept_spectral)} spectral-normed weights"
        print_text(f"{count} kept: --also spectral_norm strips them", "yellow")
    if done.kept:
        why = "since the model's class looks for their g and v"
        print_text(f"{len(done.kept)} kept, {why}: {done.kept[0]}", "yellow")
    if not (done.weights or done.spectral or done.kept):
        print_text("no weight norm was found, so the tensors are the same", "yellow")
