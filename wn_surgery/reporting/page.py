"""The page: one HTML file without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wn_surgery.checkpoints.inspection import Inspection
from wn_surgery.checkpoints.io.atomic import atomic
from wn_surgery.errors import CheckpointError
from wn_surgery.reporting import content as contents
from wn_surgery.reporting.charts import chart, colour, curve, histogram, number
from wn_surgery.reporting.content import PARTS, Branch, Content, Weight
from wn_surgery.reporting.html import Html, join, tag, text
from wn_surgery.rules.sources import RulesLike
from wn_surgery.training.statistics import History

__all__ = ["check_path", "page", "report", "write"]

SUFFIXES = (".html", ".htm")
LAYOUTS = ("parametrized", "legacy", "spectral", "other", "plain")
CURVES = 40
"""A chart with more lines cannot be read."""


def report(
    model: nn.Module | Inspection,
    path: str | os.PathLike[str],
    *,
    rules: RulesLike | None = None,
    history: History | None = None,
    optimizers: Any = (),
    title: str | None = None,
) -> Path:
    """Write a page to look at in a browser, and return its path.

    It shows every weight that has, or could have, weight norm: its layout, the rule that decides,
    the distributions of g and ‖v‖, rows of zeros, and the effective learning rate; the tree of
    modules; and what is wrong. It is one file that loads nothing, can be sorted and searched, and
    is readable without JavaScript.

    Args:
        model: any module tree; it is only read. Sharded parameters are gathered, so every rank has
            to call it. Or what :func:`wn_surgery.checkpoints.inspect` has found in a file.
        path: a file that ends in ``.html``. An earlier one stays whole until the new one is.
        rules: what to match with the model, as for :func:`wn_surgery.plan`. Nothing raises if
            they cannot be applied; the page says so.
        history: what a training has recorded: ``callback.history``.
        optimizers: for the effective learning rate now, as for :func:`wn_surgery.statistics`.
        title: the heading; the model's class by default.

    Raises:
        TypeError: ``model`` is something else, or the others are given with an inspection.
        RuleError: the rules are wrong.
        CheckpointError: ``path`` has another ending.
        CheckpointFileError: the file cannot be written; what was there before is still there.

    Example:
        >>> import tempfile, torch, wn_surgery as wn
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Linear(4, 2))
        >>> _ = wn.apply(model, "convolutions")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(wn.report(model, f"{folder}/report.html", rules="convolutions").name)
        report.html
    """
    target = check_path(path)
    return write(
        page(model, rules=rules, history=history, optimizers=optimizers, title=title), target
    )


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if its name is one of a page: a checkpoint named by mistake is not replaced."""
    found = Path(path)
    if found.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{str(path)!r} has another ending than .html; a report is a page")
    return found


def write(made: str, path: Path) -> Path:
    """Write a page: all of it or nothing."""
    with atomic(path, like=path if path.exists() else None) as out:
        out.write(made.encode())
    return path


def page(
    model: nn.Module | Inspection,
    *,
    rules: RulesLike | None = None,
    history: History | None = None,
    optimizers: Any = (),
    title: str | None = None,
) -> str:
    """The text of the page that :func:`report` writes."""
    if isinstance(model, Inspection):
        if rules is not None or history is not None or optimizers != ():
            raise TypeError("rules, history and optimizers are for a model, not for a checkpoint")
        found = contents.of_checkpoint(model, "A checkpoint")
    elif isinstance(model, nn.Module):
        found = contents.of_model(model, rules, history, optimizers)
    else:
        raise TypeError(
            f"expected a model, which is an nn.Module, or wn.checkpoints.inspect(file); got a "
            f"{type(model).__name__}"
        )
    found.title = title or found.title
    return _document(found)


