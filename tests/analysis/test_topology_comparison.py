"""Comparisons of populations: exact against brute force, at their level under the null, able to see what is there."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from nas.analysis import topology_comparison
from nas.analysis.cell_distance import distance_matrix
from nas.analysis.topology import STATISTICS, cell_topology
from nas.analysis.topology_comparison import (
    cliffs_delta,
    compare_paired,
    compare_populations,
    compare_unpaired,
    deals,
    energy_test,
    holm,
    mean_intervals,
    p_values,
    sign_flips,
    statistics_of,
)
from nas.errors import InputError
from search_spaces import darts, dsara
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Cell, Edge


def rng(seed=0):
    return np.random.default_rng(seed)


def genotypes(count, seed=0, space=dsara.SPACE):
    generator = torch.Generator().manual_seed(seed)
    return [space.random(generator) for _ in range(count)]


def cells(count, seed=0):
    return [genotype.cell["robust"] for genotype in genotypes(count, seed)]


def dilated(cell, many=8):
    """The cell with its first ``many`` operations dilated."""
    places = itertools.count()
    return Cell(
        tuple(
            tuple(Edge("dil_conv_3x3", edge.source) if next(places) < many else edge for edge in node)
            for node in cell.nodes
        )
    )


def found(comparison, statistic):
    return next(one for one in comparison.statistics if one.statistic == statistic)


# --- exactness


def test_sign_flips_by_hand():
    """Differences 1, 2, 3: of eight sign patterns two reach a mean of 2; 1, 2, -3 is reached by all eight."""
    signs, exact = sign_flips(3, rng())
    assert exact and len(signs) == 8 and (signs[0] == 1).all()
    assert p_values(signs @ np.array([[1.0, 1.0], [2.0, 2.0], [3.0, -3.0]]) / 3) == pytest.approx([2 / 8, 1.0])


@pytest.mark.parametrize(("n", "m"), [(3, 4), (2, 5), (5, 2)])
def test_deals_are_all_choices(n, m):
    """Against scipy's exact permutation test."""
    values = rng(n).normal(size=(n + m, 1))
    weights, exact = deals(n, m, rng())
    assert exact and len(weights) == math.comb(n + m, n) == len(np.unique(weights, axis=0))

    def size(x, y):
        return abs(x.mean() - y.mean())

    # scipy rounds the found statistic against the null's by its own tolerance.
    known = stats.permutation_test((values[:n, 0], values[n:, 0]), size, alternative="greater", n_resamples=np.inf)
    assert p_values(weights @ values)[0] == pytest.approx(known.pvalue)
    assert abs(weights @ values)[0, 0] == pytest.approx(known.statistic)


def test_energy_by_its_definition_and_all_exchanges():
    x, y = cells(3, seed=1), [dilated(cell) for cell in cells(3, seed=2)]
    distances = distance_matrix([*x, *y])

    def energy(first, second):
        between, within, other = (
            distances[np.ix_(a, b)].mean() for a, b in ((first, second), (first, first), (second, second))
        )
        return 2 * between - within - other

    wanted = energy([0, 1, 2], [3, 4, 5])
    weights, _ = deals(3, 3, rng())
    statistic, p = energy_test(distances, weights)
    choices = [[*chosen] for chosen in itertools.combinations(range(6), 3)]
    reached = [energy(chosen, [i for i in range(6) if i not in chosen]) >= wanted - 1e-12 for chosen in choices]
    assert statistic == pytest.approx(wanted) and p == pytest.approx(np.mean(reached))

    paired = compare_paired(("a", "b"), x, y, rng())
    swaps = [
        [i + 3 if swap else i for i, swap in enumerate(pattern)] for pattern in itertools.product((0, 1), repeat=3)
    ]
    reached = [energy(chosen, [i for i in range(6) if i not in chosen]) >= wanted - 1e-12 for chosen in swaps]
    assert paired.energy == pytest.approx(wanted) and paired.p == pytest.approx(np.mean(reached)) and paired.exact


