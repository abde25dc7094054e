"""How well a number ranks configurations by robustness: Kendall's tau-b with a bootstrap interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.studies import rules
from nas.studies.observation import Observation, by_configuration

Array = NDArray[np.float64]

DRAWS = 2000
"""Bootstrap samples."""


@dataclass(frozen=True)
class Ranking:
    """Rank correlation of a predictor with mean worst-case accuracy of ``n`` configurations, and its 95 % interval."""

    name: str
    tau: float
    interval: tuple[float, float]
    n: int

    def to_data(self) -> dict[str, Any]:
        """Plain values, as written to JSON."""
        return {"name": self.name, "tau": self.tau, "interval": list(self.interval), "n": self.n}


@dataclass(frozen=True)
class Table:
    """The configurations of a study as columns, in the order of their first observation.

    robust: mean over seeds [n];  deviation: of single trainings between seeds, pooled over all configurations with
    ``freedom`` degrees of freedom, None where no configuration has two;  seeds: how many each has [n];  columns: what
    they are by name, each [n].
    """

    names: tuple[str, ...]
    first: tuple[Observation, ...]
    robust: Array
    deviation: float | None
    freedom: int
    seeds: Array
    columns: dict[str, Array]


def table_of(observations: Sequence[Observation]) -> Table:
    """The columns of a study: costs, shape, and every measure that all observations have."""
    groups = by_configuration(observations)
    first = tuple(group[0] for group in groups.values())
    robust = np.array([statistics.fmean(one.robust for one in group) for group in groups.values()])
    squares = sum(
        (one.robust - mean) ** 2 for group, mean in zip(groups.values(), robust, strict=True) for one in group
    )
    freedom = sum(len(group) - 1 for group in groups.values())
    columns: dict[str, Array] = {
        "parameters": np.array([float(one.parameters) for one in first]),
        "multiply-accumulates": np.array([float(one.macs) for one in first]),
        "blocks": np.array([float(one.depth) for one in first]),
        "mean width": np.array([float(np.mean(np.log2(one.widths))) for one in first]),
        "depth share": np.array([depth_share(one) for one in first]),
        "last stage's share": np.array([one.last_share for one in first]),
    }
    measured = set.intersection(*(set(one.measures) for one in observations)) if observations else set()
    for name in sorted(measured):
        columns[name] = np.array([statistics.fmean(one.measures[name] for one in g) for g in groups.values()])
    return Table(
        tuple(groups),
        first,
        robust,
        math.sqrt(squares / freedom) if freedom else None,
        freedom,
        np.array([float(len(group)) for group in groups.values()]),
        columns,
    )


def factors(one: Observation) -> Array:
    """Widening factors: widths over 16, 32, 64, ..., the base of WideResNets, in which patterns are published."""
    return np.array(one.widths) / (16.0 * 2.0 ** np.arange(len(one.widths)))


def depth_share(one: Observation) -> float:
    """The share of depth by ``rules.depth_share``."""
    return rules.depth_share(one.depths, [float(factor) for factor in factors(one)])


def tau_b(x: Array, y: Array) -> float:
    """Kendall's tau-b of ``x`` and ``y`` [n], NaN where either is constant."""
    return float(tau_draws(x, y, np.ones((1, len(x))))[0])


def rankings(observations: Sequence[Observation], *, seed: int) -> list[Ranking]:
    """The rank correlation of every column, the strongest first. Columns that do not vary are left out."""
    if not observations:
        return []
    table = table_of(observations)
    found = [
        Ranking(name, tau, interval, len(table.robust))
        for name, values in table.columns.items()
        if not math.isnan(tau := tau_b(values, table.robust))
        for interval in [interval_of(values, table.robust, seed=seed)]
    ]
    return sorted(found, key=lambda one: -abs(one.tau))


def interval_of(x: Array, y: Array, *, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of tau-b over configurations (percentiles of ``DRAWS`` samples).

    Two draws of one configuration are a tie in both numbers, which tau-b leaves out.
    """
    n = len(x)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
    taus = tau_draws(x, y, counts)
    taus = taus[~np.isnan(taus)]
    if not len(taus):
        return (-1.0, 1.0)
    low, high = np.quantile(taus, [0.025, 0.975])
    return float(low), float(high)


def tau_draws(x: Array, y: Array, counts: Array) -> Array:
    """tau-b [m] of samples that hold point i counts[:, i] times [m, n]."""
    signs = [np.sign(values[:, None] - values[None, :]) for values in (x, y)]
    concordant = np.einsum("mi,mi->m", counts @ (signs[0] * signs[1]), counts)
    untied = [np.einsum("mi,mi->m", counts @ np.abs(sign), counts) for sign in signs]
    with np.errstate(invalid="ignore", divide="ignore"):
        taus: Array = concordant / np.sqrt(untied[0] * untied[1])
    return taus
