"""Curves as a page can hold them: a metric over tokens, a few hundred points however long the run was. Pure.

A long curve is cut into equally wide buckets of tokens; each keeps its mean, its least and its greatest value, so that
a spike of one step among a million is still seen. Values that are not finite are left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

BUCKETS = 400
DOTS = 60  # a curve of at most so many points shows each of them
WIDTH, HEIGHT = 480, 250  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 28
WARM_UP = 0.05  # the share of a curve whose height may be cut off, so that the rest can be read


@dataclass(frozen=True)
class Curve:
    """One metric of one run: per bucket the place (tokens), mean, least, greatest; all of one length."""

    label: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    last: float | None = None  # the newest finite value
    colour: int = 0
    dashed: bool = False
    not_finite: int = 0


@dataclass(frozen=True)
class Mark:
    """Something that happened at a place: a restart, a rollback, a skipped step."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Plot:
    """Curves of one quantity, to be drawn together."""

    name: str  # of its PNG
    title: str
    curves: list[Curve]
    unit: str = ""
    percent: bool = False
    marks: list[Mark] = field(default_factory=list)


def curve(
    label: str, x: Sequence[float], y: Sequence[float], colour: int = 0, dashed: bool = False, buckets: int = BUCKETS
) -> Curve:
    """A curve from points with ascending x, cut into at most `buckets` buckets."""
    places, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(values)
    lost = int((~finite).sum())
    places, values = places[finite], values[finite]
    if not len(values):
        return Curve(label, [], [], [], [], None, colour, dashed, lost)
    last = float(values[-1])
    if len(values) <= buckets:
        points = values.tolist()
        return Curve(label, places.tolist(), points, points, points, last, colour, dashed, lost)
    span = float(places[-1] - places[0]) or 1.0
    bucket = np.minimum(((places - places[0]) / span * buckets).astype(np.int64), buckets - 1)
    starts = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
    counts = np.diff(np.r_[starts, len(values)])
    return Curve(
        label,
        (np.add.reduceat(places, starts) / counts).tolist(),
        (np.add.reduceat(values, starts) / counts).tolist(),
        np.minimum.reduceat(values, starts).tolist(),
        np.maximum.reduceat(values, starts).tolist(),
        last,
        colour,
        dashed,
        lost,
    )


# --- axes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A range of values, and where it is labelled. On a logarithmic one equal ratios are equally far apart."""

    low: float
    high: float
    ticks: list[float]
    logarithmic: bool = False
    cut: bool = False  # some values lie above

    def at(self, value: float) -> float:
        """0 to 1 for what lies in the range; what lies outside is kept near it."""
        if self.logarithmic:
            value = max(value, self.low / 10)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, -0.05), 1.05)


def x_axis(curves: Iterable[Curve]) -> Axis:
    """From 0 to the last place."""
    high = max((each.x[-1] for each in curves if each.x), default=1.0) or 1.0
    return Axis(0.0, high, [tick for tick in ticks(0.0, high, 5) if tick <= high])


def y_axis(curves: Iterable[Curve], percent: bool = False) -> Axis:
    """All values, but for the height of the first few; logarithmic where they span more than two powers of ten."""
    shown = [each for each in curves if each.x]
    if not shown:
        return Axis(0.0, 1.0, [0.0, 1.0])
    low, high = min(min(each.low) for each in shown), max(max(each.high) for each in shown)
    later = max(_later_high(each) for each in shown)
    if low > 0 and high / low > 100 and not percent:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        powers = range(round(math.log10(low)), round(math.log10(high)) + 1)
        return Axis(low, high, [10.0**p for p in powers][:: 1 + len(powers) // 6], logarithmic=True)
    cut = high - later > (later - low) * 1.0 and later > low
    high = later if cut else high
    if percent and high == low == 0:
        high = 0.01  # a share is never below 0
    elif high == low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    if low >= 0 and low < 0.35 * high:
        low = 0.0
    marks = ticks(low, high, 5)
    step = marks[1] - marks[0]
    low, high = (min(low, math.floor(low / step) * step), max(high, math.ceil(high / step - 1e-9) * step))
    return Axis(low, high, [tick for tick in ticks(low, high, 5) if low - 1e-12 <= tick <= high * (1 + 1e-12)], cut=cut)


def _later_high(each: Curve) -> float:
    if len(each.x) <= DOTS:
        return max(each.high)
    begin = each.x[-1] * WARM_UP
    return max((high for x, high in zip(each.x, each.high, strict=True) if x >= begin), default=max(each.high))


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about so many: at least two."""
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    count = max(1, math.ceil(high / step - 1e-9) - first)
    return [round((first + i) * step, 12) for i in range(count + 1)]


# --- drawn ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A curve in a chart's units: the line and the band between least and greatest as SVG paths; dots where few."""

    label: str
    colour: int
    dashed: bool
    line: str
    band: str
    dots: list[tuple[float, float, str]]
    last: str


@dataclass(frozen=True)
class Chart:
    """A plot in a chart's units."""

    title: str
    unit: str
    lines: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, str, str]]
    notes: list[str]


def draw(plot: Plot) -> Chart:
    """Lay out a plot."""
    across, up = x_axis(plot.curves), y_axis(plot.curves, plot.percent)

    def x(value: float) -> float:
        return round(LEFT + across.at(value) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - up.at(value) * (HEIGHT - TOP - BOTTOM), 1)

    def say(value: float) -> str:
        return f"{100 * value:.3g} %" if plot.percent else number(value)

    lines = []
    for each in plot.curves:
        points = [(x(a), y(b)) for a, b in zip(each.x, each.mean, strict=True)]
        lows = [(x(a), y(b)) for a, b in zip(each.x, each.low, strict=True)]
        highs = [(x(a), y(b)) for a, b in zip(each.x, each.high, strict=True)]
        has_band = each.low != each.high
        dots = [(*p, f"{number(a)} tokens: {say(b)}") for p, a, b in zip(points, each.x, each.mean, strict=True)]
        last = "no finite value" if each.last is None else say(each.last)
        lines.append(
            Drawn(
                each.label,
                each.colour,
                each.dashed,
                _path(points),
                _path(highs + lows[::-1]) + "Z" if has_band else "",
                dots if len(dots) <= DOTS else [],
                last,
            )
        )
    notes = ["the height of the first steps is cut off"] if up.cut else []
    lost = sum(each.not_finite for each in plot.curves)
    notes += [f"{lost:,} values that are not finite are left out"] if lost else []
    return Chart(
        plot.title,
        plot.unit,
        lines,
        [(x(tick), number(tick)) for tick in across.ticks],
        [(y(tick), say(tick)) for tick in up.ticks],
        [(x(mark.x), mark.kind, mark.text) for mark in plot.marks],
        notes,
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in points) if points else ""


def number(value: float) -> str:
    """A number as an axis or a legend shows it: 0.0006 -> 6e-4, 1234567 -> 1.23M, 3.14159 -> 3.142."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        for unit in ("k", "M", "B", "T"):
            size, value = size / 1000, value / 1000
            if size < 999.5 or unit == "T":
                return f"{value:.3g}{unit}"
    if size < 0.001:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"
