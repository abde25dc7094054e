"""Published rules for the shape of robust networks: depths of stages, widths, and how they share a budget.

Huang et al., 2021, arXiv 2110.03825 (WRN-34-R); Huang et al., 2023, arXiv 2212.11005 (RobustScaling, independent
scaling); Peng et al., 2023, arXiv 2308.16258 (ratio of width to depth); NARes (grid of depths and widths of WRNs).

A widening factor is the width of a stage over that of WRN-d-1, which has 16, 32, 64 channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nas.errors import InputError

DEPTH_PATTERN = (2.0, 2.0, 1.0)
"""Depths of the most robust networks of independent scaling, stage to stage (Huang et al., 2023)."""
WIDTH_PATTERN = (2.0, 2.5, 1.0)
"""Widening factors of the most robust networks of independent scaling, stage to stage (Huang et al., 2023)."""
DEPTH_SHARE = 0.7
"""Share of depth at which accuracy under attack peaks (Huang et al., 2023)."""
GOOD_RATIO = (7.5, 13.5)
"""Where the ratio of width to depth of robust networks lies, about (Peng et al., 2023)."""

DEPTHS = (2, 3, 4, 5, 7, 9, 11)
FACTORS = (4, 6, 8, 10, 12, 14, 16, 20)
NARES_DEPTHS = (4, 5, 7, 9, 11)
NARES_FACTORS = (8, 10, 12, 14, 16)

Count = Callable[[Sequence[int], Sequence[float]], int]
"""(depths, widening factors) of stages -> parameters or MACs of the network."""


def wrn_r_factors(factor: float = 10) -> tuple[float, float, float]:
    """Widening factors by the rule of WRN-34-R: those of WRN-d-``factor`` times 2, 2 and 0.8; 20-20-8 of 10.

    The last stage is narrowed, depths stay as they are. Parameters grow by about half, MACs almost threefold.
    """
    return 2 * factor, 2 * factor, 0.8 * factor


def depth_share(depths: Sequence[int], factors: Sequence[float]) -> float:
    """r_D = sum D / (sum D + sum W), D blocks of each stage and W its widening factors (Huang et al., 2023)."""
    _check(depths, factors, 1)
    return sum(depths) / (sum(depths) + sum(factors))


def width_depth_ratio(depths: Sequence[int], widths: Sequence[int]) -> float:
    """Mean of width over depth of all stages but the last (Peng et al., 2023); widths in channels.

    The width of a bottleneck is that of its 3x3 convolution.
    """
    _check(depths, widths, 2)
    return math.fsum(width / depth for depth, width in zip(depths[:-1], widths[:-1], strict=True)) / (len(depths) - 1)


def in_good_ratio(depths: Sequence[int], widths: Sequence[int], good: tuple[float, float] = GOOD_RATIO) -> bool:
    """Whether ``width_depth_ratio`` lies in ``good``, bounds included: a filter of configurations."""
    return good[0] <= width_depth_ratio(depths, widths) <= good[1]


def depth_grid(stages: int = 3) -> Iterator[tuple[int, ...]]:
    """Depths of independent scaling: 7 choices for each stage, widths as in the baseline (Huang et al., 2023)."""
    return itertools.product(DEPTHS, repeat=stages)


def factor_grid(stages: int = 3) -> Iterator[tuple[int, ...]]:
    """Widening factors of independent scaling: 8 choices for each stage, depths as in the baseline."""
    return itertools.product(FACTORS, repeat=stages)


def nares_grid() -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Depths and widening factors of the 5^6 networks of NARes, the last stage's factor changing fastest."""
    for first, second, third in itertools.product(itertools.product(NARES_DEPTHS, NARES_FACTORS), repeat=3):
        yield (first[0], second[0], third[0]), (first[1], second[1], third[1])


@dataclass(frozen=True)
class Scaled:
    """A network that RobustScaling found: blocks and widening factor of each stage, and what it costs."""

    depths: tuple[int, ...]
    factors: tuple[float, ...]
    cost: int

    @property
    def share(self) -> float:
        """The share of depth after rounding."""
        return depth_share(self.depths, self.factors)


