"""Published rules against the published networks, and the solver against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from nas.analysis.complexity import complexity
from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.studies.rules import (
    depth_grid,
    depth_share,
    factor_grid,
    in_good_ratio,
    nares_grid,
    robust_scaling,
    width_depth_ratio,
    wrn_r_factors,
)
from search_spaces.catalogue import load_genotype
from search_spaces.residual import wide

# Huang et al., 2023: depths, widening factors, and the budget in GMACs that a network is named after.
SCALED = {
    "wrn-a1": ((14, 14, 7), (5, 7, 3), 5),
    "wrn-a2": ((17, 17, 8), (7, 9, 4), 10),
    "wrn-a3": ((22, 22, 11), (8, 11, 5), 20),
    "wrn-a4": ((27, 28, 13), (10, 14, 6), 40),
}


def macs(depths: Sequence[int], factors: Sequence[float]) -> int:
    """Multiply-accumulates of a WRN on 3x32x32 pixels, by hand."""
    total, channels = 32 * 32 * 27 * 16, 16
    for stage, (depth, factor) in enumerate(zip(depths, factors, strict=True)):
        width = factor * 16 * 2**stage
        shortcut = channels * width if stage or width != channels else 0
        total += (32 // 2**stage) ** 2 * (9 * channels * width + 9 * width**2 * (2 * depth - 1) + shortcut)
        channels = width
    return round(total + 10 * channels)


def test_the_count_by_hand_is_that_of_the_networks() -> None:
    for name, (depths, factors, _) in SCALED.items():
        assert load_genotype(name) == wide(depths, factors)
        spec = ModelSpec(wide(depths, factors), 1, 1, (3, 32, 32), tuple("0123456789"), (0.0,) * 3, (1.0,) * 3)
        assert complexity(spec).macs == macs(depths, factors)


@pytest.mark.parametrize("name", SCALED)
def test_the_solver_finds_each_published_network_at_its_own_cost(name) -> None:
    depths, factors, _ = SCALED[name]
    found = robust_scaling(macs, macs(depths, factors))
    assert (found.depths, found.factors, found.cost) == (depths, factors, macs(depths, factors))


@pytest.mark.parametrize("name", SCALED)
def test_at_the_round_budget_it_finds_a_neighbour_and_comes_nearer(name) -> None:
    """The networks themselves miss the round budgets by up to 8 %: depths and factors are one off at most."""
    depths, factors, billions = SCALED[name]
    found = robust_scaling(macs, billions * 1e9)
    assert abs(found.cost - billions * 1e9) <= abs(macs(depths, factors) - billions * 1e9)
    assert found.cost == pytest.approx(billions * 1e9, rel=0.01)
    published = (*depths, *factors)
    assert all(abs(a - b) <= 1 for a, b in zip((*found.depths, *found.factors), published, strict=True))
    assert found.share == pytest.approx(0.7, abs=0.01)


def test_published_networks_have_nearly_the_share_of_the_rule() -> None:
    shares = [depth_share(depths, factors) for depths, factors, _ in SCALED.values()]
    assert shares == pytest.approx([0.7, 42 / 62, 55 / 79, 68 / 98])
    assert depth_share((5, 5, 5), wrn_r_factors()) == pytest.approx(15 / 63)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_share_and_the_budget_are_kept_whatever_they_are(share) -> None:
    for budget in (2e9, 33e9):
        found = robust_scaling(macs, budget, share=share)
        assert found.cost == pytest.approx(budget, rel=0.15)
        assert found.share == pytest.approx(share, abs=0.06)
    fine = robust_scaling(macs, 33e9, share=share, step=1 / 16)
    assert fine.cost == pytest.approx(33e9, rel=0.01)


def test_no_rounding_of_the_exact_solution_comes_nearer() -> None:
    def count(depths: Sequence[int], factors: Sequence[float]) -> int:
        return round(sum(100 * d * w for d, w in zip(depths, factors, strict=True)))

    for budget in (3_000, 7_000, 23_456):
        found = robust_scaling(count, budget)
        slope = 0.7 / 0.3 * 5.5 / 5
        w3 = (budget / 100 / (slope * (4 + 5 + 1))) ** 0.5  # sum of 2*2, 2*2.5, 1*1
        real = (2 * slope * w3, 2 * slope * w3, slope * w3, 2 * w3, 2.5 * w3, w3)
        near = [(max(1, int(value)), int(value) + 1) for value in real]
        best = min(abs(count(one[:3], one[3:]) - budget) for one in itertools.product(*near))
        assert abs(found.cost - budget) == best
        assert all(a in b for a, b in zip((*found.depths, *found.factors), near, strict=True))
        fine = robust_scaling(count, budget, step=1 / 64)
        assert all(abs(a - b) < 1.02 / 64 for a, b in zip(fine.factors, real[3:], strict=True))
        assert abs(fine.cost - budget) < best or best <= 1


def test_of_equal_costs_the_nearest_in_share_is_taken() -> None:
    # The cost does not tell in which stage a block or a factor is: many roundings tie.
    found = robust_scaling(lambda depths, factors: sum(depths) + round(sum(factors)), 20, share=0.7)
    assert (sum(found.depths), sum(found.factors)) == (14, 6)


def test_other_patterns_and_numbers_of_stages() -> None:
    def count(depths: Sequence[int], factors: Sequence[float]) -> int:
        return round(sum(1000 * d * w * w for d, w in zip(depths, factors, strict=True)))

    found = robust_scaling(count, 4 * 1000 * 21 * 9, depth_pattern=(1,) * 4, width_pattern=(1,) * 4, share=0.875)
    assert (found.depths, found.factors) == ((21,) * 4, (3,) * 4)


def test_budgets_that_no_network_has_are_refused() -> None:
    smallest = macs((1, 1, 1), (1, 1, 1))
    found = robust_scaling(macs, smallest)
    assert (found.depths, found.factors) == ((1, 1, 1), (1, 1, 1))
    with pytest.raises(InputError, match=rf"smallest network's cost of {smallest:,}: give at least that"):
        robust_scaling(macs, smallest - 1)
    for budget in (0.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="budget must be a number above 0"):
            robust_scaling(macs, budget)
    with pytest.raises(InputError, match="share of depth must lie between 0 and 1, not 1"):
        robust_scaling(macs, 1e9, share=1)
    with pytest.raises(InputError, match="step of widening factors must be above 0"):
        robust_scaling(macs, 1e9, step=0)
    with pytest.raises(InputError, match=r"cost stays at 5 .* count must rise"):
        robust_scaling(lambda depths, factors: 5, 6)


@pytest.mark.parametrize(
    ("depths", "widths", "ratio"),
    [
        ((5, 8, 13, 1), (36, 72, 140, 270), 9.0),  # RaResNet-50
        ((7, 11, 18, 1), (42, 84, 166, 328), 7.6),  # RaResNet-101
        ((7, 11, 18, 1), (64, 128, 252, 504), 11.6),  # RaWRN-101-2
        ((30, 31, 10), (216, 432, 864), 10.6),  # RaWRN-70-16
        ((3, 4, 6, 3), (64, 128, 256, 512), 32.0),  # ResNet-50
        ((11, 11, 11), (256, 512, 1024), 34.9),  # WRN-70-16
        ((14, 14, 7), (80, 224, 192), 10.9),  # RobustResNet-A1
        ((27, 28, 13), (160, 448, 384), 11.0),  # RobustResNet-A4
        ((5, 5, 5), (320, 640, 512), 96.0),  # WRN-34-R
    ],
)
def test_ratios_of_published_networks(depths, widths, ratio) -> None:
    assert round(width_depth_ratio(depths, widths), 1) == ratio
    assert in_good_ratio(depths, widths) == (ratio < 13.5)


def test_the_filter_includes_its_bounds_and_leaves_the_last_stage_out() -> None:
    assert in_good_ratio((2, 1), (15, 10_000)) and in_good_ratio((2, 1), (27, 1))
    assert not in_good_ratio((2, 1), (14, 15)) and not in_good_ratio((2, 1), (28, 15))
    with pytest.raises(InputError, match="1 depths and 1 widths: give one of each for every stage, of 2 or more"):
        width_depth_ratio((3,), (16,))
    with pytest.raises(InputError, match="must be above 0"):
        width_depth_ratio((0, 3), (16, 16))


def test_wrn_34_r_is_the_rule_applied_to_wrn_34_10() -> None:
    assert wrn_r_factors() == (20, 20, 8)
    assert wide((5, 5, 5), wrn_r_factors()) == load_genotype("wrn-34-r")
    assert wrn_r_factors(5) == (10, 10, 4)


def test_grids_have_their_published_sizes() -> None:
    depths, factors, nares = [*depth_grid()], [*factor_grid()], [*nares_grid()]
    assert (len({*depths}), len({*factors}), len({*nares})) == (343, 512, 15_625)
    assert (5, 5, 5) in depths and (10, 10, 10) in factors
    assert len(depths) == 343 and len(factors) == 512 and len(nares) == 15_625
    assert nares[0] == ((4, 4, 4), (8, 8, 8)) and nares[1] == ((4, 4, 4), (8, 8, 10))
    assert nares[-1] == ((11, 11, 11), (16, 16, 16))
