"""Synthetic studies whose law is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from nas.studies.observation import Observation

Truth = Callable[[tuple[int, ...], tuple[int, ...]], float]

DEPTHS = ((1, 2, 4), (1, 2, 4), (1, 2, 4))
WIDTHS = ((16, 32), (32, 64), (32, 64))


def study(
    truth: Truth,
    *,
    noise: float = 0.01,
    seeds: int = 3,
    seed: int = 0,
    depths: Sequence[Sequence[int]] = DEPTHS,
    widths: Sequence[Sequence[int]] = WIDTHS,
    space: str = "plain",
) -> list[Observation]:
    """All configurations; robust accuracy is the truth and noise of a training."""
    draws = np.random.default_rng(seed)
    found = []
    for d, w in itertools.product(itertools.product(*depths), itertools.product(*widths)):
        parts = tuple(9 * width**2 * depth for depth, width in zip(d, w, strict=True))
        for one in range(seeds):
            robust = float(np.clip(truth(d, w) + noise * draws.standard_normal(), 0, 1))
            found.append(
                Observation(
                    f"{d}{w}", space, d, w, sum(parts), 100 * sum(parts), parts, parts, one, 5, 0.9, robust, 400
                )
            )
    return found
