"""What an attack by queries achieves with how many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nas.attacks.queries import Attempt
from nas.errors import InputError
from nas.evaluation.interval import wilson

BUDGETS = (100, 500, 1000, 5000, 10000)


@dataclass(frozen=True)
class QueryCurve:
    """Success of an attack against the queries it may spend on a sample.

    n: samples;  natural: how many of them are right before the attack, which are those it is judged by.
    budgets: queries, ascending, the one for the clean image included;  broken: how many of the ``natural`` samples fall
    within each.  median: queries of the successes within the last budget, None where there are none.
    censored_mean: mean over all ``natural`` samples, where one that does not fall counts as the last budget: a lower
    bound of what breaking them all would take. None where nothing is right.
    """

    n: int
    natural: int
    budgets: tuple[int, ...]
    broken: tuple[int, ...]
    median: float | None
    censored_mean: float | None

    def to_data(self) -> dict[str, Any]:
        """The curve: at each budget the share that falls, with its 95 % interval, and the accuracy that is left."""
        return {
            "n": self.n,
            "natural": self.natural / self.n,
            "budgets": list(self.budgets),
            "success": [broken / self.natural if self.natural else None for broken in self.broken],
            "interval": [list(wilson(broken, self.natural)) if self.natural else None for broken in self.broken],
            "accuracy": [(self.natural - broken) / self.n for broken in self.broken],
            "median_queries": self.median,
            "censored_mean_queries": self.censored_mean,
        }


def query_curve(attempt: Attempt, budgets: Sequence[int] | None = None) -> QueryCurve:
    """The curve of an attempt at given ``budgets``: by default the usual ones it could spend, and all it could spend.

    One attempt tells all smaller budgets, as an attack that is allowed less does the same up to its last step, which
    some make shorter to spend all. Raises ``InputError`` for a budget beyond the attempt's.
    """
    if budgets is None:
        budgets = [budget for budget in BUDGETS if budget < attempt.budget] + [attempt.budget]
    budgets = sorted(set(budgets))
    if not budgets or budgets[0] < 1:
        raise InputError(f"query budgets must be at least 1, not {list(budgets)}")
    if budgets[-1] > attempt.budget:
        raise InputError(
            f"the attack was allowed {attempt.budget} queries and says nothing about {budgets[-1]}: "
            f"ask for at most {attempt.budget}, or set queries = {budgets[-1]}"
        )
    # The first query is that of the clean image.
    attacked: Tensor = attempt.broken_at[attempt.broken_at != 1]
    spent = attacked.masked_fill((attacked < 0) | (attacked > budgets[-1]), budgets[-1]).double()
    successes = attacked[(attacked > 0) & (attacked <= budgets[-1])].double()
    return QueryCurve(
        n=len(attempt.broken_at),
        natural=len(attacked),
        budgets=tuple(budgets),
        broken=tuple(int(((attacked > 0) & (attacked <= budget)).sum()) for budget in budgets),
        median=float(successes.quantile(0.5)) if len(successes) else None,
        censored_mean=float(spent.mean()) if len(attacked) else None,
    )