def robust_scaling(
    count: Count,
    budget: float,
    *,
    share: float = DEPTH_SHARE,
    depth_pattern: Sequence[float] = DEPTH_PATTERN,
    width_pattern: Sequence[float] = WIDTH_PATTERN,
    step: float = 1,
) -> Scaled:
    """The network of about ``budget`` parameters or MACs, whichever ``count`` counts, by RobustScaling.

    D3 and W3 solve: depths D3 * ``depth_pattern`` and factors W3 * ``width_pattern`` have the depth share ``share`` and
    cost ``budget`` (Huang et al., 2023). Of all ways to round each depth up or down to a whole number, and each factor
    to a multiple of ``step``, the nearest in cost is taken; among those, the nearest in share, then in pattern.

    The paper does not say how it rounds: this way of it is a reconstruction. Each published network, A1 to A4, is one
    of the roundings of its own cost and the one that is found there; at the round budgets it is named after (5 to 40
    GMACs) a neighbour of it may come nearer.

    count: called with whole depths and with factors that may be fractions; must rise with both. Raises ``InputError``
    for a budget below the cost of the smallest network.
    """
    if not 0 < share < 1:
        raise InputError(f"the share of depth must lie between 0 and 1, not {share}")
    if not 0 < step < math.inf:
        raise InputError(f"the step of widening factors must be above 0, not {step}")
    if not 0 < budget < math.inf:
        raise InputError(f"a budget must be a number above 0, not {budget}")
    _check(depth_pattern, width_pattern, 1)
    costs = _Costs(count)
    steepness = share / (1 - share) * math.fsum(width_pattern) / math.fsum(depth_pattern)

    def exact(scale: float) -> tuple[list[float], list[float]]:
        """Real depths and factors at W3 = ``scale``; none below the least a network can have."""
        return [max(1.0, scale * steepness * part) for part in depth_pattern], [
            max(step, scale * part) for part in width_pattern
        ]

    # From where every depth and factor is at its least.
    low = min(min(step / part for part in width_pattern), min(1 / (steepness * part) for part in depth_pattern))
    least = costs.between(*exact(low))
    if budget < least:
        raise InputError(
            f"a budget of {budget:,.0f} is below the smallest network's cost of {least:,.0f}: give at least that, or "
            "smaller base widths or step"
        )
    high = 2 * low
    while (cost := costs.between(*exact(high))) < budget:
        low, high, least = high, 2 * high, cost
        if costs.between(*exact(high)) <= least:
            raise InputError(f"the cost stays at {least:,.0f} for deeper and wider networks: count must rise with both")
    while high - low > 1e-4 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if costs.between(*exact(middle)) < budget else (low, middle)
    depths, factors = exact((low + high) / 2)

    roundings = itertools.product(
        itertools.product(*({max(1, math.floor(d)), math.ceil(d)} for d in depths)),
        itertools.product(*({step * max(1, math.floor(w / step)), step * math.ceil(w / step)} for w in factors)),
    )
    found = [Scaled(d, w, costs(d, w)) for d, w in roundings]

    def distance(one: Scaled) -> tuple[float, float, float, tuple[float, ...]]:
        pairs = zip((*one.depths, *one.factors), (*depths, *factors), strict=True)
        pattern = math.fsum(abs(math.log(rounded / real)) for rounded, real in pairs)
        return abs(one.cost - budget), abs(one.share - share), pattern, (*one.depths, *one.factors)

    return min(found, key=distance)


class _Costs:
    """Costs, each counted once; of depths that are no whole numbers, in proportion between their neighbours."""

    def __init__(self, count: Count) -> None:
        self.count = count
        self.known: dict[tuple[tuple[int, ...], tuple[float, ...]], int] = {}

    def __call__(self, depths: tuple[int, ...], factors: tuple[float, ...]) -> int:
        key = depths, factors
        if key not in self.known:
            self.known[key] = self.count(depths, factors)
        return self.known[key]

    def between(self, depths: Sequence[float], factors: Sequence[float]) -> float:
        """Blocks of a stage after its first are alike: the cost of a stage is linear in its depth."""
        whole, width = tuple(math.floor(depth) for depth in depths), tuple(factors)
        base = self(whole, width)
        total = float(base)
        for stage, depth in enumerate(depths):
            if (part := depth - whole[stage]) > 0:
                deeper = tuple(d + (i == stage) for i, d in enumerate(whole))
                total += part * (self(deeper, width) - base)
        return total


def _check(depths: Sequence[float], widths: Sequence[float], stages: int) -> None:
    if len(depths) != len(widths) or len(depths) < stages:
        raise InputError(
            f"{len(depths)} depths and {len(widths)} widths: give one of each for every stage, of {stages} or more"
        )
    if min(*depths, *widths) <= 0:
        raise InputError(f"depths and widths must be above 0, not {tuple(depths)} and {tuple(widths)}")
