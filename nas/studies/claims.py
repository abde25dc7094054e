"""Published claims about the width and depth of robust networks, tested on the data of a study.

Every claim has a p-value for what it says and one for the reverse. Over the claims that can be tested these are
corrected by Holm, each side for itself, at 5 %: so the chance that any claim of a difference is called supported by
data without one is at most 5 %, as far as the tests keep their levels. Two claims say that something is weak or not
necessary; data without any law support those, rightly.

Configurations are the units: their seeds are averaged. Slopes have heteroscedasticity-consistent errors (HC3) and t
quantiles; shapes are compared at equal size (log2 of the parameters is a regressor beside them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from nas.studies.laws import control, parabolas, regressor
from nas.studies.observation import Observation
from nas.studies.ranking import Table, factors, table_of, tau_b, tau_draws
from nas.studies.ranking import interval_of as tau_interval
from nas.studies.rules import DEPTH_PATTERN, WIDTH_PATTERN, in_good_ratio, width_depth_ratio

Array = NDArray[np.float64]
Verdict = Literal["supported", "contradicted", "not supported by this data", "cannot be tested"]

LEVEL = 0.05
LEAST = 12
"""Configurations below which no claim is tested."""

WEAK = 0.3
"""A rank correlation nearer to 0 than this counts as weak."""

DRAWS = 2000


@dataclass(frozen=True)
class Claim:
    """A published claim and what this data say of it.

    effect: in ``unit``, with its 95 % interval, not corrected for the number of claims; None where it cannot be tested.
    n: configurations it was tested on.  how: the test, or why there is none.
    """

    statement: str
    source: str
    verdict: Verdict
    effect: float | None
    unit: str
    interval: tuple[float, float] | None
    n: int
    how: str

    def to_data(self) -> dict[str, Any]:
        """Plain values, as written to JSON."""
        return {
            "statement": self.statement,
            "source": self.source,
            "verdict": self.verdict,
            "effect": self.effect,
            "unit": self.unit,
            "interval": None if self.interval is None else list(self.interval),
            "n": self.n,
            "how": self.how,
        }


@dataclass(frozen=True)
class Evidence:
    """What a test found.  p, reverse: p-values of the claim and of its reverse."""

    effect: float
    interval: tuple[float, float]
    p: float
    reverse: float
    unit: str
    n: int
    how: str


class Untestable(Exception):
    """Why a claim cannot be tested on this data."""


Test = Callable[[Table, np.random.Generator], Evidence]


def claims(observations: Sequence[Observation], *, seed: int) -> list[Claim]:
    """Every claim with its verdict, in a fixed order."""
    table = table_of(observations) if observations else None
    found: list[Evidence | str] = []
    for index, (_, _, test) in enumerate(CLAIMS):
        try:
            if table is None or len(table.names) < LEAST:
                raise Untestable(f"fewer than {LEAST} configurations")
            found.append(test(table, np.random.default_rng([seed, index])))
        except Untestable as reason:
            found.append(str(reason))
    tested = [one for one in found if isinstance(one, Evidence)]
    for_it, against = (_holm([getattr(one, side) for one in tested]) for side in ("p", "reverse"))
    corrected = dict(zip(map(id, tested), zip(for_it, against, strict=True), strict=True))
    told = []
    for (statement, source, _), one in zip(CLAIMS, found, strict=True):
        if isinstance(one, str):
            n = 0 if table is None else len(table.names)
            told.append(Claim(statement, source, "cannot be tested", None, "", None, n, one))
            continue
        p, reverse = corrected[id(one)]
        verdict: Verdict = "not supported by this data"
        if p < LEVEL:
            verdict = "supported"
        elif reverse < LEVEL:
            verdict = "contradicted"
        how = f"{one.how}; p = {p:.2g} for it, {reverse:.2g} for the reverse (Holm, {len(tested)} claims)"
        told.append(Claim(statement, source, verdict, one.effect, one.unit, one.interval, one.n, how))
    return told


def _holm(p: Sequence[float]) -> list[float]:
    """Corrected p-values: of k, the smallest times k, the next times k - 1, ..., never falling."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


# --- the tests