def test_random_exchanges_approach_all_of_them(monkeypatch):
    x, y = cells(6, seed=3), [dilated(cell, 3) for cell in cells(6, seed=4)]
    exact = compare_unpaired(("a", "b"), x, y, rng()), compare_paired(("a", "b"), x, y, rng())
    monkeypatch.setattr(topology_comparison, "EXHAUSTIVE", 0)
    drawn = compare_unpaired(("a", "b"), x, y, rng()), compare_paired(("a", "b"), x, y, rng())
    for one, other in zip(exact, drawn, strict=True):
        assert one.exact and not other.exact
        # 9,999 draws: four standard errors are 0.02.
        assert other.p == pytest.approx(one.p, abs=0.02)
        for a, b in zip(one.statistics, other.statistics, strict=True):
            assert b.p == pytest.approx(a.p, abs=0.02)


def test_p_is_never_zero(monkeypatch):
    """What was found counts as one of the draws."""
    monkeypatch.setattr(topology_comparison, "DRAWS", 99)
    comparison = compare_unpaired(("a", "b"), [dilated(cell) for cell in cells(20)], cells(20, seed=1), rng())
    assert not comparison.exact
    assert comparison.p == comparison.smallest_p == found(comparison, "dilated").p == 1 / 100


def test_holm():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.5])) == pytest.approx([1, 1])


def test_effect_sizes_by_hand():
    assert cliffs_delta(np.array([1.0, 2.0]), np.array([0.0, 1.0, 5.0])) == pytest.approx((3 - 2) / 6)
    x = [dilated(cells(1)[0], many) for many in (1, 4, 2)]
    y = [dilated(cells(1)[0], many) for many in (0, 2, 2)]
    share = [[cell_topology("", cell).statistics["dilated"] for cell in part] for part in (x, y)]
    pair = found(compare_paired(("a", "b"), x, y, rng()), "dilated")
    signs = np.sign(np.subtract(*share))
    assert pair.delta == pytest.approx(signs.mean()) and pair.delta != cliffs_delta(*map(np.array, share))
    assert (pair.first, pair.second) == pytest.approx((np.mean(share[0]), np.mean(share[1])))
    assert pair.difference == pytest.approx(np.mean(share[0]) - np.mean(share[1]))


# --- the level


def uniform(p):
    return stats.kstest(p, "uniform").pvalue > 0.01


def test_p_values_of_pairs_are_uniform_under_the_null():
    """Pairs that share a great effect of their architecture, and nothing else."""
    draw = rng(5)
    p = []
    for _ in range(400):
        shared = draw.normal(size=(10, 1)) * 10
        difference = (shared + draw.normal(size=(10, 1))) - (shared + draw.normal(size=(10, 1)))
        p.append(p_values(sign_flips(10, draw)[0] @ difference)[0])
    assert uniform(p)


@pytest.mark.parametrize(("n", "m", "exact"), [(5, 6, True), (8, 30, False)])
def test_p_values_of_labels_are_uniform_under_the_null(n, m, exact, monkeypatch):
    monkeypatch.setattr(topology_comparison, "DRAWS", 199)
    draw = rng(6)
    p = []
    for _ in range(400):
        weights, all_of_them = deals(n, m, draw)
        assert all_of_them == exact
        p.append(p_values(weights @ draw.exponential(size=(n + m, 1)))[0])
    assert uniform(p)


def test_global_test_is_uniform_under_the_null(monkeypatch):
    """Cells of one law, of which each comparison gets others: paired, and unpaired with unequal numbers."""
    monkeypatch.setattr(topology_comparison, "DRAWS", 199)
    pool = distance_matrix(cells(600, seed=7))
    draw = rng(8)
    paired, unpaired = [], []
    for _ in range(400):
        chosen = draw.choice(600, 20, replace=False)
        signs, _ = sign_flips(10, draw)
        distances = pool[np.ix_(chosen, chosen)]
        paired.append(energy_test(distances, np.concatenate([signs, -signs], axis=1) / 10)[1])
        unpaired.append(energy_test(distances, deals(6, 14, draw)[0])[1])
    assert uniform(paired) and uniform(unpaired)


