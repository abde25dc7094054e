"""Wilson's interval against the test it inverts."""

import math

import pytest
from scipy.optimize import brentq

from nas.evaluation.interval import wilson

Z = 1.959963984540054
CASES = [(s, n) for n in (1, 2, 5, 10, 100, 997) for s in sorted({0, 1, n // 3, n // 2, n - 1, n})]


@pytest.mark.parametrize(("successes", "n"), CASES)
def test_the_interval_holds_the_proportions_the_score_test_does_not_reject(successes, n):
    """The ends are where |share - p| = z sqrt(p (1 - p) / n); at 0 or n successes one end is the end of the range."""

    def statistic(p):
        return abs(successes / n - p) - Z * math.sqrt(p * (1 - p) / n)

    low, high = wilson(successes, n)
    share = successes / n
    expected_low = 0.0 if successes == 0 else brentq(statistic, 0, share - 1e-15, xtol=1e-14)
    expected_high = 1.0 if successes == n else brentq(statistic, share + 1e-15, 1, xtol=1e-14)
    assert low == pytest.approx(expected_low, abs=1e-9)
    assert high == pytest.approx(expected_high, abs=1e-9)
    assert 0 <= low <= share <= high <= 1
    for p in (low + (high - low) * i / 50 for i in range(1, 50)):
        assert statistic(p) < 1e-12, "inside, nothing is rejected"


def test_it_is_symmetric_shrinks_with_n_and_grows_with_confidence():
    low, high = wilson(30, 100)
    other_low, other_high = wilson(70, 100)
    assert (low, high) == (pytest.approx(1 - other_high), pytest.approx(1 - other_low))
    assert wilson(300, 1000)[1] - wilson(300, 1000)[0] < high - low
    wider = wilson(30, 100, z=2.58)
    assert wider[0] < low
    assert wider[1] > high
