"""A picture of populations of cells: every statistic in a panel, every cell a dot, means as lines."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.analysis.topology import STATISTICS
from nas.errors import InputError
from nas.tensor_file import write_bytes

FORMATS = ("svg", "png")
COLUMNS = 5
COLOURS = ("#1a62ad", "#a04c00", "#1d7339", "#7d3ab0")
"""Of searched populations; told apart in the common colour blindnesses, and by their place."""
GREY = "#5b6570"
MOST_DOTS = 100
"""More cells than these are drawn as lines as long as there are cells of a value: thousands of dots say no more."""


def draw_populations(populations: Mapping[str, NDArray[np.float64]], path: Path) -> None:
    """Write the distributions of each statistic in ``populations`` (values [N, S] by title) to ``path``.

    A population named "random" is grey. The ending says whether it is an SVG or a PNG; equal values give an equal file.
    Raises ``InputError`` for another ending.
    """
    form = path.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise InputError(f"a picture of topology is written as .svg or .png, not '{path.name}'")
    # Here, as most users of this package never draw.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = [f"{title}\n({len(values)})" for title, values in populations.items()]
    colours = dict(zip([name for name in populations if name != "random"], COLOURS * len(populations), strict=False))
    rows = -(-len(STATISTICS) // COLUMNS)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "topology", "svg.fonttype": "none", "font.size": 9.0})
        figure = Figure(figsize=(2.4 * COLUMNS, 2.5 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        figure.patch.set_facecolor("white")
        panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
        for index, (statistic, panel) in enumerate(zip(STATISTICS, panels, strict=False)):
            step = _step(np.concatenate([values[:, index] for values in populations.values()]))
            for place, (name, values) in enumerate(populations.items()):
                colour = colours.get(name, GREY)
                heights, counts = _levels(values[:, index], step)
                half = 0.4 * counts / max(counts.max(), 12)
                if len(values) > MOST_DOTS:
                    panel.hlines(heights, place - half, place + half, color=colour, alpha=0.6, linewidth=2.5)
                else:
                    for height, count, width in zip(heights, counts, half, strict=True):
                        across = place + np.linspace(-width, width, 2 * count + 1)[1::2]
                        panel.scatter(across, [height] * count, s=11, color=colour, alpha=0.6, linewidths=0)
                mean = values[:, index].mean()
                panel.plot([place - 0.42, place + 0.42], [mean, mean], color=colour, linewidth=1.6)
            panel.set_title(statistic, fontsize=9.5)
            panel.set_xticks(range(len(titles)), titles, fontsize=8)
            panel.set_xlim(-0.55, len(titles) - 0.45)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color="#dddddd", linewidth=0.6)
            panel.set_axisbelow(True)
        for unused in list(panels):
            unused.set_axis_off()
        stream = io.BytesIO()
        figure.savefig(stream, format=form, dpi=130, metadata={"Date": None} if form == "svg" else None)
    write_bytes(stream.getvalue(), path)


def _step(values: NDArray[np.float64]) -> float:
    """Values that round to one multiple of this are drawn side by side."""
    return max(float(np.ptp(values)) / 30, 1e-9)


def _levels(values: NDArray[np.float64], step: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The heights at which values are drawn, the mean of those side by side, and how many are."""
    _, level, counts = np.unique(np.round(values / step), return_inverse=True, return_counts=True)
    return np.bincount(level, weights=values) / counts, counts
