"""Are two populations of cells shaped differently: statistics with intervals, permutation tests, one global test.

Two designs. *Paired*: the accurate and the robust cell of each of n independent searches; if the two kinds were shaped
by one law, exchanging them within an architecture would change nothing, so each pair is exchanged at random (for a
statistic: its difference changes sign). *Unpaired*: cells of searches against cells drawn at random; under the same
hypothesis the labels can be dealt out anew. The p-value is the share of exchanges whose mean difference is at least as
large in size as the one found: exact, by going through all exchanges, where there are at most ``EXHAUSTIVE`` of them,
otherwise of ``DRAWS`` random ones with the one found counted among them (Phipson and Smyth, 2010), which keeps the
level too. Holm's correction (1979) makes the p-values of one comparison's statistics hold together.

The global test looks at whole cells instead of statistics: the energy statistic (Szekely and Rizzo, 2004)
2 E d(X, Y) - E d(X, X') - E d(Y, Y') over ``cell_distance``, under the same exchanges.

An architecture counts once: the tests assume that architectures come from independent searches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from nas.analysis.cell_distance import distance_matrix
from nas.analysis.topology import STATISTICS, cell_topology
from nas.errors import InputError
from search_spaces.genotype import Cell, Genotype

Floats = NDArray[np.float64]

LEVEL = 0.05
EXHAUSTIVE = 10_000
DRAWS = 9_999
RESAMPLES = 2_000
_CHUNK = 1_000


@dataclass(frozen=True)
class Difference:
    """One statistic in two populations.

    first, second: means;  difference: first less second;  low, high: its 95 % interval, uncorrected, None where a
    population has one member;  delta: how often the first is larger less how often it is smaller, -1 to 1, within
    architectures if paired and over all pairs otherwise (Cliff, 1993);  p: of the permutation test;  p_holm: corrected.
    """

    statistic: str
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    delta: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """Two populations of cells, ``n_first`` and ``n_second`` of them, set against each other.

    energy, p: the global test;  smallest_p: the least p-value that so few can give;  exact: whether all exchanges were
    gone through;  enough: with how many architectures a single statistic could be found different.
    """

    first: str
    second: str
    paired: bool
    n_first: int
    n_second: int
    statistics: tuple[Difference, ...]
    energy: float
    p: float
    smallest_p: float
    exact: bool
    enough: int

    @property
    def can_tell(self) -> bool:
        """Whether any single statistic could come out as different at all, after Holm's correction."""
        return self.smallest_p * len(self.statistics) <= LEVEL

    @property
    def verdict(self) -> str:
        """One sentence that says no more than the numbers do."""
        what = f"{self.first} against {self.second}"
        if not self.can_tell:
            whole = "different as whole cells, but " if self.p <= LEVEL else ""
            which = " in what" if whole else ""
            least = min(1.0, self.smallest_p * len(self.statistics))
            return (
                f"{what}: {whole}too few architectures to tell{which} ({self.n_first}: no corrected p-value can be "
                f"below {least:.2g}): give at least {self.enough} independent searches"
            )
        found = [one for one in self.statistics if one.p_holm <= LEVEL]
        if found:
            told = ", ".join(f"{one.statistic} ({one.difference:+.2f})" for one in found)
            return f"{what}: different in {told}"
        if self.p <= LEVEL:
            return f"{what}: different as whole cells, but in no single statistic"
        return f"{what}: no difference found; differences within the intervals remain possible"

    def to_data(self) -> dict[str, Any]:
        """Plain values, as written to JSON."""
        return {**asdict(self), "statistics": [asdict(one) for one in self.statistics], "verdict": self.verdict}


