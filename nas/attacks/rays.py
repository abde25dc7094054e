"""Ray searching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nas.attacks.queries import START_TRIES, DecisionBased, Oracle, check_positive, noise
from nas.errors import InputError


@dataclass(frozen=True)
class RayS(DecisionBased):
    """RayS: the corner of the l_inf ball along which the boundary is nearest, by flipping ever smaller blocks of signs.

    Chen & Gu, KDD 2020, arXiv 2006.12792, algorithms 2 and 3. Of the signs of all pixels one of 1, 2, 4, 8 ... blocks
    after the other is flipped, one query each at the least radius so far; where the image still is misclassified the
    flip stays and the radius is bisected to ``tolerance`` pixel units. It begins with all signs up, or those that
    lead to a start image, and where the far end of these is not misclassified with random ones (this project's
    addition: with pixel bounds there is a farthest image). After single pixels it begins anew; a sample for which none
    of all flips helps is done.
    """

    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "tolerance")
        if self.threat_model.norm != "linf":
            raise InputError(f"rays searches corners of linf balls, not {self.threat_model.norm}: set norm = 'linf'")

    def _spend(self, oracle: Oracle, start: Tensor | None, generator: torch.Generator) -> None:
        signs = torch.ones_like(oracle.x) if start is None else torch.where(start < oracle.x, -1.0, 1.0).to(oracle.x)
        signs = signs.flatten(1)
        # Nothing is farther than this: every pixel is at a bound.
        radius = torch.full_like(oracle.distance, self.threat_model.upper - self.threat_model.lower)
        rows = torch.arange(len(signs), device=signs.device)
        rows = rows[oracle.open(rows)]
        helped = torch.zeros_like(radius, dtype=torch.bool)
        self._try(oracle, rows, signs, radius, signs[rows], helped)
        for attempt in range(START_TRIES):
            missing = rows[oracle.open(rows) & oracle.distance[rows].isinf()]
            if len(missing) == 0:
                break
            corners = noise(oracle, missing, attempt, generator, grey=False).flatten(1)
            upwards = corners > (self.threat_model.lower + self.threat_model.upper) / 2
            self._try(oracle, missing, signs, radius, 2 * upwards.to(signs.dtype) - 1, helped)
        while len(rows):
            helped = torch.zeros_like(radius, dtype=torch.bool)
            for block in blocks(signs.shape[1]):
                rows = rows[oracle.open(rows)]
                if len(rows) == 0:
                    return
                flipped = signs[rows]
                flipped[:, block] *= -1
                self._try(oracle, rows, signs, radius, flipped, helped)
            rows = rows[helped[rows]]

    def _try(self, oracle: Oracle, rows: Tensor, signs: Tensor, radius: Tensor, trial: Tensor, helped: Tensor) -> None:
        """Take ``trial`` [n, C * H * W] where it is misclassified at the radius of its sample, in place."""
        wrong = self._misclassified(oracle, rows, trial, radius[rows])
        rows, trial = rows[wrong], trial[wrong]
        low, high = torch.zeros_like(radius[rows]), radius[rows]
        while bool((asked := oracle.open(rows) & (high - low > self.tolerance)).any()):
            middle = (low + high) / 2
            wrong = self._misclassified(oracle, rows, trial, middle, asked)
            high = torch.where(asked & wrong, middle, high)
            low = torch.where(asked & ~wrong, middle, low)
        helped[rows] |= high < radius[rows]
        signs[rows], radius[rows] = trial, high

    def _misclassified(
        self, oracle: Oracle, rows: Tensor, signs: Tensor, radius: Tensor, asked: Tensor | None = None
    ) -> Tensor:
        x = oracle.x[rows]
        images = (x + radius.view(-1, 1, 1, 1) * signs.view_as(x)).clamp(
            oracle.threat_model.lower, oracle.threat_model.upper
        )
        return oracle.misclassified(images, rows, asked)

    def __str__(self) -> str:
        return f"RayS, {self.threat_model}, {self.queries} queries, tolerance {self.tolerance:.6g}"


def blocks(size: int) -> Iterator[slice]:
    """1, 2, 4 ... blocks of nearly equal length of ``size`` pixels, then each pixel by itself."""
    count = 1
    while True:
        edges = [number * size // count for number in range(count + 1)]
        yield from (slice(low, high) for low, high in pairwise(edges))
        if count == size:
            return
        count = min(2 * count, size)


PLUGIN = RayS
