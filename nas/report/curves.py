"""Curves and intervals as SVG for the page: drawn by matplotlib, coloured by the page's style sheet.

Identical data give identical bytes: no date, no random ids, no user's matplotlibrc.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter


@dataclass(frozen=True)
class Palette:
    """Colours of text, grid lines, frames, and of up to six series."""

    ink: str
    grid: str
    frame: str
    series: tuple[str, ...]


PAGE = Palette("#fe0001", "#fe0002", "#fe0003", tuple(f"#fe01{index:02x}" for index in range(6)))
"""Stand-ins for the colours of the page, which only the reader's light or dark scheme decides."""

PAPER = Palette("#1b2026", "#e4e9ee", "#59636e", ("#1a62ad", "#b35000", "#1d7339", "#7d3ab0", "#7b8691", "#b3265e"))
"""The colours of the page in its light scheme, for pictures in files."""

INK, GRID, FRAME, SERIES = PAGE.ink, PAGE.grid, PAGE.frame, PAGE.series

_PAGE_COLOURS = {
    INK: "currentColor",
    GRID: "var(--grid)",
    FRAME: "var(--muted)",
    **{colour: f"var(--series-{index + 1})" for index, colour in enumerate(SERIES)},
}
_DASHES: tuple[Literal["solid", "dashed", "dashdot", "dotted"], ...] = ("solid", "dashed", "dashdot", "dotted")