def _larger_and_weaker(table: Table, draws: np.random.Generator) -> Evidence:
    """The largest drop from a network to one of at least 10 % more parameters, against chance among equals."""
    parameters, y, error = table.columns["parameters"], table.robust, _errors(table)
    small, large = np.nonzero(parameters[None, :] >= 1.1 * parameters[:, None])
    if not len(small):
        raise Untestable("no two networks differ by 10 % of their parameters")
    scale = np.sqrt(error[small] ** 2 + error[large] ** 2)
    drops = (y[small] - y[large]) / scale
    best = int(drops.argmax())
    # If all networks were equally robust: the largest of as many differences. Growing with size would make it smaller.
    freedom = table.freedom or math.inf
    largest = []
    for _ in range(500):
        noise = draws.standard_normal(len(y)) * error
        estimate = math.sqrt(draws.chisquare(freedom) / freedom) if math.isfinite(freedom) else 1.0
        largest.append(float(((noise[small] - noise[large]) / scale).max()) / estimate)
    p = (1 + sum(value >= drops[best] for value in largest)) / (1 + len(largest))
    effect = 100 * float(y[small[best]] - y[large[best]])
    half = 100 * _quantile(freedom) * float(scale[best])
    taus = _taus(table, parameters, draws)
    return Evidence(
        effect, (effect - half, effect + half), p, _share(taus < 0.8), "points", len(y),
        f"largest drop from a network to one with at least 10 % more parameters, against the largest of {len(small)} "
        "differences among networks of equal robustness; reverse: Kendall's tau of parameters and robustness above 0.8",
    )  # fmt: skip


def _last_stage(table: Table, draws: np.random.Generator) -> Evidence:
    """Slope on log2 of the first stage's parameters less that on the last stage's, at equal size."""
    stages = np.array([one.stage_parameters for one in table.first], dtype=float)
    if stages.ndim != 2 or stages.shape[1] < 2:
        raise Untestable("the networks have no two stages")
    first, last = np.log2(stages[:, 0]), np.log2(stages[:, -1])
    if min(np.ptp(first), np.ptp(last)) == 0:
        raise Untestable("the first or the last stage does not vary")
    beta, covariance, freedom = _ols([first, last, *control(table, "depth share")], table.robust)
    contrast = np.zeros(len(beta))
    contrast[1], contrast[2] = 1, -1
    return _slope_evidence(
        beta, covariance, freedom, contrast, "points a halving", len(table.robust),
        "what halving the parameters of the first stage costs less what halving those of the last does, by regression "
        "on both at equal size",
    )  # fmt: skip


def _interior(table: Table, draws: np.random.Generator) -> Evidence:
    """Whether robustness rises with the depth share at its low end and falls at its high end, at equal size."""
    x, beside = _standardised(table, "depth share")
    beta, covariance, freedom = _ols([x, x**2, *beside], table.robust)
    ends = []
    for end, sign in ((np.quantile(x, 0.05), 1.0), (np.quantile(x, 0.95), -1.0)):
        contrast = np.zeros(len(beta))
        contrast[1], contrast[2] = sign, 2 * sign * end
        error = math.sqrt(contrast @ covariance @ contrast)
        ends.append((float(contrast @ beta) / error, float(student.sf(float(contrast @ beta) / error, freedom))))
    # Both have to hold: the weaker one decides. The reverse: the best is at an end, so that one of them is reversed.
    p = max(one for _, one in ends)
    reverse = min(1.0, 2 * min(1 - one for _, one in ends))
    bend = np.zeros(len(beta))
    bend[2] = -1.0
    effect, half = 100 * float(bend @ beta), 100 * _quantile(freedom) * math.sqrt(bend @ covariance @ bend)
    return Evidence(
        effect, (effect - half, effect + half), p, reverse, "points at one deviation", len(x),
        "fall from the top of a parabola in the depth share at equal size; supported if it rises at the 5 % and falls "
        "at the 95 % quantile of the data",
    )  # fmt: skip


