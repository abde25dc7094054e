"""Pictures of a width/depth study, for its page and as files of their own.

Each function draws on a figure that it is given and returns the gist in words; ``inline`` and ``save`` make figures of
the page or a file. Configurations are drawn by their mean over seeds.
"""

from __future__ import annotations

import io
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from nas.errors import InputError
from nas.report.curves import PAGE, PAPER, Palette, style, svg_element
from nas.studies.laws import SIZES, laws, regressor
from nas.studies.observation import Observation, by_configuration
from nas.studies.ranking import table_of
from nas.tensor_file import write_bytes

Draw = Callable[[Figure, Palette, "Studied"], str]

FORMATS = ("svg", "png")
PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 2):g}%")


@dataclass(frozen=True)
class Shape:
    """A configuration with its means over seeds.  spread: of ``robust`` over the seeds, None for one seed."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    parameters: int
    macs: int
    shares: tuple[float, ...]
    natural: float
    robust: float
    spread: float | None


@dataclass(frozen=True)
class Studied:
    """The observations of a study, as pictures need them."""

    observations: Sequence[Observation]

    @cached_property
    def shapes(self) -> list[Shape]:
        """One for each configuration."""
        found = []
        for group in by_configuration(self.observations).values():
            first, robust = group[0], [one.robust for one in group]
            total = sum(first.stage_parameters)
            found.append(
                Shape(
                    first.depths,
                    first.widths,
                    first.parameters,
                    first.macs,
                    tuple(part / total for part in first.stage_parameters),
                    statistics.fmean(one.natural for one in group),
                    statistics.fmean(robust),
                    statistics.stdev(robust) if len(robust) > 1 else None,
                )
            )
        return found


def heat_maps(figure: Figure, palette: Palette, studied: Studied) -> str:
    """Mean robust accuracy by depth and width of each stage, and of all stages, with lines of equal parameters.

    A cell is the mean over all configurations that have this depth and this width there.
    """
    shapes = studied.shapes
    stages = len(shapes[0].depths)
    panels: list[tuple[str, list[float], list[float]]] = [
        (f"stage {i + 1}", [s.depths[i] for s in shapes], [s.widths[i] for s in shapes]) for i in range(stages)
    ]
    panels.append(("all stages", [sum(s.depths) for s in shapes], [float(np.mean(np.log2(s.widths))) for s in shapes]))
    panels = [panel for panel in panels if len(set(panel[1])) > 1 or len(set(panel[2])) > 1]
    if not panels:
        return ""
    robust = np.array([shape.robust for shape in shapes])
    size = np.log10([shape.parameters for shape in shapes])
    figure.set_size_inches(2.7 * len(panels) + 0.6, 3.1)
    grids = [_grid(depths, widths, robust, size) for _, depths, widths in panels]
    values = np.concatenate([grid.robust[~np.isnan(grid.robust)] for grid in grids])
    low, high = float(values.min()), float(values.max())
    words = []
    for index, ((title, _, _), grid) in enumerate(zip(panels, grids, strict=True)):
        axes = figure.add_subplot(1, len(panels), index + 1)
        mesh = axes.pcolormesh(
            np.arange(len(grid.columns)),
            np.arange(len(grid.rows)),
            grid.robust,
            cmap="cividis",
            vmin=low,
            vmax=max(high, low + 1e-9),
        )
        _contours(axes, grid)
        last = title == "all stages"
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("mean width (channels)" if last else "width (channels)")
        if index == 0 or last:
            axes.set_ylabel("blocks")
        columns = [f"{2**value:.0f}" if last else f"{value:.0f}" for value in grid.columns]
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(grid.rows)), [f"{value:.0f}" for value in grid.rows])
        axes.grid(False)
        _thinned(axes, len(columns), len(grid.rows))
        place = np.unravel_index(np.nanargmax(grid.robust), grid.robust.shape)
        words.append(
            f"{title}: highest {100 * grid.robust[place]:.1f}% at {grid.rows[place[0]]:.0f} blocks and width "
            f"{columns[place[1]]}"
        )
    bar = figure.colorbar(mesh, ax=figure.axes, shrink=0.9, pad=0.02, format=PERCENT)
    bar.set_label("worst-case accuracy")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return "Robustness by width and depth. " + "; ".join(words)


@dataclass(frozen=True)
class _Grid:
    """Means by row (blocks) and column (width), NaN where there is no configuration."""

    rows: list[float]
    columns: list[float]
    robust: NDArray[np.float64]
    size: NDArray[np.float64]


CELLS = 9
"""Most rows or columns of a heat map; more values than that are put together."""


def _grid(
    depths: Sequence[float], widths: Sequence[float], robust: NDArray[np.float64], size: NDArray[np.float64]
) -> _Grid:
    rows, row_of = _bins(depths)
    columns, column_of = _bins(widths)
    shape = (len(rows), len(columns))
    count, robust_sum, size_sum = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    np.add.at(count, (row_of, column_of), 1)
    np.add.at(robust_sum, (row_of, column_of), robust)
    np.add.at(size_sum, (row_of, column_of), size)
    with np.errstate(invalid="ignore"):
        return _Grid(rows, columns, robust_sum / count, size_sum / count)


def _bins(values: Sequence[float]) -> tuple[list[float], NDArray[np.intp]]:
    """The distinct values, or equal parts of their range where they are many, and the bin of each."""
    distinct = sorted({round(value, 6) for value in values})
    if len(distinct) <= CELLS:
        return distinct, np.searchsorted(distinct, np.round(values, 6))
    edges = np.linspace(distinct[0], distinct[-1], CELLS + 1)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, CELLS - 1)
    return [float(value) for value in (edges[1:] + edges[:-1]) / 2], place


def _contours(axes: Axes, grid: _Grid) -> None:
    """Lines of equal mean number of parameters, labelled."""
    if min(grid.size.shape) < 2 or np.isnan(grid.size).any() or np.ptp(grid.size) == 0:
        return
    levels = np.linspace(grid.size.min(), grid.size.max(), 5)[1:-1]
    # Readable on light and dark cells alike.
    lines = axes.contour(grid.size, levels=levels, colors="white", linewidths=1.2)
    lines.set_path_effects([withStroke(linewidth=2.4, foreground="black")])
    for label in axes.clabel(lines, fmt=lambda value: _count(10**value), fontsize=8):
        label.set_bbox({"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1.0})


def _thinned(axes: Axes, columns: int, rows: int) -> None:
    """Every second tick where there are many."""
    for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
        if count > 5:
            for index, label in enumerate(axis.get_ticklabels()):
                label.set_visible(index % 2 == 0)


def pareto(figure: Figure, palette: Palette, studied: Studied) -> str:
    """Robust accuracy against parameters, MACs and natural accuracy, with the configurations that none surpasses."""
    shapes = studied.shapes
    robust = [shape.robust for shape in shapes]
    figure.set_size_inches(10.2, 3.3)
    words = []
    axis: tuple[tuple[str, list[float], bool], ...] = (
        ("parameters", [float(shape.parameters) for shape in shapes], False),
        ("multiply-accumulates", [float(shape.macs) for shape in shapes], False),
        ("natural accuracy", [shape.natural for shape in shapes], True),
    )
    depth = [sum(shape.depths) for shape in shapes]
    for index, (name, values, more) in enumerate(axis):
        axes = figure.add_subplot(1, 3, index + 1)
        for value, shape in zip(values, shapes, strict=True):
            if shape.spread is not None:
                ends = (shape.robust - shape.spread, shape.robust + shape.spread)
                axes.plot((value, value), ends, color=palette.grid, linewidth=1.0, zorder=1)
        points = axes.scatter(values, robust, c=depth, cmap="cividis", s=16, zorder=2)
        front = front_of(values, robust, more=more)
        axes.plot(
            [values[i] for i in front],
            [robust[i] for i in front],
            color=palette.series[1],
            marker="o",
            markersize=6,
            markerfacecolor="none",
            zorder=3,
        )
        axes.set_xlabel(name)
        axes.yaxis.set_major_formatter(PERCENT)
        if more:
            axes.xaxis.set_major_formatter(PERCENT)
        else:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
            axes.xaxis.set_minor_locator(NullLocator())
        if index == 0:
            axes.set_ylabel("worst-case accuracy")
        words.append(f"{len(front)} configurations form the front against {name}")
    bar = figure.colorbar(points, ax=figure.axes, shrink=0.9, pad=0.02)
    bar.set_label("blocks of all stages")
    bar.locator = MaxNLocator(integer=True, nbins=6)
    bar.update_ticks()
    bar.outline.set_visible(False)  # type: ignore[operator]
    return "Robustness against cost. " + "; ".join(words)


def front_of(cost: Sequence[float], gain: Sequence[float], *, more: bool = False) -> list[int]:
    """Indices of the points that no other surpasses, by rising ``cost``; more: of the first, too, more is better."""
    sign = -1.0 if more else 1.0
    order = sorted(range(len(cost)), key=lambda i: (sign * cost[i], -gain[i]))
    best, front = -np.inf, []
    for i in order:
        if gain[i] > best:
            best = gain[i]
            front.append(i)
    return sorted(front, key=lambda i: cost[i])


def stage_capacity(figure: Figure, palette: Palette, studied: Studied) -> str:
    """Share of the parameters, the blocks and the width of each stage: the best tenth, all, and the worst tenth."""
    shapes = sorted(studied.shapes, key=lambda shape: -shape.robust)
    tenth = max(1, round(len(shapes) / 10))
    groups: Mapping[str, list[Shape]] = {"best tenth": shapes[:tenth], "all": shapes, "worst tenth": shapes[-tenth:]}
    kinds: tuple[tuple[str, Callable[[Shape], NDArray[np.float64]]], ...] = (
        ("share of the parameters", lambda shape: np.array(shape.shares)),
        ("share of the blocks", lambda shape: np.array(shape.depths) / sum(shape.depths)),
        ("share of the width", lambda shape: np.array(shape.widths) / sum(shape.widths)),
    )
    figure.set_size_inches(9.6, 2.9)
    stages = np.arange(len(shapes[0].depths))
    words = []
    for index, (title, of) in enumerate(kinds):
        axes = figure.add_subplot(1, 3, index + 1)
        for place, (name, group) in enumerate(groups.items()):
            rows = np.stack([of(shape) for shape in group])
            colour = (palette.series[0], palette.series[4], palette.series[1])[place]
            error = rows.std(0, ddof=1) if len(group) > 1 else None
            axes.bar(
                stages + 0.26 * (place - 1), rows.mean(0), 0.24, color=colour, label=name, yerr=error,
                error_kw={"ecolor": palette.frame, "elinewidth": 1.0},
            )  # fmt: skip
            if place == 0:
                words.append(f"{title} of the best: {', '.join(f'{100 * value:.0f}%' for value in rows.mean(0))}")
        axes.set_xticks(stages, [f"stage {i + 1}" for i in stages])
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.grid(False, axis="x")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return "Where capacity lies. " + "; ".join(words)


def fits(figure: Figure, palette: Palette, studied: Studied) -> str:
    """Parabolas of robust accuracy against sizes and, at equal size, shapes, with their 95 % bands."""
    found = laws(studied.observations, seed=0)
    table = table_of(studied.observations)
    columns = min(3, len(found)) or 1
    rows = -(-len(found) // columns)
    figure.set_size_inches(3.4 * columns, 2.6 * max(1, rows))
    words = []
    for index, law in enumerate(found):
        axes = figure.add_subplot(rows, columns, index + 1)
        sizes = law.name in SIZES
        scale = (lambda values: 2.0 ** np.asarray(values)) if sizes else np.asarray
        axes.scatter(scale(regressor(table, law.name)), table.robust, s=9, color=palette.series[4], zorder=1)
        axes.fill_between(scale(law.x), law.low, law.high, color=palette.series[0], alpha=0.2, linewidth=0, zorder=2)
        axes.plot(scale(law.x), law.y, color=palette.series[0], zorder=3)
        if law.optimum is not None and law.inside and law.optimum_interval is not None:
            height = float(table.robust.min())
            axes.plot(scale(law.optimum_interval), (height, height), color=palette.series[1], linewidth=3, zorder=3)
            axes.plot(scale([law.optimum]), [height], "o", color=palette.series[1], markersize=6, zorder=4)
            words.append(f"best {law.name} {law.optimum:.3g}, inside the data")
        axes.set_xlabel({"mean width": "mean width (log2 of channels)"}.get(law.name, law.name))
        axes.yaxis.set_major_formatter(PERCENT)
        if sizes:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
            axes.xaxis.set_minor_locator(NullLocator())
        if index % columns == 0:
            axes.set_ylabel("worst-case accuracy")
    return "Fits. " + ("; ".join(words) or "no optimum inside the data is certain")


PICTURES: Mapping[str, Draw] = {
    "heat-maps": heat_maps,
    "pareto": pareto,
    "fits": fits,
    "stage-capacity": stage_capacity,
}
"""The pictures of a study, by the name of their files."""


def inline(draw: Draw, studied: Studied) -> str:
    """The picture as an SVG element in the colours of the page; "" where there is nothing to draw."""
    with style(PAGE):
        figure = Figure(layout="constrained")
        words = draw(figure, PAGE, studied)
        return svg_element(figure, words) if figure.axes else ""


def save(draw: Draw, studied: Studied, path: Path) -> None:
    """Write the picture as .svg or .png, if there is one to draw. Equal observations give an equal file."""
    form = path.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise InputError(f"a picture of a study is written as .svg or .png, not '{path.name}'")
    with style(PAPER), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(layout="constrained")
        draw(figure, PAPER, studied)
        if not figure.axes:
            return
        stream = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(stream, format=form, dpi=160, facecolor="white", metadata=metadata)
    write_bytes(stream.getvalue(), path)


def _count(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"