def test_corrected_statistics_keep_their_level(monkeypatch):
    """Statistics of cells of one law, with all their ties: any is found different in at most 5 % of comparisons."""
    monkeypatch.setattr(topology_comparison, "DRAWS", 399)
    pool = statistics_of(cells(400, seed=9))
    draw = rng(10)
    hits = 0
    for _ in range(300):
        values = pool[draw.choice(400, 34, replace=False)]
        hits += holm(p_values(deals(10, 24, draw)[0] @ values)).min() <= 0.05
    # At a level of 5 % more than 25 of 300 come in 0.7 % of cases.
    assert hits <= 25


@pytest.mark.parametrize("n", [5, 9])
def test_intervals_cover_the_mean(n):
    """95 % of intervals should; plain percentiles of five values cover 83 %."""
    draw = rng(11)
    covered = 0
    for _ in range(500):
        values = draw.normal(size=n)
        low, high = mean_intervals(values[draw.integers(n, size=(400, n))].mean(1)[:, None], n)
        covered += low[0] <= 0 <= high[0]
    assert 0.92 <= covered / 500 <= 0.98


# --- the power


def test_planted_difference_is_found_in_its_statistics_alone():
    """Twelve pairs of one wiring, of which the second's operations are dilated: wiring is not reported."""
    first = cells(12, seed=12)
    comparison = compare_paired(("accurate", "robust"), first, [dilated(cell) for cell in first], rng())
    share = found(comparison, "dilated")
    assert share.p == 2 / 2**12 and share.p_holm == pytest.approx(10 * share.p) and share.delta == -1
    assert share.difference < share.high < 0 and share.low < share.difference
    assert comparison.p == 2 / 2**12
    for wiring in ("depth", "input edges", "antichain", "paths", "path length"):
        one = found(comparison, wiring)
        assert (one.p, one.difference, one.low, one.high) == (1, 0, 0, 0)
    assert "dilated (-" in comparison.verdict and "depth" not in comparison.verdict


def test_planted_difference_from_random_cells():
    comparison = compare_unpaired(("robust", "random"), [dilated(c) for c in cells(6, seed=13)], cells(100), rng())
    assert found(comparison, "dilated").p_holm <= 0.01 and comparison.p <= 0.001
    assert "robust against random: different in" in comparison.verdict


def test_pairs_see_what_labels_do_not():
    """A small shift inside pairs that differ much from one another."""
    base = rng(14).normal(size=(10, 1)) * 10
    shifted = base + 0.1 + rng(15).normal(size=(10, 1)) * 0.01
    assert p_values(sign_flips(10, rng())[0] @ (shifted - base))[0] == 2 / 2**10
    assert p_values(deals(10, 10, rng())[0] @ np.concatenate([shifted, base]))[0] > 0.5


def test_global_test_sees_wiring_that_no_statistic_shows():
    """Operations in the same numbers and places by every statistic, but another one feeds the other."""
    one = Cell(((Edge("sep_conv_3x3", 0), Edge("sep_conv_5x5", 1)), (Edge("sep_conv_3x3", 2), Edge("sep_conv_5x5", 0))))
    other = Cell(
        ((Edge("sep_conv_5x5", 0), Edge("sep_conv_3x3", 1)), (Edge("sep_conv_3x3", 2), Edge("sep_conv_5x5", 0)))
    )
    comparison = compare_paired(("accurate", "robust"), [one] * 10, [other] * 10, rng())
    assert {row.p for row in comparison.statistics} == {1.0} and comparison.p == 2 / 2**10
    assert comparison.verdict.endswith("different as whole cells, but in no single statistic")