def compare_populations(
    architectures: Sequence[Genotype], drawn: Sequence[Genotype], seed: int
) -> tuple[Comparison, ...]:
    """The kinds of cell of ``architectures`` against one another, and each against that of the ``drawn`` ones, if any.

    Cells that join two sections are left out. Raises ``InputError`` if the kinds of cell differ between architectures.
    """
    kinds = normal_kinds(architectures[0])
    for other in (*architectures, *drawn):
        if normal_kinds(other) != kinds:
            raise InputError(
                f"architectures of {' and '.join(kinds)} cells and of {' and '.join(normal_kinds(other))} cells are no "
                "population: compare those of one layout"
            )
    cells = {kind: [genotype.cell[kind] for genotype in architectures] for kind in kinds}
    # A stream of its own for each comparison: what one finds does not depend on which others are made.
    comparisons = [
        compare_paired((one, other), cells[one], cells[other], _stream(seed, one, other))
        for one, other in itertools.combinations(kinds, 2)
    ]
    if drawn:
        comparisons += [
            compare_unpaired((kind, "random"), cells[kind], [one.cell[kind] for one in drawn], _stream(seed, kind))
            for kind in kinds
        ]
    return tuple(comparisons)


def normal_kinds(genotype: Genotype) -> tuple[str, ...]:
    """The kinds of cell that sections consist of, from input to output."""
    return tuple(dict.fromkeys(genotype.layout.sections))


def compare_paired(
    names: tuple[str, str], first: Sequence[Cell], second: Sequence[Cell], rng: np.random.Generator
) -> Comparison:
    """Cells ``first[i]`` and ``second[i]`` of the same architecture, compared by exchanging them within it."""
    if len(first) != len(second) or not first:
        raise InputError(f"paired populations need one cell of each kind per architecture: {len(first)}, {len(second)}")
    x, y = statistics_of(first), statistics_of(second)
    signs, exact = sign_flips(len(first), rng)
    distances = distance_matrix([*first, *second])
    # Exchanging a pair exchanges the signs with which its two cells enter.
    energy, p = energy_test(distances, np.concatenate([signs, -signs], axis=1) / len(first))
    return Comparison(
        *names,
        paired=True,
        n_first=len(first),
        n_second=len(second),
        statistics=_differences(x, y, p_values((signs @ (x - y)) / len(first)), paired=True, rng=rng),
        energy=energy,
        p=p,
        smallest_p=max(2.0 ** (1 - len(first)), 1 / len(signs)),
        exact=exact,
        enough=next(n for n in itertools.count(1) if 2.0 ** (1 - n) * len(STATISTICS) <= LEVEL),
    )


def compare_unpaired(
    names: tuple[str, str], first: Sequence[Cell], second: Sequence[Cell], rng: np.random.Generator
) -> Comparison:
    """Independent populations of cells, compared by dealing out their labels anew."""
    if not first or not second:
        raise InputError(f"a population without a cell cannot be compared: {len(first)} and {len(second)} were given")
    x, y = statistics_of(first), statistics_of(second)
    weights, exact = deals(len(first), len(second), rng)
    energy, p = energy_test(distance_matrix([*first, *second]), weights)
    m = len(second)
    return Comparison(
        *names,
        paired=False,
        n_first=len(first),
        n_second=m,
        statistics=_differences(x, y, p_values(weights @ np.concatenate([x, y])), paired=False, rng=rng),
        energy=energy,
        p=p,
        smallest_p=max(_least_unpaired(len(first), m), 1 / len(weights)),
        exact=exact,
        enough=next(n for n in itertools.count(1) if _least_unpaired(n, m) * len(STATISTICS) <= LEVEL),
    )


def statistics_of(cells: Sequence[Cell]) -> Floats:
    """The statistics of cells, [N, S], in the order of ``STATISTICS``."""
    return np.array([list(cell_topology("", cell).statistics.values()) for cell in cells])


def sign_flips(n: int, rng: np.random.Generator) -> tuple[Floats, bool]:
    """Signs [B, n] with which n pairs enter, those found first; and whether they are all 2^n."""
    if 2**n <= EXHAUSTIVE:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n))), True
    return np.concatenate([np.ones((1, n)), rng.choice((1.0, -1.0), (DRAWS, n))]), False


