"""Claims: supported where they are true, contradicted where they are false, and seldom called true by chance."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from planted import study

from nas.studies.claims import CLAIMS, LEAST, Claim, _holm, claims
from nas.studies.verdict import study_verdict

SMALL: dict[str, Any] = {"depths": ((1, 2), (1, 2), (1, 2)), "widths": ((16, 32), (32, 64), (32, 64))}
LARGER, LAST, INTERIOR, SHARE, DEPTHS, WIDTHS, DEPTH, WIDTH, RATIO = range(9)


def size(d: tuple[int, ...], w: tuple[int, ...]) -> float:
    return math.log2(sum(9 * width**2 * depth for depth, width in zip(d, w, strict=True)))


def share(d: tuple[int, ...], w: tuple[int, ...]) -> float:
    return sum(d) / (sum(d) + sum(width / base for width, base in zip(w, (16, 32, 64), strict=True)))


def stage(d: tuple[int, ...], w: tuple[int, ...], index: int) -> float:
    return math.log2(9 * w[index] ** 2 * d[index])


def verdicts(truth: Any, **more: Any) -> list[Claim]:
    return claims(study(truth, **more), seed=0)


def test_there_is_a_place_for_every_claim() -> None:
    assert len(CLAIMS) == RATIO + 1


@pytest.mark.parametrize(
    ("claim", "true", "false"),
    [
        (LARGER, lambda d, w: 0.5 - 0.03 * (w[2] == 64), lambda d, w: 0.02 * size(d, w)),
        (
            LAST,
            lambda d, w: 0.3 + 0.02 * stage(d, w, 0) + 0.001 * stage(d, w, 2),
            lambda d, w: 0.3 + 0.001 * stage(d, w, 0) + 0.02 * stage(d, w, 2),
        ),
        (INTERIOR, lambda d, w: 0.6 - 3 * (share(d, w) - 0.6) ** 2, lambda d, w: 0.3 + 0.3 * share(d, w)),
        (SHARE, lambda d, w: 0.6 - 3 * (share(d, w) - 0.7) ** 2, lambda d, w: 0.6 - 3 * (share(d, w) - 0.45) ** 2),
        (
            DEPTHS,
            lambda d, w: 0.6 - 0.2 * np.abs(np.array(d) / sum(d) - np.array([0.4, 0.4, 0.2])).sum(),
            lambda d, w: 0.4 + 0.2 * np.abs(np.array(d) / sum(d) - np.array([0.4, 0.4, 0.2])).sum(),
        ),
        (
            WIDTHS,
            lambda d, w: 0.5 - 0.1 * (w[0] == 16) - 0.1 * (w[1] == 32) + 0.1 * (w[2] == 32),
            lambda d, w: 0.5 + 0.1 * (w[0] == 32) + 0.1 * (w[1] == 32),
        ),
        (DEPTH, lambda d, w: 0.5, lambda d, w: 0.3 + 0.03 * sum(d)),
        (WIDTH, lambda d, w: 0.5, lambda d, w: 0.3 + 0.001 * sum(w)),
        (
            RATIO,
            lambda d, w: 0.5 + 0.05 * (7.5 <= (w[0] / d[0] + w[1] / d[1]) / 2 <= 13.5),
            lambda d, w: 0.5 - 0.05 * (7.5 <= (w[0] / d[0] + w[1] / d[1]) / 2 <= 13.5),
        ),
    ],
)
def test_true_claims_are_supported_and_false_ones_contradicted(claim: int, true: Any, false: Any) -> None:
    supported, contradicted = verdicts(true, noise=0.004)[claim], verdicts(false, noise=0.004)[claim]
    assert supported.verdict == "supported", supported
    assert contradicted.verdict == "contradicted", contradicted
    for one in (supported, contradicted):
        assert one.effect is not None and one.interval is not None
        assert one.interval[0] <= one.effect <= one.interval[1] and math.isfinite(one.effect)
        assert json.loads(json.dumps(one.to_data()))["verdict"] == one.verdict


def test_without_any_law_differences_are_seldom_supported() -> None:
    """Family-wise: at most 5 % of studies of noise support any claim of a difference."""
    wrong = 0
    for seed in range(40):
        found = claims(study(lambda d, w: 0.5, noise=0.03, seed=seed, **SMALL), seed=seed)
        wrong += any(found[i].verdict == "supported" for i in (LARGER, LAST, INTERIOR, SHARE, DEPTHS, WIDTHS, RATIO))
    # 6 of 40 would come by chance once in a hundred times.
    assert wrong < 6


def test_what_cannot_be_tested_says_why() -> None:
    few = claims(study(lambda d, w: 0.5)[: 3 * (LEAST - 1)], seed=0)
    assert {one.verdict for one in few} == {"cannot be tested"} and "fewer than" in few[0].how
    assert all(one.effect is None and one.interval is None for one in few + claims([], seed=0))
    two = claims(study(lambda d, w: 0.5, depths=((1, 2, 3, 4), (1, 2)), widths=((8, 16), (16, 32))), seed=0)
    assert "3 stages" in two[DEPTHS].how and two[LAST].verdict != "cannot be tested"
    same = claims(study(lambda d, w: 0.5, depths=((1,), (1,), (1,)), widths=((8, 16, 32),) * 3), seed=0)
    assert "does not vary" in same[DEPTH].how
    cells = claims(study(lambda d, w: 0.5, space="dsara"), seed=0)
    assert "not of cells" in cells[WIDTHS].how
    # Between single trainings nothing tells a difference from chance; over many configurations a slope still may.
    alone = claims(study(lambda d, w: 0.5, seeds=1), seed=0)
    assert "one seed" in alone[LARGER].how and alone[LAST].verdict == "not supported by this data"


def test_holm_by_hand() -> None:
    assert _holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert _holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and _holm([]) == []


def test_the_verdict_in_three_lines() -> None:
    shapes = (((2, 2, 1), (8, 16, 8), 900, 0.6), ((1, 1, 1), (8, 8, 8), 300, 0.58), ((1, 1, 1), (4, 4, 4), 100, 0.4))
    configurations = [
        {
            "depths": depths, "widths": widths, "parameters": parameters, "robust": robust, "natural": 0.9,
            "interval": [robust - 0.03, robust + 0.03],
        }
        for depths, widths, parameters, robust in shapes
    ]  # fmt: skip
    found = verdicts(lambda d, w: 0.5 - 0.03 * (w[2] == 64), noise=0.004)
    lines = study_verdict(configurations, found, [])
    assert lines[0].startswith("Best of 3: depths 2-2-1, widths 8-16-8 (900 parameters), worst case 60.0% [57.0, 63.0]")
    assert "1 others overlap with it; the smallest has 300 parameters" in lines[0]
    assert "supported: More parameters do not necessarily" in lines[1]
    assert study_verdict([], [], []) == ["No trial is finished: nothing can be said yet."]
