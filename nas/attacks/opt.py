"""OPT: hard-label attack as the minimisation of the distance along a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.attacks.queries import DecisionBased, Oracle, check_positive, normal, per_image, portions, started
from nas.threat_model import Norm

LINE_SEARCH = 10
"""How often a step is doubled or halved at most."""


@dataclass(frozen=True)
class Opt(DecisionBased):
    """OPT: the distance to the boundary along a direction, minimised by random gradient-free descent.

    Cheng et al., ICLR 2019, arXiv 1807.04457, algorithms 1 and 2. g(theta) is the least lambda for which
    x + lambda theta, clipped to the pixel bounds, is misclassified; each value costs a search and a bisection. The
    gradient is the mean of (g(theta + beta u) - g(theta)) / beta u over ``directions`` random u of unit length, at
    right angles to theta, along which the slope is known. theta is kept on the unit sphere of the norm, and the step
    length is doubled while that helps or else halved. The paper is about l_2; other norms are this
    project's extension (steepest steps, theta brought back into the unit ball).
    tolerance: accuracy of g in the estimate, as a share of g.
    """

    directions: int = 10
    beta: float = 0.02
    step_size: float = 0.2
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "directions", "beta", "step_size", "tolerance")

    def _spend(self, oracle: Oracle, start: Tensor | None, generator: torch.Generator) -> None:
        rows, theta, radius = first_directions(oracle, start, generator, self.tolerance)

        def slopes(theta: Tensor, radius: Tensor, rows: Tensor) -> Tensor:
            return distance_slopes(oracle, rows, theta, radius, self.directions, self.beta, self.tolerance, generator)

        descend(oracle, rows, theta, radius, slopes, self.step_size, self.tolerance)

    def __str__(self) -> str:
        return (
            f"OPT, {self.threat_model}, {self.queries} queries, {self.directions} directions, beta {self.beta:.6g}, "
            f"step {self.step_size:.6g}, tolerance {self.tolerance:.6g}"
        )


def distance_slopes(
    oracle: Oracle,
    rows: Tensor,
    theta: Tensor,
    radius: Tensor,
    directions: int,
    beta: float,
    tolerance: float,
    generator: torch.Generator,
) -> Tensor:
    """An estimate [n, C, H, W] of the gradient, by ``theta``, of the lambda at which x + lambda theta is misclassified.

    Only what is at right angles to theta has to be estimated: lambda is inversely proportional to the length of theta,
    so its slope along theta is -lambda.
    """
    squared = per_image(theta.flatten(1).square().sum(1), theta)
    total = torch.zeros_like(theta)
    for several in portions(directions, len(rows)):
        u = normal((len(rows), several, *theta.shape[1:]), theta, generator)
        u = u - per_image((u * theta.unsqueeze(1)).flatten(2).sum(2), u) * (theta / squared).unsqueeze(1)
        u = u / per_image(u.flatten(2).norm(dim=2).clamp_min(torch.finfo(u.dtype).tiny), u)
        found = boundary_radius(oracle, rows, theta.unsqueeze(1) + beta * u, radius, tolerance)
        slope = (found - radius.unsqueeze(1)) / beta
        total += (per_image(slope.where(slope.isfinite(), 0), u) * u).sum(1)
    # u is uniform on the unit sphere at right angles to theta: the mean of u u^T is the identity over its dimension.
    return total * max(theta[0].numel() - 1, 1) / directions - per_image(radius, theta) * theta / squared


def first_directions(
    oracle: Oracle, start: Tensor | None, generator: torch.Generator, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the samples that have a start, unit directions [n, C, H, W] to it and distances [n] to the boundary."""
    rows = started(oracle, start, generator)
    delta = oracle.nearest[rows] - oracle.x[rows]
    size = oracle.threat_model.geometry.size(delta)
    theta = delta / per_image(size, delta)
    found = boundary_radius(oracle, rows, theta.unsqueeze(1), size, tolerance, nearer=True).squeeze(1)
    return rows, theta, torch.minimum(found, size)