@dataclass(frozen=True)
class Series:
    """One line: values by epoch, None where there is none.

    colour: 0 to 5;  dash: 0 solid, 1 dashed, 2 dash-dotted, 3 dotted;  series of one name share a legend entry.
    """

    name: str
    epochs: Sequence[float]
    values: Sequence[float | None]
    colour: int = 0
    dash: int = 0
    width: float = 1.6

    @property
    def points(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        pairs = zip(self.epochs, self.values, strict=True)
        return [(epoch, value) for epoch, value in pairs if value is not None and math.isfinite(value)]


@dataclass(frozen=True)
class Interval:
    """One row of the interval picture: worst case with its interval, and natural accuracy, each if known."""

    name: str
    worst_case: float | None
    interval: tuple[float, float] | None
    natural: float | None
    emphasised: bool = False


def curves(
    title: str,
    series: Sequence[Series],
    *,
    unit: Literal["share", "number"],
    boundaries: Sequence[float] = (),
    top: float | None = None,
    axis: str = "epoch",
    doublings: bool = False,
) -> str:
    """Lines over epochs, or over what ``axis`` names, as inline SVG; "" if there is nothing to draw.

    boundaries: epochs at which a new stage begins, marked by vertical lines;  top: end of the vertical axis;
    doublings: equal distances of ``axis`` for equal factors, where its values are factors.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    with style(PAGE):
        # Below the lines stand their names, two in a row at least; a long list needs room of its own.
        rows = -(-len({one.name for one in series}) // 2)
        figure = Figure(figsize=(4.3, 2.9 + 0.19 * max(0, rows - 3)), layout="constrained")
        axes = figure.add_subplot()
        handles: dict[str, Line2D] = {}
        for one in series:
            (line,) = axes.plot(
                one.epochs,
                [math.nan if value is None or not math.isfinite(value) else value for value in one.values],
                color=SERIES[one.colour % len(SERIES)],
                linestyle=_DASHES[one.dash % len(_DASHES)],
                linewidth=one.width,
                # A line of one point is invisible; a few points are better seen as points.
                marker="o" if len(one.points) <= 12 else None,
                markersize=3,
            )
            handles.setdefault(one.name, line)
        for boundary in boundaries:
            axes.axvline(boundary, color=FRAME, linewidth=0.9, linestyle=(0, (2, 2)))
        # All epochs, also those without a value, so that the pictures of one search have the same axis.
        epochs = [epoch for one in series for epoch in one.epochs]
        margin = max(0.5 if axis == "epoch" else 0.0, 0.02 * (max(epochs) - min(epochs))) or 0.5
        if doublings:
            axes.set_xscale("log", base=2)
            axes.set_xlim(min(epochs) / 1.1, max(epochs) * 1.1)
        else:
            axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
        _stage_numbers(axes, boundaries)
        axes.set_xlabel(axis)
        if doublings:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=axis == "epoch", nbins=8))
        if unit == "share":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if unit == "number" else 0.0, top=top)
        _legend(figure, list(handles.values()), list(handles))
        return svg_element(figure, f"{title}. {_in_words(series, unit, axis)}")


def intervals(title: str, rows: Sequence[Interval]) -> str:
    """Worst-case accuracies with their intervals, one row a model, as inline SVG; "" if there is nothing to draw."""
    rows = [row for row in rows if row.worst_case is not None or row.natural is not None]
    if not rows:
        return ""
    with style(PAGE):
        figure = Figure(figsize=(4.8, 0.9 + 0.27 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            colour = SERIES[0] if row.emphasised else SERIES[4]
            if row.interval is not None:
                axes.plot(row.interval, (place, place), color=colour, linewidth=3.2 if row.emphasised else 2.0)
            if row.worst_case is not None:
                axes.plot(row.worst_case, place, "o", color=colour, markersize=6.5 if row.emphasised else 5)
            if row.natural is not None:
                axes.plot(row.natural, place, "d", color=SERIES[1], markersize=5, markerfacecolor="none")
        names = [_shortened(row.name) for row in rows]
        axes.set_yticks(range(len(rows)), names)
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row.emphasised else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(right=1.01)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        marks = [
            Line2D([], [], color=SERIES[4], marker="o", markersize=5, linewidth=2),
            Line2D([], [], color=SERIES[1], marker="d", markersize=5, markerfacecolor="none", linestyle="none"),
        ]
        _legend(figure, marks, ["worst case, 95% interval", "natural"])
        words = "; ".join(
            f"{row.name}: worst case {'unknown' if row.worst_case is None else f'{100 * row.worst_case:.1f}%'}"
            for row in rows
        )
        return svg_element(figure, f"{title}. {words}")


def _stage_numbers(axes: Axes, boundaries: Sequence[float]) -> None:
    """A number above each stage; the page tells their names, which may be long."""
    if not boundaries:
        return
    low, high = axes.get_xlim()
    borders = [low, *boundaries, high]
    for number, (begin, end) in enumerate(itertools.pairwise(borders), start=1):
        axes.text(
            (begin + end) / 2,
            1.01,
            f"stage {number}" if len(borders) <= 5 else str(number),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
        )


def _legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    # matplotlib leaves out names that begin with an underscore.
    labels = [f" {shortened}" if (shortened := _shortened(name)).startswith("_") else shortened for name in names]
    columns = 1 if max(map(len, labels)) > 24 else 2 if max(map(len, labels)) > 13 or len(labels) > 3 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9.5, handlelength=2.6)


def _in_words(series: Sequence[Series], unit: str, axis: str = "epoch") -> str:
    """The gist of a picture for those who do not see it."""

    def number(value: float) -> str:
        return f"{100 * value:.1f}%" if unit == "share" else f"{value:.3g}"

    parts = []
    for one in series:
        (first, start), (last, end) = one.points[0], one.points[-1]
        parts.append(f"{one.name}: {number(start)} at {axis} {first:g}, {number(end)} at {axis} {last:g}")
    return "; ".join(parts)


@contextmanager
def style(palette: Palette) -> Iterator[None]:
    """matplotlib's own defaults and this project's settings while the context lasts, whatever a matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: dict[Any, Any] = {
            "svg.fonttype": "none",
            # A dollar sign in a name is a dollar sign.
            "text.parse_math": False,
            "svg.hashsalt": "report",
            "font.size": 10.0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": palette.frame,
            "axes.labelcolor": palette.ink,
            "xtick.color": palette.frame,
            "ytick.color": palette.frame,
            "xtick.labelcolor": palette.ink,
            "ytick.labelcolor": palette.ink,
            "text.color": palette.ink,
            "grid.color": palette.grid,
            "grid.linewidth": 0.7,
            "axes.grid": True,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
        }
        matplotlib.rcParams.update(settings)
        yield


def svg_element(figure: Figure, description: str) -> str:
    """The figure as an SVG element to stand inside a page, without all that would reach beyond it."""
    stream = io.StringIO()
    FigureCanvasSVG(figure)
    with warnings.catch_warnings():
        # Names may hold characters DejaVu lacks; the reader's own font draws them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    # The style element would rule the whole page, and frames without ink are of no use.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<path d="[^"]*" style="fill: none"/>', "", body)
    key = hashlib.blake2b(body.encode("utf-8", "replace"), digest_size=4).hexdigest()
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', body))
    # Names stand between tags and must stay as they are: only tags are rewritten.
    body = re.sub(r"<[^>]*>", lambda tag: _page_tag(tag[0], key, used), body)
    body = re.sub(r">\s+<", "><", body.strip())
    return f'<svg role="img" aria-label="{escape(description)}" viewBox="{box[1]}">{body}'


def _page_tag(tag: str, key: str, used: set[str]) -> str:
    """A tag with the page's colours and font, ids that no other picture has, and coordinates of two decimals."""
    tag = re.sub(r' id="([^"]*)"', lambda name: f' id="{key}-{name[1]}"' if name[1] in used else "", tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', tag).replace("url(#", f"url(#{key}-")
    for stand_in, colour in _PAGE_COLOURS.items():
        tag = tag.replace(stand_in, colour)
    tag = re.sub(r" ?font-family: [^;\"]*;", "", tag).replace(' type="text/css"', "")
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r"(\d+\.\d{2})\d+", r"\1", tag)
    return re.sub(r"\s+", " ", tag)


def _shortened(text: str, longest: int = 32) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
