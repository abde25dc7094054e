"""How robustness goes with the size and the shape of networks: fits with intervals, and where an optimum lies.

A fit is of the configurations' means over seeds. Shapes are compared at equal size: log2 of the parameters is a
regressor beside them. Intervals are by bootstrap over configurations, which are what a study samples; seeds are
averaged before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.studies.observation import Observation
from nas.studies.ranking import Table, table_of

Array = NDArray[np.float64]

DRAWS = 1000
POINTS = 40
LEAST = 8
"""Configurations below which nothing is fitted."""

SIZES = ("parameters", "multiply-accumulates")
SHAPES = ("blocks", "mean width", "depth share", "last stage's share")


@dataclass(frozen=True)
class Law:
    """Mean worst-case accuracy against one number, as a parabola at equal size.

    x: grid over the range of the data (log2 of sizes);  y, low, high: fitted mean and its 95 % band there, at the mean
    size;  slope: of the straight line, per unit of x;  optimum: where the parabola is highest, None unless all but
    2.5 % of the bootstrap samples are concave;  inside: whether its whole interval lies within the data.
    """

    name: str
    n: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    slope: float
    slope_interval: tuple[float, float]
    optimum: float | None
    optimum_interval: tuple[float, float] | None
    inside: bool

    def to_data(self) -> dict[str, Any]:
        """Plain values, as written to JSON."""
        return {
            "name": self.name,
            "n": self.n,
            "x": list(self.x),
            "y": list(self.y),
            "low": list(self.low),
            "high": list(self.high),
            "slope": self.slope,
            "slope_interval": list(self.slope_interval),
            "optimum": self.optimum,
            "optimum_interval": None if self.optimum_interval is None else list(self.optimum_interval),
            "inside": self.inside,
        }


def laws(observations: Sequence[Observation], *, seed: int) -> list[Law]:
    """A law for each size and shape that varies; none with fewer than ``LEAST`` configurations."""
    if not observations:
        return []
    table = table_of(observations)
    found = []
    for name in (*SIZES, *SHAPES):
        values = regressor(table, name)
        if len(values) >= LEAST and len(np.unique(values)) >= 3:
            found.append(_law(name, values, table, seed))
    return found


def regressor(table: Table, name: str) -> Array:
    """A column as it is fitted: log2 of sizes, everything else as it is."""
    values = table.columns[name]
    return np.log2(values) if name in SIZES else values


def control(table: Table, name: str) -> list[Array]:
    """What is held equal beside a column: log2 of the parameters less its mean, but for sizes themselves."""
    if name in SIZES:
        return []
    size = np.log2(table.columns["parameters"])
    return [size - size.mean()] if np.ptp(size) > 0 else []


def parabolas(x: Array, beside: Sequence[Array], y: Array, counts: Array) -> Array:
    """Coefficients [m, 3 + len(beside)] of 1, x, x^2, ``beside``, of samples that hold point i counts[:, i] times."""
    design = np.stack([np.ones_like(x), x, x**2, *beside], 1)
    normal = np.einsum("mi,ij,ik->mjk", counts, design, design)
    right = np.einsum("mi,ij,i->mj", counts, design, y)
    # A sample may hold too few different points for all coefficients: the least of them fits.
    solved: Array = np.einsum("mjk,mk->mj", np.linalg.pinv(normal, hermitian=True), right)
    return solved


def _law(name: str, values: Array, table: Table, seed: int) -> Law:
    # In units of the spread: powers of large numbers lose digits.
    centre, spread = values.mean(), values.std()
    x, y, beside, n = (values - centre) / spread, table.robust, control(table, name), len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
    (own,) = parabolas(x, beside, y, np.ones((1, n)))
    drawn = parabolas(x, beside, y, counts)
    grid = np.linspace(x.min(), x.max(), POINTS)
    powers = np.stack([np.ones_like(grid), grid, grid**2])
    low, high = np.quantile(drawn[:, :3] @ powers, [0.025, 0.975], axis=0)
    line, lines = _slope(x, beside, y, np.ones((1, n)))[0], _slope(x, beside, y, counts)
    optimum = interval = None
    inside = False
    if own[2] < 0 and np.mean(drawn[:, 2] < 0) >= 0.975:
        concave = drawn[drawn[:, 2] < 0]
        vertex = -concave[:, 1] / (2 * concave[:, 2])
        ends = np.quantile(vertex, [0.025, 0.975])
        inside = bool(ends[0] > x.min() and ends[1] < x.max())
        optimum = float(centre - spread * own[1] / (2 * own[2]))
        interval = (float(centre + spread * ends[0]), float(centre + spread * ends[1]))
    slopes = np.quantile(lines, [0.025, 0.975]) / spread
    return Law(
        name, n, _plain(centre + spread * grid), _plain(own[:3] @ powers), _plain(low), _plain(high),
        float(line / spread), (float(slopes[0]), float(slopes[1])), optimum, interval, inside,
    )  # fmt: skip


def _slope(x: Array, beside: Sequence[Array], y: Array, counts: Array) -> Array:
    """Slope [m] of the straight line."""
    design = np.stack([np.ones_like(x), x, *beside], 1)
    normal = np.einsum("mi,ij,ik->mjk", counts, design, design)
    right = np.einsum("mi,ij,i->mj", counts, design, y)
    slopes: Array = np.einsum("mjk,mk->mj", np.linalg.pinv(normal, hermitian=True), right)[:, 1]
    return slopes


def _plain(values: Array) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
