"""Confidence intervals of accuracies."""

from __future__ import annotations

import math


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion; the default ``z`` gives 95 %. n must be above 0."""
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The ends are exact where rounding would put them beside the share itself.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)