def _document(content: Content) -> str:
    from importlib import resources

    from wn_surgery import __version__

    style, script = (
        resources.files("wn_surgery.reporting").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    columns = _columns(content)
    widths = " ".join(width for _, _, _, width in columns)
    style = style.replace("--columns: none", f"--columns: {widths}")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    head = join(
        tag("meta", charset="utf-8"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content=f"{policy}; base-uri 'none'; form-action 'none'",
        ),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{content.title} – weight norm"),
        tag("style", Html(style)),
    )
    made_by = f"wn_surgery {__version__}, torch {torch.__version__}"
    body = tag(
        "main",
        tag("header", tag("p", "Weight norm report"), tag("h1", content.title)),
        _summary(content),
        _notes(content),
        _training(content),
        _rules(content),
        _table(content, columns),
        _tree(content),
        tag("footer", f"Written by {made_by}."),
    )
    whole = tag(
        "html", tag("head", head), tag("body", body, tag("script", Html(script))), lang="en"
    )
    return f"<!doctype html>\n{whole}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _section(title: str, *content: object, **attributes: object) -> Html:
    return tag("section", tag("h2", title), *content, **attributes)


# The top ----------------------------------------------------------------------------------------


def _summary(content: Content) -> Html:
    weights = content.weights
    normed = sum(weight.layout in ("parametrized", "legacy") for weight in weights)
    changes = sum(bool(weight.becomes) for weight in weights)
    tiles = [
        (f"{normed:,}", f"of {_count(len(weights), 'weight')} have weight norm")
        if content.live
        else (f"{normed:,}", "tensors have weight norm"),
        (_short(content.root.size), "parameters" if content.live else "numbers in it"),
    ]
    if content.live:
        tiles.append((f"{len(content.root):,}", "modules"))
    if changes:
        tiles.append((f"{changes:,}", "would change by these rules"))
    if content.steps:
        tiles.append((f"{content.steps:,}", "records of a training"))
    zero = sum(weight.zero or 0 for weight in weights)
    if normed:
        tiles.append((f"{zero:,}", f"{'row' if zero == 1 else 'rows'} with ‖v‖ = 0"))
    shown = [tag("li", tag("b", value), " ", tag("span", noun)) for value, noun in tiles]
    return join(tag("ul", *shown, class_="tiles"), _bar(Counter(w.layout for w in weights)))


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**4, "k")):
        if count >= unit:
            return f"{count / (1000 if name == 'k' else unit):.3g} {name}"
    return f"{count:,}"


def _bar(layouts: Counter[str]) -> Html:
    """How many weights have which layout; with JavaScript, buttons that filter the table."""
    total, at, parts, legend = layouts.total(), 0.0, [], []
    for layout in LAYOUTS:
        if count := layouts[layout]:
            width = 1000 * count / total
            parts.append(tag("rect", x=f"{at:.1f}", width=f"{width:.1f}", height=8, class_=layout))
            at += width
            label = join(tag("i", class_=f"dot {layout}"), f"{layout} ", tag("b", f"{count:,}"))
            legend.append(tag("button", label, type="button", data_layout=layout))
    if not total:
        return Html()
    box = tag("svg", *parts, viewBox="0 0 1000 8", preserveAspectRatio="none", aria_hidden="true")
    return tag("div", box, tag("div", *legend, class_="legend"), class_="bar")


def _notes(content: Content) -> Html:
    if not content.notes:
        return Html()
    items = []
    for note in content.notes:
        said: object = note.text
        if len(note.places) == 1:
            said = join(tag("code", note.places[0]), " ", note.text)
        elif note.places:
            places = join(*(tag("li", tag("code", place)) for place in note.places))
            summary = tag("summary", tag("b", _count(len(note.places), "weight")), f": {note.text}")
            said = tag("details", summary, tag("ul", places))
        items.append(
            tag(
                "li",
                tag("b", note.severity, class_="badge"),
                tag("div", said),
                class_=note.severity,
            )
        )
    return _section("What to look at", tag("ul", *items, class_="notes"))