# --- what is said


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9])
def test_too_few_to_tell(n):
    """Ten statistics: 10 * 2 / 2^8 = 0.078 for eight pairs, 0.039 for nine."""
    first = cells(n, seed=16)
    comparison = compare_paired(("accurate", "robust"), first, [dilated(cell) for cell in first], rng())
    assert len(STATISTICS) == 10 and comparison.enough == 9
    assert comparison.can_tell == (n >= 9)
    assert ("too few architectures to tell" in comparison.verdict) == (n < 9)
    assert ("give at least 9" in comparison.verdict) == (n < 9)
    # Six pairs are enough for whole cells.
    assert ("different as whole cells" in comparison.verdict) == (n in (8,))
    if n == 1:
        assert all(one.low is one.high is None for one in comparison.statistics)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_smallest_p_is_that_of_populations_wholly_apart(n, m):
    plain = [Cell(((Edge("sep_conv_3x3", 0), Edge("sep_conv_3x3", 1)),))] * m
    comparison = compare_unpaired(("a", "b"), [dilated(cell) for cell in cells(n)], plain, rng())
    assert found(comparison, "dilated").p == pytest.approx(comparison.smallest_p)


def test_as_many_as_asked_for_are_enough():
    """At the number that the verdict asks for, the most extreme outcome is told as different; at one less it is not."""
    rest = [dilated(cell, 0) for cell in cells(30, seed=17)]
    rest = [cell for cell in rest if all(edge.operation[:3] != "dil" for node in cell.nodes for edge in node)][:2]
    enough = compare_unpaired(("a", "b"), cells(1), rest, rng()).enough
    for n in (enough - 1, enough):
        comparison = compare_unpaired(("a", "b"), [dilated(cell) for cell in cells(n)], rest, rng())
        assert comparison.can_tell == (n == enough)
        assert (found(comparison, "dilated").p_holm <= 0.05) == (n == enough)


def test_nothing_found_is_not_called_equal():
    comparison = compare_unpaired(("accurate", "random"), cells(10, seed=18), cells(50, seed=19), rng())
    assert comparison.verdict == (
        "accurate against random: no difference found; differences within the intervals remain possible"
    )


# --- populations of architectures


def test_each_kind_against_the_other_and_against_random():
    searched = [load_genotype("arnas"), *genotypes(9, seed=20)]
    drawn = genotypes(20, seed=21)
    comparisons = compare_populations(searched, drawn, 0)
    assert [(one.first, one.second, one.paired) for one in comparisons] == [
        ("accurate", "robust", True),
        ("accurate", "random", False),
        ("robust", "random", False),
    ]
    assert [(one.n_first, one.n_second) for one in comparisons] == [(10, 10), (10, 20), (10, 20)]
    depths = [
        [cell_topology("", g.cell[kind]).depth for g in part]
        for kind, part in (("accurate", searched), ("robust", drawn))
    ]
    assert found(comparisons[1], "depth").first == pytest.approx(np.mean(depths[0]))
    assert found(comparisons[2], "depth").second == pytest.approx(np.mean(depths[1]))
    assert compare_populations(searched, drawn, 0) == comparisons
    assert compare_populations(searched, [], 0) == comparisons[:1]
    assert compare_populations(searched, drawn, 1)[1] != comparisons[1]


def test_one_kind_of_cell_is_compared_with_random_ones_only():
    searched = genotypes(3, space=darts.SPACE)
    assert compare_populations(searched, [], 0) == ()
    (only,) = compare_populations(searched, genotypes(5, seed=1, space=darts.SPACE), 0)
    assert (only.first, only.second) == ("normal", "random")


def test_populations_that_are_none():
    with pytest.raises(InputError, match="one layout"):
        compare_populations([*genotypes(2), *genotypes(1, space=darts.SPACE)], [], 0)
    with pytest.raises(InputError, match="2, 3"):
        compare_paired(("a", "b"), cells(2), cells(3), rng())
    with pytest.raises(InputError, match="0 and 3"):
        compare_unpaired(("a", "b"), [], cells(3), rng())
