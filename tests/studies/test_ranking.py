"""Rank correlations against scipy, and intervals that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planted import study
from scipy.stats import kendalltau

from nas.studies.observation import Observation
from nas.studies.ranking import depth_share, factors, interval_of, rankings, table_of, tau_b, tau_draws


def test_tau_b_is_that_of_scipy_with_ties_and_repeated_points() -> None:
    draws = np.random.default_rng(0)
    for _ in range(20):
        x, y = draws.integers(0, 5, 12).astype(float), draws.integers(0, 6, 12).astype(float)
        assert tau_b(x, y) == pytest.approx(kendalltau(x, y).statistic)
        counts = draws.multinomial(12, np.full(12, 1 / 12))
        again = np.repeat(np.arange(12), counts)
        # Copies of one point are ties in both numbers.
        assert tau_draws(x, y, counts[None].astype(float))[0] == pytest.approx(kendalltau(x[again], y[again]).statistic)
    assert math.isnan(tau_b(np.ones(4), np.arange(4.0)))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draws, correlation, hits = np.random.default_rng(1), 0.6, 0
    truth = 2 / math.pi * math.asin(correlation)
    for seed in range(100):
        x = draws.standard_normal(60)
        y = correlation * x + math.sqrt(1 - correlation**2) * draws.standard_normal(60)
        low, high = interval_of(x, y, seed=seed)
        hits += low <= truth <= high
    assert 87 <= hits <= 99


def test_what_ranks_is_found_and_what_does_not_vary_is_left_out() -> None:
    found = rankings(study(lambda d, w: 0.3 + 0.02 * sum(d)), seed=0)
    assert found[0].name == "blocks" and found[0].tau > 0.8 and found[0].interval[0] > 0.5
    assert {one.n for one in found} == {216}
    names = [one.name for one in rankings(study(lambda d, w: 0.5, depths=((2,), (2,), (2,))), seed=0)]
    assert "blocks" not in names and "mean width" in names
    assert rankings([], seed=0) == []


def test_only_measures_that_all_have_are_ranked() -> None:
    two = study(lambda d, w: 0.5)[:6]
    measured = [Observation(**{**vars(one), "measures": {"a": 1.0, "b": 2.0}}) for one in two[:5]]
    measured.append(Observation(**{**vars(two[5]), "measures": {"a": 3.0}}))
    assert "a" in table_of(measured).columns and "b" not in table_of(measured).columns


def test_columns_of_a_study() -> None:
    table = table_of(study(lambda d, w: 0.1 * d[0], noise=0.0, seeds=2))
    assert table.deviation == 0 and table.freedom == 216 and table.robust[0] == pytest.approx(0.1)
    # WRN-34-10: factors 10, 10, 10; 15 of 45.
    wide = Observation("x", "residual", (5, 5, 5), (160, 320, 640), 1, 1, (1, 1, 2), (1, 1, 1), 0, 1, 0.9, 0.5, 10)
    assert list(factors(wide)) == [10, 10, 10] and depth_share(wide) == pytest.approx(15 / 45)
    assert wide.last_share == 0.5