def _training(content: Content) -> Html:
    if not content.curves:
        return Html()
    names = list(dict.fromkeys(name for found in content.curves.values() for name, _ in found))
    every = math.ceil(len(names) / CURVES)
    kept = set(names[::every])
    charts = [
        chart(title, [each for each in content.curves[key] if each[0] in kept])
        for key, title in PARTS.items()
        if key in content.curves
    ]
    if len(names) <= 12:
        dots = [_dot(index / max(1, len(names) - 1)) for index in range(len(names))]
        legend = [tag("li", dot, name) for dot, name in zip(dots, names, strict=True)]
    else:
        shown = (
            f"{len(kept)} of {len(names)} weights" if every > 1 else _count(len(names), "weight")
        )
        legend = [tag("li", f"{shown}, from the first ", _dot(0), " to the last ", _dot(1))]
    return _section(
        "Training",
        tag("p", "The mean of each weight at each recorded step."),
        tag("div", *charts, class_="charts"),
        tag("ul", *legend, class_="curves"),
    )


def _dot(place: float) -> Html:
    circle = tag("circle", cx=5, cy=5, r=5, fill=colour(place))
    return tag("svg", circle, viewBox="0 0 10 10", class_="dot", aria_hidden="true")


def _rules(content: Content) -> Html:
    if not content.rules:
        return Html()
    rows = [
        tag("li", tag("code", rule), tag("small", f" decides {_count(count, 'weight')}"))
        for rule, count in content.rules
    ]
    return _section(
        "Rules", tag("p", "The last rule that matches a weight decides."), tag("ol", *rows)
    )


# The table --------------------------------------------------------------------------------------


def _columns(content: Content) -> list[tuple[str, str, str, str]]:
    """Of each column that is used: its class, its heading, what it explains, and its width."""
    weights = content.weights
    found = [
        ("name", "weight" if content.live else "tensor", "", "minmax(12rem, 1fr)", True),
        ("layout", "layout", "how it is stored", "7.2rem", True),
        ("rule", "rule", "which rule decides", "6rem", bool(content.rules)),
        ("shape", "shape", "of the weight; sorted by its size", "7.5rem", True),
        (
            "g",
            "g",
            "the distribution; sorted by the mean",
            "7rem",
            any(w.g is not None for w in weights),
        ),
        (
            "v",
            "‖v‖",
            "the distribution; sorted by the mean",
            "7rem",
            any(w.v_norm is not None for w in weights),
        ),
        (
            "zero",
            "zero rows",
            "rows with ‖v‖ = 0",
            "5rem",
            any(w.zero is not None for w in weights),
        ),
        (
            "rate",
            "lr/‖v‖²",
            "the effective learning rate",
            "7rem",
            any(w.rate is not None for w in weights),
        ),
    ]
    return [each[:4] for each in found if each[4]]


def _table(content: Content, columns: list[tuple[str, str, str, str]]) -> Html:
    if not content.weights:
        return _section("Weights", tag("p", "None has, or could have, weight norm."))
    head = [
        tag("th", title, class_=key, scope="col", title=explained or None)
        for key, title, explained, _ in columns
    ]
    used = {key for key, *_ in columns}
    rows = [
        tag(
            "tr",
            *(cell for key, cell in _cells(weight) if key in used),
            id=f"w{index}",
            data_layout=weight.layout,
            class_="bad" if weight.bad else None,
        )
        for index, weight in enumerate(content.weights)
    ]
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows))
    return _section(
        "Weights" if content.live else "Normed tensors", _search("weights"), table, id="weights"
    )


def _search(what: str) -> Html:
    """A field that JavaScript shows."""
    field = tag("input", type="search", placeholder=f"Search {what}", aria_label=f"Search {what}")
    return tag("div", field, tag("output"), class_="tools", hidden="")


