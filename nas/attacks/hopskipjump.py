"""HopSkipJump."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.attacks.queries import (
    DecisionBased,
    Oracle,
    check_positive,
    normal,
    per_image,
    portions,
    started,
    to_boundary,
)

RESERVE = 16
"""Queries an estimate leaves for the step and the bisection that follow."""


@dataclass(frozen=True)
class HopSkipJump(DecisionBased):
    """HopSkipJump: at the boundary, the direction of the gradient from decisions alone; a step; back to the boundary.

    Chen, Jordan & Wainwright, IEEE S&P 2020, arXiv 1904.02144, algorithm 2. At step t it asks about
    ``evaluations`` sqrt(t) probes around the image, at the l_2 distance of that over the number d of pixels; their
    decisions less their mean weigh the directions. The first step tried has size distance / sqrt(t) and is halved
    until the image is misclassified. Bisections end within d^-1.5 of the distance; in l_inf the paper is finer by
    sqrt(d) in both, here all norms are treated alike.
    """

    evaluations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "evaluations")

    def _spend(self, oracle: Oracle, start: Tensor | None, generator: torch.Generator) -> None:
        threat_model, size = self.threat_model, oracle.x[0].numel()
        tolerance = max(size**-1.5, 8 * torch.finfo(oracle.x.dtype).eps)
        rows = started(oracle, start, generator)
        point = oracle.nearest.clone()
        point[rows] = to_boundary(oracle, rows, point[rows], tolerance)
        step = 0
        while len(rows := rows[oracle.open(rows, cost=RESERVE + 2)]):
            step += 1
            probes = (oracle.left(rows) - RESERVE).clamp_max(int(self.evaluations * math.sqrt(step)))
            away = (point[rows] - oracle.x[rows]).flatten(1).norm(dim=1) / size
            gradient = direction(oracle, point[rows], rows, probes, away, generator)
            length = threat_model.distance(point[rows], oracle.x[rows]) / math.sqrt(step)
            point[rows] = self._stepped(oracle, point[rows], rows, threat_model.geometry.steepest(gradient), length)
            point[rows] = to_boundary(oracle, rows, point[rows], tolerance)

    def _stepped(self, oracle: Oracle, points: Tensor, rows: Tensor, steepest: Tensor, length: Tensor) -> Tensor:
        """The first misclassified of ever shorter steps, or ``points`` where there is none."""
        pending = torch.ones_like(length, dtype=torch.bool)
        for _ in range(RESERVE):
            pending = pending & oracle.open(rows)
            if not bool(pending.any()):
                break
            lower, upper = self.threat_model.lower, self.threat_model.upper
            candidates = (points + per_image(length, points) * steepest).clamp(lower, upper)
            wrong = oracle.misclassified(candidates, rows, pending)
            points = torch.where(per_image(wrong, points), candidates, points)
            pending, length = pending & ~wrong, length / 2
        return points

    def __str__(self) -> str:
        return f"HopSkipJump, {self.threat_model}, {self.queries} queries, {self.evaluations} probes at the first step"


def direction(
    oracle: Oracle, points: Tensor, rows: Tensor, probes: Tensor, away: Tensor, generator: torch.Generator
) -> Tensor:
    """Estimates [n, C, H, W] of the direction in which the margin rises at ``points`` on the boundary.

    probes: [n], how many images each sample is asked about;  away: [n], their l_2 distance from the points.
    Equation 16 of the paper: sum (phi_i - mean phi) u_i with decisions phi = 1 or -1 and u_i uniform on the
    unit sphere, as far as the pixel bounds allow.
    """
    lower, upper = oracle.threat_model.lower, oracle.threat_model.upper
    weighted, total, decided = torch.zeros_like(points), torch.zeros_like(points), torch.zeros_like(away)
    left = probes
    for several in portions(int(probes.max()), len(rows)):
        u = normal((len(rows), several, *points.shape[1:]), points, generator)
        u = u / per_image(u.flatten(2).norm(dim=2), u)
        images = (points.unsqueeze(1) + per_image(away.unsqueeze(1), u) * u).clamp(lower, upper)
        u = (images - points.unsqueeze(1)) / per_image(away.unsqueeze(1), u)
        asked = torch.arange(several, device=rows.device) < left.unsqueeze(1)
        phi = 2 * oracle.misclassified(images, rows, asked & oracle.open(rows).unsqueeze(1)).to(points.dtype) - 1
        weighted += (per_image(phi * asked, u) * u).sum(1)
        total += (per_image(asked, u) * u).sum(1)
        decided += (phi * asked).sum(1)
        left = left - several
    mean = decided / probes
    # Where all decisions agree, the mean would take all there is.
    return weighted - per_image(torch.where(mean.abs() < 1, mean, 0), points) * total


PLUGIN = HopSkipJump
