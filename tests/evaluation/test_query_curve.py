"""Query curves: by hand, and against attacks that really are allowed less."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from nas.attacks.queries import Attempt
from nas.attacks.rays import RayS
from nas.attacks.simba import Simba
from nas.errors import InputError
from nas.evaluation.interval import wilson
from nas.evaluation.query_curve import query_curve
from nas.threat_model import ThreatModel


def _attempt(broken_at, budget=1000):
    broken_at = torch.tensor(broken_at)
    queries = torch.where(broken_at > 0, broken_at, budget)
    return Attempt(torch.zeros(len(broken_at), 1, 2, 2), queries, broken_at, budget)


def test_the_numbers_are_those_worked_out_by_hand():
    curve = query_curve(_attempt([1, 40, -1, 100, 900, -1, 1, 10]), [100, 10, 500, 1000])
    assert (curve.n, curve.natural) == (8, 6)
    assert curve.budgets == (10, 100, 500, 1000)
    assert curve.broken == (1, 3, 3, 4)
    assert curve.median == 70, "of 10, 40, 100 and 900"
    assert curve.censored_mean == pytest.approx((40 + 1000 + 100 + 900 + 1000 + 10) / 6)
    data = curve.to_data()
    assert data["accuracy"] == [5 / 8, 3 / 8, 3 / 8, 2 / 8]
    assert data["success"] == [1 / 6, 3 / 6, 3 / 6, 4 / 6]
    assert data["interval"][1] == list(wilson(3, 6))


def test_what_comes_after_the_last_budget_is_censored():
    curve = query_curve(_attempt([40, 900, -1]), [100])
    assert curve.broken == (1,)
    assert curve.median == 40
    assert curve.censored_mean == pytest.approx((40 + 100 + 100) / 3)


def test_nothing_right_and_nothing_broken_give_no_numbers():
    assert query_curve(_attempt([-1, -1])).median is None
    curve = query_curve(_attempt([1, 1]))
    assert curve.natural == 0
    assert curve.censored_mean is None
    assert curve.to_data()["success"] == [None] * 3


def test_default_budgets_end_with_what_was_allowed():
    assert query_curve(_attempt([-1], budget=700)).budgets == (100, 500, 700)
    assert query_curve(_attempt([-1], budget=20000)).budgets == (100, 500, 1000, 5000, 10000, 20000)


def test_budgets_that_cannot_be_told_are_refused():
    with pytest.raises(InputError, match="queries = 2000"):
        query_curve(_attempt([-1]), [2000])
    with pytest.raises(InputError, match="at least 1"):
        query_curve(_attempt([-1]), [0, 10])


@pytest.mark.parametrize("attack", [Simba(ThreatModel("linf", 0.3)), RayS(ThreatModel("linf", 0.3))], ids=str)
def test_one_attempt_tells_what_smaller_ones_would(attack):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.rand(12, 1, 6, 6, dtype=torch.float64)
    y = model(x).argmax(1)
    budgets = (2, 10, 40, 200)

    def attempt(queries):
        return replace(attack, queries=queries).attempt(model, x, y, generator=torch.Generator().manual_seed(0))

    curve = query_curve(attempt(200), budgets)
    assert curve.broken == tuple(int((attempt(budget).broken_at > 0).sum()) for budget in budgets)
    assert curve.broken[-1] > 0