def _cells(weight: Weight) -> Iterator[tuple[str, Html]]:
    name, *others = weight.names
    place, dot, last = name.rpartition(".")
    also = [tag("span", f"= {other}", class_="also") for other in others]
    details = tag("small", " · ".join(filter(None, (weight.kind, weight.dtype))))
    yield (
        "name",
        tag(
            "td",
            tag("code", tag("span", place + dot), tag("wbr"), last),
            *also,
            details,
            class_="name",
        ),
    )
    after = join(" → ", _chip(weight.becomes, weight.becomes)) if weight.becomes else ""
    yield "layout", tag("td", _chip(weight.layout, weight.layout), after, class_="layout")
    rule, _, more = weight.rule.partition(", ")
    yield (
        "rule",
        tag(
            "td",
            rule or "–",
            tag("small", more) if more else "",
            class_="rule" if rule else "rule none",
        ),
    )
    shape = "×".join(map(str, weight.shape)) or ("scalar" if weight.layout != "other" else "–")
    dim = tag("small", f"dim={weight.dim}") if weight.layout not in ("plain", "other") else ""
    yield "shape", tag("td", shape, dim, class_="shape", data_v=math.prod(weight.shape))
    yield "g", _distribution("g", "g", weight.g)
    yield "v", _distribution("v", "‖v‖", weight.v_norm)
    zero = "–" if weight.zero is None else f"{weight.zero:,}"
    state = "some" if weight.zero else "none" if weight.zero is None else ""
    yield "zero", tag("td", zero, class_=f"zero {state}", data_v=weight.zero)
    if weight.rate is None:
        yield "rate", tag("td", "–", class_="rate none")
        return
    rate = number(weight.rate)
    spark = curve(weight.rates, f"lr/‖v‖² over the training, {rate} at the end")
    yield "rate", tag("td", spark, tag("small", rate), class_="rate", data_v=weight.rate)


def _distribution(key: str, label: str, values: torch.Tensor | None) -> Html:
    if values is None:
        return tag("td", "–", class_=f"{key} none")
    picture, low, mean, high = histogram(values, label)
    span = number(low) if low == high else f"{number(low)} … {number(high)}"
    if math.isnan(mean):
        return tag("td", "not finite", class_=key)
    return tag("td", picture, tag("small", span), class_=key, data_v=mean)


def _chip(shown: object, layout: str) -> Html:
    return tag("span", shown, class_=f"chip {layout}")


# The tree ---------------------------------------------------------------------------------------


def _tree(content: Content) -> Html:
    root = content.root
    whole = len(root) <= 200
    label = content.title if content.live else "the file"
    tree = tag("ul", _branch(content, [(label, root)], 2 if whole else 1), class_="tree")
    said = "Equal blocks in a row are shown once. A weight links to its row above."
    title = "Modules" if content.live else "Names in the file"
    return _section(title, tag("p", said), _search("names"), tree, id="tree")


def _branch(content: Content, run: list[tuple[str, Branch]], opened: int) -> Html:
    """One branch, which may stand for more that are equal to it; open down to some level."""
    first, branch = run[0]
    labels = [label for label, _ in run]
    name = first if len(run) == 1 else f"{first} … {labels[-1]}"
    several = tag("b", f"{len(run):,} equal", class_="badge") if len(run) > 1 else ""
    kinds = tag("small", f" {' › '.join(branch.kinds)} ") if branch.kinds else ""
    size = tag("small", f" {_short(branch.size)}", class_="size") if branch.size else ""
    chips = [_link(content.weights[number], number) for number in branch.weights]
    chips += [tag("span", other, class_="chip none") for other in branch.others]
    every = Html(" ".join(map(text, labels))) if len(run) > 1 else None
    bold = tag("code", name, data_all=every)
    line = join(bold, kinds, *chips, several, size)
    if not branch.below:
        return tag("li", tag("div", line))
    groups = [list(group) for group in contents.runs(branch)]
    below = [
        _branch(content, part, opened - 1)
        for group in groups
        for part in ([group] if len(group) > 2 else [[each] for each in group])
    ]
    state = {"open": ""} if opened > 0 else {}
    return tag("li", tag("details", tag("summary", line), tag("ul", *below), **state))


def _link(weight: Weight, number: int) -> Html:
    last = weight.names[0].rpartition(".")[2]
    says = f"{weight.layout}{f', {weight.rule}' if weight.rule else ''}"
    kind = "bad" if weight.bad else weight.becomes or weight.layout
    return tag("a", last, href=f"#w{number}", class_=f"chip {kind}", title=says)