def deals(n: int, m: int, rng: np.random.Generator) -> tuple[Floats, bool]:
    """Weights [B, n + m], 1/n for the members of the first population and -1/m for the second's, those found first.

    Second: whether they are all ways to choose the first population.
    """
    if math.comb(n + m, n) <= EXHAUSTIVE:
        chosen = np.array(list(itertools.combinations(range(n + m), n)))
    else:
        drawn = rng.permuted(np.tile(np.arange(n + m), (DRAWS, 1)), axis=1)[:, :n]
        chosen = np.concatenate([np.arange(n)[None], drawn])
    weights = np.full((len(chosen), n + m), -1.0 / m)
    np.put_along_axis(weights, chosen, 1.0 / n, axis=1)
    return weights, math.comb(n + m, n) <= EXHAUSTIVE


def p_values(permuted: Floats) -> Floats:
    """Two-sided p-values [S] of statistics [B, S] under B exchanges, the first of which is what was found."""
    size = np.abs(permuted)
    # Equal sums in another order differ by rounding.
    return np.asarray((size >= size[0] - 1e-9).mean(axis=0))


def energy_test(distances: Floats, weights: Floats) -> tuple[float, float]:
    """The energy statistic of distances [N, N] between populations weighed 1/n and -1/m, and its p-value.

    weights: [B, N], what was found first. With such weights w the statistic is -w'Dw.
    """
    found = np.concatenate(
        [-((part @ distances) * part).sum(axis=1) for part in np.split(weights, range(_CHUNK, len(weights), _CHUNK))]
    )
    return float(found[0]), float((found >= found[0] - 1e-9).mean())


def holm(p: Floats) -> Floats:
    """P-values after Holm's step-down correction: at most LEVEL with probability LEVEL for any true hypothesis."""
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def cliffs_delta(x: Floats, y: Floats) -> float:
    """P(x > y) - P(x < y) over all pairs of a value [N] of one population and one [M] of the other."""
    return float(np.sign(x[:, None] - y[None, :]).mean())


def mean_intervals(resampled: Floats, n: int) -> tuple[Floats, Floats]:
    """95 % percentile intervals [S] of bootstrapped means [R, S] of samples of ``n``.

    Bootstrap intervals of few values are too short, as resampling divides by n instead of n - 1 and knows no t
    distribution, so that the percentiles are widened (Hesterberg, arXiv 1411.5279: expanded percentiles).
    """
    widened = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(LEVEL / 2, n - 1))
    low, high = np.quantile(resampled, [widened, 1 - widened], axis=0)
    return low, high


def _differences(x: Floats, y: Floats, p: Floats, *, paired: bool, rng: np.random.Generator) -> tuple[Difference, ...]:
    n, m = len(x), len(y)
    if min(n, m) < 2:
        intervals: list[tuple[float | None, float | None]] = [(None, None)] * x.shape[1]
    else:
        rows = rng.integers(n, size=(RESAMPLES, n))
        others = rows if paired else rng.integers(m, size=(RESAMPLES, m))
        low, high = mean_intervals(_means(x, rows) - _means(y, others), min(n, m))
        intervals = list(zip(low.tolist(), high.tolist(), strict=True))
    corrected = holm(p)
    return tuple(
        Difference(
            statistic=name,
            first=float(x[:, i].mean()),
            second=float(y[:, i].mean()),
            difference=float(x[:, i].mean() - y[:, i].mean()),
            low=intervals[i][0],
            high=intervals[i][1],
            delta=float(np.sign(x[:, i] - y[:, i]).mean()) if paired else cliffs_delta(x[:, i], y[:, i]),
            p=float(p[i]),
            p_holm=float(corrected[i]),
        )
        for i, name in enumerate(STATISTICS)
    )


def _means(values: Floats, rows: NDArray[np.int64]) -> Floats:
    """Means [R, S] of the chosen rows [R, N] of values [N, S]."""
    counts = np.zeros((len(rows), len(values)))
    np.add.at(counts, (np.arange(len(rows))[:, None], rows), 1.0)
    return counts @ values / rows.shape[1]


def _stream(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng([seed, *" ".join(names).encode()])


def _least_unpaired(n: int, m: int) -> float:
    """The least p-value of a two-sided test over all deals: equal populations can also be exchanged as a whole."""
    return (2 if n == m else 1) / math.comb(n + m, n)
