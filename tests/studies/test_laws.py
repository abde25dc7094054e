"""Fits recover the laws that were planted, and their intervals hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from planted import study

from nas.studies.laws import LEAST, laws
from nas.studies.ranking import table_of


def share_of(d: tuple[int, ...], w: tuple[int, ...]) -> float:
    widening = sum(width / base for width, base in zip(w, (16, 32, 64), strict=True))
    return sum(d) / (sum(d) + widening)


def test_an_optimum_inside_is_found_where_it_is_at_any_size() -> None:
    def truth(d: tuple[int, ...], w: tuple[int, ...]) -> float:
        size = math.log2(sum(9 * width**2 * depth for depth, width in zip(d, w, strict=True)))
        return 0.5 + 0.02 * size - 3.0 * (share_of(d, w) - 0.65) ** 2

    law = next(one for one in laws(study(truth, noise=0.005), seed=0) if one.name == "depth share")
    assert law.optimum == pytest.approx(0.65, abs=0.01) and law.inside
    assert law.optimum_interval is not None and law.optimum_interval[0] < 0.65 < law.optimum_interval[1]
    assert law.optimum_interval[1] - law.optimum_interval[0] < 0.05
    assert law.x[int(np.argmax(law.y))] == pytest.approx(0.65, abs=0.02)


def test_what_only_rises_has_no_optimum_inside() -> None:
    found = {one.name: one for one in laws(study(lambda d, w: 0.3 + 0.03 * sum(d)), seed=0)}
    blocks = found["blocks"]
    assert blocks.slope == pytest.approx(0.03, abs=0.003) and not blocks.inside
    assert blocks.slope_interval[0] < 0.03 < blocks.slope_interval[1]


def test_slopes_are_at_equal_size() -> None:
    """Robust by its parameters alone: depth counts for nothing once size is held equal."""

    def truth(d: tuple[int, ...], w: tuple[int, ...]) -> float:
        return 0.1 + 0.04 * math.log2(sum(9 * width**2 * depth for depth, width in zip(d, w, strict=True)))

    found = {one.name: one for one in laws(study(truth, noise=0.002), seed=0)}
    assert found["parameters"].slope == pytest.approx(0.04, abs=0.001)
    low, high = found["blocks"].slope_interval
    assert low < 0 < high and abs(found["blocks"].slope) < 0.001


def test_intervals_of_slopes_hold_the_truth_about_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        # Configurations differ by more than their seeds do: they are what is sampled.
        own = {d: 0.03 * draws.standard_normal() for d in range(1000)}
        planted = study(
            lambda d, w, own=own: 0.4 + 0.01 * sum(d) + own[hash((d, w)) % 1000], seed=seed, seeds=1,
            depths=((1, 2, 3), (1, 2), (1, 2)), widths=((16, 32), (32,), (32, 64)),
        )  # fmt: skip
        found = laws(planted, seed=seed)
        low, high = next(one for one in found if one.name == "blocks").slope_interval
        hits += low <= 0.01 <= high
    assert 50 <= hits <= 60


def test_bands_hold_the_fit_and_nothing_is_fitted_to_little() -> None:
    found = laws(study(lambda d, w: 0.5), seed=0)
    for law in found:
        assert all(low <= y <= high for low, y, high in zip(law.low, law.y, law.high, strict=True))
        assert json.loads(json.dumps(law.to_data()))["n"] == 216
    few = study(lambda d, w: 0.5, seeds=1)[: LEAST - 1]
    assert laws(few, seed=0) == [] == laws([], seed=0)
    assert "depth share" in table_of(few).columns
