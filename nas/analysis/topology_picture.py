"""A picture of populations of cells: every statistic in a panel, every cell a dot, every population's mean a line."""

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
                across = _swarm(values[:, index], step)
                panel.scatter(
                    place + across,
                    values[:, index],
                    s=10 if len(values) <= 50 else 3,
                    color=colour,
                    alpha=0.6,
                    linewidths=0,
                )
                mean = values[:, index].mean()
                panel.plot([place - 0.42, place + 0.42], [mean, mean], color=colour, linewidth=2.2)
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
    """Values closer than this are drawn side by side."""
    return max(float(np.ptp(values)) / 30, 1e-9)


def _swarm(values: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Places of dots [N] across a column, -0.4 to 0.4: a row is as wide as it has values."""
    bins = np.round(values / step).astype(int)
    most = max(np.bincount(bins - bins.min()).max(), 12)
    across = np.zeros(len(values))
    for level in np.unique(bins):
        members = np.flatnonzero(bins == level)
        across[members] = (np.arange(len(members)) - (len(members) - 1) / 2) * 0.8 / most
    return across
