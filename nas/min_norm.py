"""The min-norm point of two gradients: a direction along which both objectives fall."""

from __future__ import annotations

import torch
from torch import Tensor


def min_norm_weight(u1: Tensor, u2: Tensor) -> float:
    """The gamma in [0, 1] for which ``gamma u1 + (1 - gamma) u2`` is shortest.

    Closed form of the multiple-gradient descent algorithm for two objectives (Desideri, 2012; Sener and Koltun,
    NeurIPS 2018, arXiv 1810.04650, eq. 4). For u1 = u2 every gamma is optimal; 0.5 is returned (the released
    ARNAS code divides 0 by 0 there). Computed in float64.
    """
    first, second = u1.double().flatten(), u2.double().flatten()
    difference = second - first
    squared = torch.dot(difference, difference)
    if squared == 0:
        return 0.5
    return float((torch.dot(difference, second) / squared).clamp(0.0, 1.0))


def min_norm_direction(u1: Tensor, u2: Tensor) -> tuple[Tensor, float]:
    """The shortest convex combination d of two gradients, and gamma.

    d.u1 >= |d|^2 and d.u2 >= |d|^2: a small step against d lowers both objectives, and d = 0 only where no
    direction does (a Pareto-stationary point).
    """
    gamma = min_norm_weight(u1, u2)
    return gamma * u1 + (1 - gamma) * u2, gamma