def boundary_radius(
    oracle: Oracle, rows: Tensor, theta: Tensor, guess: Tensor, tolerance: float, *, nearer: bool = False
) -> Tensor:
    """Distances [n, k] to the boundary along directions ``theta`` [n, k, C, H, W], near ``guess`` [n].

    Steps of 1, 2, 4 ... % of the guess find a bracket, which is bisected down to ``tolerance`` of the guess; a distance
    is its outer end, which was misclassified. With ``nearer``, those beyond the guess are given up at once (infinity).
    """
    guess = guess.unsqueeze(1).expand(theta.shape[:2])

    def misclassified(radius: Tensor, asked: Tensor) -> Tensor:
        images = oracle.x[rows].unsqueeze(1) + per_image(radius, theta) * theta
        images = images.clamp(oracle.threat_model.lower, oracle.threat_model.upper)
        return oracle.misclassified(images, rows, asked & oracle.open(rows).unsqueeze(1))

    inwards = misclassified(guess, torch.ones_like(guess, dtype=torch.bool))
    low, high = torch.where(inwards, 0, guess), torch.where(inwards, guess, torch.inf)
    pending, step = inwards if nearer else torch.ones_like(inwards), 0.01
    while bool(pending.any()) and step < 1:
        radius = torch.where(inwards, guess * (1 - step), guess * (1 + step))
        wrong = misclassified(radius, pending)
        high = torch.where(pending & wrong, radius, high)
        low = torch.where(pending & ~wrong, radius, low)
        pending, step = pending & (wrong == inwards), 2 * step
    while bool((pending := high.isfinite() & (high - low > tolerance * guess) & oracle.open(rows).unsqueeze(1)).any()):
        middle = (low + high) / 2
        wrong = misclassified(middle, pending)
        high = torch.where(pending & wrong, middle, high)
        low = torch.where(pending & ~wrong, middle, low)
    return high


def descend(
    oracle: Oracle,
    rows: Tensor,
    theta: Tensor,
    radius: Tensor,
    slopes: Callable[[Tensor, Tensor, Tensor], Tensor],
    step_size: float,
    tolerance: float,
) -> None:
    """Spend the budget on shorter and shorter distances ``radius`` [n] along unit directions ``theta`` [n, C, H, W].

    slopes: (theta, radius, rows) -> an estimate of the gradient of the distance by theta, up to a factor.
    """
    geometry = oracle.threat_model.geometry
    step = torch.full_like(radius, step_size)
    while True:
        kept = oracle.open(rows)
        rows, theta, radius, step = rows[kept], theta[kept], radius[kept], step[kept]
        if len(rows) == 0:
            return
        downhill = -geometry.steepest(slopes(theta, radius, rows))
        best, best_step = theta, torch.zeros_like(step)
        for factor in (2.0, 0.5):  # longer while that helps; shorter until it does, where nothing helped
            trying, length = best_step == 0, step if factor > 1 else step / 2
            for _ in range(LINE_SEARCH):
                trying = trying & oracle.open(rows)
                if not bool(trying.any()):
                    break
                trial = _unit(theta + per_image(length, theta) * downhill, geometry)
                found = torch.full_like(radius, torch.inf)
                found[trying] = boundary_radius(
                    oracle, rows[trying], trial[trying].unsqueeze(1), radius[trying], tolerance, nearer=True
                ).squeeze(1)
                helps = found < radius
                radius = torch.where(helps, found, radius)
                best = torch.where(per_image(helps, best), trial, best)
                best_step = torch.where(helps, length, best_step)
                trying = trying & (helps if factor > 1 else ~helps)
                length = length * factor
        theta = best
        step = torch.where(best_step > 0, best_step, step_size)


def _unit(theta: Tensor, geometry: Norm) -> Tensor:
    theta = geometry.shrink(theta, 1.0)
    return theta / per_image(geometry.size(theta).clamp_min(torch.finfo(theta.dtype).tiny), theta)


PLUGIN = Opt
