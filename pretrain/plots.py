"""The plots of a report as PNGs, for slides and papers; the page has its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import ConfigError
from pretrain.curves import Plot, number, y_axis
from pretrain.meter import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2f6f73", "#d08a3e", "#6a6fb0", "#98a35b", "#b5597b", "#7a8896")  # those of the page
DPI = 160


def save_png(plot: Plot, path: Path) -> None:
    """Draw a plot. Raises ConfigError where matplotlib is missing."""
    figure, axes = _figure(7.2, 4.0)
    for each in plot.curves:
        colour, style = COLOURS[each.colour % len(COLOURS)], "--" if each.dashed else "-"
        marker = "o" if 0 < len(each.x) <= 60 else None
        axes.plot(each.x, each.mean, style, color=colour, lw=1.5, marker=marker, ms=3, label=each.label or None)
        if each.low != each.high:
            axes.fill_between(each.x, each.low, each.high, color=colour, alpha=0.18, lw=0)
    axis = y_axis(plot.curves, plot.percent)
    if axis.logarithmic:
        axes.set_yscale("log")
    axes.set_ylim(axis.low, axis.high)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %" if plot.percent else number(value))
    for mark in plot.marks:
        axes.axvline(mark.x, color="#c4643a", lw=0.7, alpha=0.6, zorder=0)
    axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("tokens")
    axes.set_ylabel(plot.unit)
    axes.grid(axis="y", color="#e4e1da", lw=0.7)
    if any(each.label for each in plot.curves):
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def save_waterfall(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw where the time went, from all of it down to the steps that count."""
    figure, axes = _figure(7.2, 0.9 + 0.34 * len(rows))
    names = [row["part"] for row in rows]
    colours = ["#b9b5ab"] + ["#c4643a"] * (len(rows) - 2) + ["#2f6f73"]
    axes.barh(names, [row["share"] for row in rows], left=[row["from"] for row in rows], color=colours, height=0.62)
    for i, row in enumerate(rows):
        text = f" {duration(row['seconds'])}, {row['share']:.1%}"
        end = row["from"] + row["share"]
        axes.text(min(end, 1.0), i, text, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title("Where the time went", loc="left", fontsize=11, fontweight="bold")
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("PNGs need matplotlib: pip install 'longhaul[report]'") from None
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
