"""Small pictures as SVG: a histogram, a curve in a cell, a chart of many curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from wn_surgery.reporting.html import Html, tag

__all__ = ["Curve", "chart", "colour", "curve", "histogram", "number"]

Curve: TypeAlias = Sequence[tuple[float, float]]

WIDTH, HEIGHT, BINS = 96, 22, 24
POINTS = 120
"""A curve with more points than pixels is thinned out."""


def number(value: float) -> str:
    """A number in three digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 100_000 else f"{value:.3g}"


STOPS = ((64, 114, 189), (38, 157, 148), (214, 158, 46), (209, 73, 91))


def colour(place: float) -> str:
    """A colour from blue (0) over green and yellow to red (1), seen on light and dark pages."""
    index = min(int(place * (len(STOPS) - 1)), len(STOPS) - 2)
    part = place * (len(STOPS) - 1) - index
    mixed = (round(a + (b - a) * part) for a, b in zip(*STOPS[index : index + 2], strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def histogram(values: Tensor, label: str) -> tuple[Html, float, float, float]:
    """How the finite values are distributed; with it the least, the mean and the greatest.

    The picture is empty, and the numbers are NaN, where no value is finite.
    """
    finite = values[values.isfinite()].double()
    if not finite.numel():
        return Html(), math.nan, math.nan, math.nan
    low, mean, high = torch.stack([finite.min(), finite.mean(), finite.max()]).tolist()
    if low == high:
        path = f"M{WIDTH // 2 - 2} {HEIGHT}v-{HEIGHT}h4v{HEIGHT}z"
    else:
        counts = torch.histc(finite, BINS, low, high)
        # At least a pixel, so that a single outlier can be seen.
        heights = (counts / counts.max() * (HEIGHT - 1)).ceil().int().tolist()
        steps = "".join(f"V{HEIGHT - height}h{WIDTH // BINS}" for height in heights)
        path = f"M0 {HEIGHT}{steps}V{HEIGHT}z"
    said = f"{label}: from {number(low)} to {number(high)}, mean {number(mean)}"
    return _cell(said, tag("path", d=Html(path))), low, mean, high


def curve(points: Curve, label: str) -> Html:
    """A curve as wide as a histogram; empty with fewer than two finite points."""
    places = _places(points, WIDTH, HEIGHT - 2, _range([points], log=False), log=False)
    return _cell(label, tag("path", d=places, class_="line")) if "L" in places else Html()


def _cell(label: str, *content: Html) -> Html:
    box = f"0 0 {WIDTH} {HEIGHT}"
    return tag("svg", *content, viewBox=box, class_="cell", role="img", aria_label=label)


def chart(title: str, curves: Sequence[tuple[str, Curve]]) -> Html:
    """Many curves over the steps of a training, on a log scale where all values allow it."""
    width, height = 360, 200
    log = all(y > 0 for _, points in curves for _, y in points if _can_be_drawn(y))
    found = (left, right), (low, high) = _range([points for _, points in curves], log)
    inner, tall = width - 52, height - 34

    def down(value: float) -> float:
        return 8 + tall - (_scaled(value, log) - low) / (high - low) * tall

    lines = []
    for value in _ticks(low, high, log):
        y = f"{down(value):.1f}"
        lines.append(tag("path", d=f"M44 {y}H{width - 8}", class_="grid"))
        lines.append(tag("text", number(value), x=38, y=y, class_="y"))
    for at, x in ((left, 44), (right, width - 8)):
        side = "x" if at == left else "x last"
        lines.append(tag("text", f"step {at:,.0f}", x=x, y=height - 8, class_=side))
    for index, (name, points) in enumerate(curves):
        path = _places(points, inner, tall, found, log)
        stroke = colour(index / max(1, len(curves) - 1))
        lines.append(
            tag("path", tag("title", name), d=path, stroke=stroke, transform="translate(44 8)")
        )
    scale = ", log scale" if log else ""
    picture = tag(
        "svg", *lines, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{title}{scale}"
    )
    return tag("figure", tag("figcaption", title, tag("small", scale.strip(", "))), picture)


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _can_be_drawn(value: float) -> bool:
    """Whether differences and logarithms of such numbers are numbers."""
    return value == 0 or 1e-300 < abs(value) < 1e300


def _range(curves: Sequence[Curve], log: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """From where to where the finite points go, in both directions; never from a to a."""
    points = [(x, _scaled(y, log)) for points in curves for x, y in points if _can_be_drawn(y)]
    sides = []
    for values in ([x for x, _ in points], [y for _, y in points]):
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        around = 0.0 if high - low > 1e-300 else abs(low) * 0.1 or 1.0
        sides.append((low - around, high + around))
    return sides[0], sides[1]


def _places(
    points: Curve,
    width: float,
    height: float,
    within: tuple[tuple[float, float], tuple[float, float]],
    log: bool,
) -> Html:
    (left, right), (low, high) = within
    every = max(1, math.ceil(len(points) / POINTS))
    thin = [*points[::every], *(points[-1:] if every > 1 else [])]
    path, pen = "", "M"
    for x, value in thin:
        if not _can_be_drawn(value):
            pen = "M"
            continue
        along = (x - left) / (right - left) * width
        down = height - (_scaled(value, log) - low) / (high - low) * height
        path += f"{pen}{along:.1f} {down:.1f}"
        pen = "L"
    return Html(path)


def _ticks(low: float, high: float, log: bool) -> Iterator[float]:
    """Round values in a range that is given in scaled numbers."""
    if log and high - low > 0.7:
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [10.0**power * times for power in powers for times in (1, 2, 5)]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) > 6:
            found = [10.0**power for power in powers if low <= power <= high]
            found = found[:: math.ceil(len(found) / 6)]
        yield from found
        return
    bottom, top = (10**low, 10**high) if log else (low, high)
    rough = (top - bottom) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
    first = math.ceil(bottom / step)
    yield from (step * n for n in range(first, math.floor(top / step) + 1))