def _depth_share(table: Table, draws: np.random.Generator) -> Evidence:
    """Whether the optimum of the depth share lies between 0.6 and 0.8."""
    x, beside = _standardised(table, "depth share")
    values = table.columns["depth share"]
    if not values.min() < 0.7 < values.max():
        raise Untestable(f"depth shares go from {values.min():.2f} to {values.max():.2f}, not past 0.7")
    n = len(x)
    counts = draws.multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
    drawn = parabolas(x, beside, table.robust, counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = values.mean() + values.std() * -drawn[:, 1] / (2 * drawn[:, 2])
    concave = drawn[:, 2] < 0
    # Without a top, the best is at an end of the data.
    rises = drawn[:, 1] >= 0
    top = np.where(concave, np.clip(vertex, values.min(), values.max()), np.where(rises, values.max(), values.min()))
    inside = (top >= 0.6) & (top <= 0.8)
    low, high = np.quantile(top, [0.025, 0.975])
    return Evidence(
        float(np.median(top)), (float(low), float(high)), _share(~inside), _share(inside), "", n,
        "top of a parabola in the depth share at equal size, within the data; supported if it lies between 0.6 and 0.8",
    )  # fmt: skip


def _pattern(what: str, published: Sequence[float], of: Callable[[Observation], Array]) -> Test:
    """Whether the most robust tenth is nearer to a published pattern of three stages than all are."""

    def test(table: Table, draws: np.random.Generator) -> Evidence:
        if any(len(one.depths) != len(published) for one in table.first):
            raise Untestable(f"the pattern is of {len(published)} stages")
        if any(one.space in CELL_SPACES for one in table.first):
            raise Untestable("the pattern is of stages, not of cells")
        shares = np.array([of(one) / of(one).sum() for one in table.first])
        goal = np.array(published) / sum(published)
        distance = np.abs(shares - goal).sum(1) / 2
        if np.ptp(distance) == 0:
            raise Untestable(f"{what} do not vary")
        size = max(3, round(len(distance) / 10))
        best = np.argsort(-table.robust, kind="stable")[:size]
        difference = float(distance[best].mean() - distance.mean())
        chance = np.array(
            [distance[draws.permutation(len(distance))[:size]].mean() - distance.mean() for _ in range(DRAWS)]
        )
        spread = float(np.std(distance[best], ddof=1)) / math.sqrt(size)
        half = float(student.ppf(0.975, size - 1)) * spread
        average = shares[best].mean(0)
        words = " : ".join(f"{value / average[-1]:.2g}" for value in average)
        return Evidence(
            difference, (difference - half, difference + half),
            (1 + float((chance <= difference).sum())) / (1 + DRAWS),
            (1 + float((chance >= difference).sum())) / (1 + DRAWS), "of all", len(distance),
            f"share of {what} that the {size} most robust have elsewhere than {':'.join(f'{v:g}' for v in published)}, "
            f"less that of all, by permutation; theirs on average: {words}",
        )  # fmt: skip

    return test


def _weak(name: str) -> Test:
    """Whether a total ranks networks weakly."""

    def test(table: Table, draws: np.random.Generator) -> Evidence:
        values = table.columns[name]
        if np.ptp(values) == 0:
            raise Untestable(f"{name} does not vary")
        taus = _taus(table, values, draws)
        return Evidence(
            tau_b(values, table.robust), tau_interval(values, table.robust, seed=0), _share(np.abs(taus) >= WEAK),
            _share(np.abs(taus) < WEAK), "tau", len(values),
            f"Kendall's tau, bootstrap; weak is nearer to 0 than {WEAK}",
        )  # fmt: skip

    return test


def _ratio(table: Table, draws: np.random.Generator) -> Evidence:
    """Whether networks with a width of 7.5 to 13.5 channels a block are more robust at equal size."""
    if any(one.space in CELL_SPACES or len(one.depths) < 2 for one in table.first):
        raise Untestable("the ratio is of networks of at least two stages")
    ratios = np.array([width_depth_ratio(one.depths, one.widths) for one in table.first])
    inside = np.array([float(in_good_ratio(one.depths, one.widths)) for one in table.first])
    if min(inside.sum(), len(inside) - inside.sum()) < 3:
        raise Untestable(
            f"width/depth ratios go from {ratios.min():.3g} to {ratios.max():.3g}: three of each side needed"
        )
    beta, covariance, freedom = _ols([inside, *control(table, "depth share")], table.robust)
    contrast = np.zeros(len(beta))
    contrast[1] = 1
    return _slope_evidence(
        beta, covariance, freedom, contrast, "points", len(ratios),
        f"{int(inside.sum())} networks inside 7.5 to 13.5 against the others at equal size",
    )  # fmt: skip


CELL_SPACES = ("dsara", "darts")

CLAIMS: tuple[tuple[str, str, Test], ...] = (
    ("More parameters do not necessarily make a network more robust.", "Huang et al., 2021", _larger_and_weaker),
    ("Shrinking the last stage costs less than shrinking the first.", "Huang et al., 2021", _last_stage),
    ("At a fixed size there is a best balance of depth and width between the ends.", "Huang et al., 2021", _interior),
    ("The best share of depth is about 0.7.", "Huang et al., 2023", _depth_share),
    (
        "The most robust networks have depths of about 2:2:1.",
        "Huang et al., 2023",
        _pattern("the blocks", DEPTH_PATTERN, lambda one: np.array(one.depths, dtype=float)),
    ),
    (
        "The most robust networks have widening factors of about 2:2.5:1.",
        "Huang et al., 2023",
        _pattern("the widening", WIDTH_PATTERN, factors),
    ),
    ("Total depth hardly ranks networks by robustness.", "Huang et al., 2023", _weak("blocks")),
    ("Total width hardly ranks networks by robustness.", "Huang et al., 2023", _weak("mean width")),
    (
        "A mean of 7.5 to 13.5 channels a block in all stages but the last makes networks more robust.",
        "Peng et al., 2023",
        _ratio,
    ),
)
"""Statement, source and test of each claim."""


# --- what they share


def _errors(table: Table) -> Array:
    """Standard errors of the means over seeds [n]."""
    if table.deviation is None:
        # Test images alone would make networks look different that another training would turn around.
        raise Untestable("with one seed a configuration it is not known how much trainings differ")
    errors: Array = max(table.deviation, 1e-9) / np.sqrt(table.seeds)
    return errors


def _standardised(table: Table, name: str) -> tuple[Array, list[Array]]:
    values = regressor(table, name)
    if len(np.unique(values.round(9))) < 3:
        raise Untestable(f"{name} has fewer than three values")
    return (values - values.mean()) / values.std(), control(table, name)


def _ols(columns: Sequence[Array], y: Array) -> tuple[Array, Array, int]:
    """Coefficients of 1 and ``columns``, their HC3 covariance (MacKinnon & White, 1985), degrees of freedom."""
    design = np.stack([np.ones_like(y), *columns], 1)
    n, k = design.shape
    if n <= k + 2 or np.linalg.matrix_rank(design) < k:
        raise Untestable("what would have to be told apart goes together in this data")
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ y
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    residual = (y - design @ beta) / np.maximum(1 - leverage, 1e-6)
    covariance = inverse @ (design.T * residual**2) @ design @ inverse
    # A fit without any error leaves nothing to divide by.
    return beta, covariance + 1e-18 * np.eye(k), n - k


def _slope_evidence(
    beta: Array, covariance: Array, freedom: int, contrast: Array, unit: str, n: int, how: str
) -> Evidence:
    value, error = float(contrast @ beta), math.sqrt(contrast @ covariance @ contrast)
    half = _quantile(freedom) * error
    p = float(student.sf(value / error, freedom))
    return Evidence(100 * value, (100 * (value - half), 100 * (value + half)), p, 1 - p, unit, n, how)


def _quantile(freedom: float) -> float:
    return float(student.ppf(0.975, freedom)) if math.isfinite(freedom) else float(norm.ppf(0.975))


def _taus(table: Table, values: Array, draws: np.random.Generator) -> Array:
    n = len(values)
    counts = draws.multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
    taus = tau_draws(values, table.robust, counts)
    return taus[~np.isnan(taus)]


def _share(hits: NDArray[np.bool_]) -> float:
    """Share of draws, never 0: no fewer than one in all that could have been made."""
    return (1 + float(hits.sum())) / (1 + len(hits))
