"""The commands, each a thin face over a function of the library."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from wn_surgery import checkpoints
from wn_surgery.checkpoints.folders import find
from wn_surgery.checkpoints.request import Layout
from wn_surgery.cli.app import (
    FOUND,
    Dim,
    Json,
    Pickle,
    Source,
    app,
    axes,
    command,
)
from wn_surgery.cli.printing import print_json, print_text, progress
from wn_surgery.errors import RuleError
from wn_surgery.rules.sources import RulesLike

__all__ = ["app"]

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
InPlace = Annotated[
    bool, typer.Option("--in-place", help="OUT may be IN, which is then replaced by a rename.")
]
Keep = Annotated[
    bool, typer.Option("--keep-orphans", help="Carry a g without its v over, and a v without g.")
]
All = Annotated[
    bool,
    typer.Option("--all", help="Strip what the class of a transformers model puts on itself, too."),
]
NonFinite = Annotated[
    bool, typer.Option("--keep-non-finite", help="Write weights that hold NaN or infinities.")
]

Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Read the output back, and compare it, before it takes its name."
    ),
]


class Norm(StrEnum):
    """Other norms that can be stripped."""

    spectral_norm = "spectral_norm"


class Form(StrEnum):
    """Layouts."""

    plain = "plain"
    parametrized = "parametrized"
    legacy = "legacy"


class NormedForm(StrEnum):
    """Layouts that have a g and a v."""

    parametrized = "parametrized"
    legacy = "legacy"


@command("inspect model.safetensors", "inspect last.ckpt --json")
def inspect(
    source: Source, dim: Dim = None, full_pickle: Pickle = False, as_json: Json = False
) -> None:
    """List what is weight-normed: layout, shape, axes, magnitudes, and what is not a number."""
    found = checkpoints.inspect(source, dim=axes(dim), full_pickle=full_pickle)
    if as_json:
        print_json(found.to_dict())
        return
    print_text(found)
    if found.findings:
        print_text(f"{len(found.findings)} findings: see wn-surgery doctor {source}", "yellow")


@command("doctor vocoder.pt", "doctor my-model/ --json")
def doctor(
    source: Source, dim: Dim = None, full_pickle: Pickle = False, as_json: Json = False
) -> None:
    """Say what would go wrong: halves that are lost, zero rows, NaN, mixed dtypes and layouts."""
    found = checkpoints.inspect(source, dim=axes(dim), full_pickle=full_pickle)
    if as_json:
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


@command(
    "strip vocoder.safetensors plain.safetensors", "strip gan.pt plain.pt --also spectral_norm"
)
def strip(
    source: Source,
    target: Target,
    everything: All = False,
    also: Annotated[
        list[Norm] | None, typer.Option(help="Another norm to strip.", show_default=False)
    ] = None,
    dim: Dim = None,
    keep_orphans: Keep = False,
    keep_non_finite: NonFinite = False,
    in_place: InPlace = False,
    verify: Verify = False,
    full_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with plain weights: what stripping the live model gives, bit for bit."""
    _convert(
        source,
        target,
        "plain",
        as_json,
        also=[norm.value for norm in also or ()],
        keep=() if everything else _kept(source),
        dim=axes(dim),
        orphans="keep" if keep_orphans else "error",
        non_finite="keep" if keep_non_finite else "error",
        in_place=in_place,
        verify=verify,
        full_pickle=full_pickle,
    )


@command("convert old.pt new.pt --to parametrized")
def convert(
    source: Source,
    target: Target,
    to: Annotated[Form, typer.Option(help="The layout to write.", show_default=False)],
    dim: Dim = None,
    keep_orphans: Keep = False,
    keep_non_finite: NonFinite = False,
    in_place: InPlace = False,
    verify: Verify = False,
    full_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another layout."""
    _convert(
        source,
        target,
        to.value,
        as_json,
        keep=_kept(source) if to is Form.plain else None,
        dim=axes(dim),
        orphans="keep" if keep_orphans else "error",
        non_finite="keep" if keep_non_finite else "error",
        in_place=in_place,
        verify=verify,
        full_pickle=full_pickle,
    )


@command(
    """apply plain.safetensors normed.safetensors '{"names": "decoder.**"}' --rank 3""",
    "apply my-model/ patched/ rules.yaml",
)
def apply(
    source: Source,
    target: Target,
    rules: RulesText,
    to: Annotated[NormedForm, typer.Option(help="The layout to write (files).")] = (
        NormedForm.parametrized
    ),
    rank: Annotated[
        list[int] | None,
        typer.Option(help="How many axes a tensor may have (files).", show_default=False),
    ] = None,
    verify: Verify = False,
    full_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Put weight norm on: on tensors of a file by their names, or on the model of a folder.

    A folder with a config.json is a model of transformers: it is loaded, patched, and saved so
    that from_pretrained gives it back patched. Its rules may ask for types.
    """
    if find(source).config is not None:
        if rank or verify or to is not NormedForm.parametrized:
            raise typer.BadParameter(
                "--rank, --to and --verify are for files: a model has types, and transformers "
                "saves its g and v as torch does"
            )
        from wn_surgery.huggingface.folders import apply_folder

        report = apply_folder(source, target, _rules(rules))
        if as_json:
            print_json({"files": [str(target)], "weights": list(report.changed)})
        else:
            print_text(report)
        return
    _convert(
        source,
        target,
        to.value,
        as_json,
        rules=_rules(rules),
        ranks=rank,
        verify=verify,
        full_pickle=full_pickle,
    )


@command("plan my-model/ rules.yaml", """plan my-model/ '{"types": "Linear"}' --json""")
def plan(
    folder: Annotated[
        Path, typer.Argument(help="A folder with a transformers config.json.", show_default=False)
    ],
    rules: RulesText,
    as_json: Json = False,
) -> None:
    """Show what rules would do to a model of transformers; no weight is read, none written."""
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
    atol: Annotated[
        float, typer.Option(min=0.0, help="The absolute difference that is none.")
    ] = 0.0,
    dim: Dim = None,
    full_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Tell whether two checkpoints hold the same weights, whatever their layouts."""
    found = checkpoints.compare(first, second, dim=axes(dim), full_pickle=full_pickle)
    if as_json:
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
    """The weights that the class of a model norms by itself; None where that cannot be told."""
    if not (find(source).config or {}).get("architectures"):
        return None
    try:
        from wn_surgery.huggingface import built_in_keys
    except ModuleNotFoundError:
        return None
    return built_in_keys(source)


def _convert(source: Path, target: Path, to: Layout, as_json: bool, **options: Any) -> None:
    with progress(f"{to}:", source) as shown:
        done = checkpoints.convert_file(source, target, to, progress=shown, **options)
    if as_json:
        print_json(
            {
                "files": list(done.files),
                "weights": done.weights,
                "spectral": done.spectral,
                "kept_spectral": done.kept_spectral,
                "kept": done.kept,
            }
        )
        return
    print_text(f"{len(done.weights)} weights → {to}: {target}")
    if done.spectral:
        print_text(f"{len(done.spectral)} spectral-normed weights → plain")
    if done.kept_spectral and to == "plain":
        kept = len(done.kept_spectral)
        print_text(
            f"{kept} spectral-normed weights kept: --also spectral_norm strips them", "yellow"
        )
    if done.kept:
        print_text(
            f"{len(done.kept)} kept, since the model's class looks for their g and v: "
            f"{done.kept[0]}",
            "yellow",
        )
    if not (done.weights or done.spectral or done.kept):
        print_text("no weight norm was found, so the tensors are the same", "yellow")
