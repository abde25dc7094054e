"""Natural evolution strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.attacks.queries import Oracle, ScoreBased, check_positive, normal, per_image, portions


@dataclass(frozen=True)
class Nes(ScoreBased):
    """NES: the gradient estimated from pairs of opposite random probes, then projected steepest-ascent steps.

    Ilyas et al., ICML 2018, arXiv 1804.08598, section 2.1, untargeted on the margin of the logits: with u ~ N(0, I),
    g = 1 / (2 pairs sigma) sum u (L(x + sigma u) - L(x - sigma u)). A step costs 2 ``pairs`` queries and one for the
    new image. Probes may leave pixel bounds and ball by about ``sigma``; only images within them count as found.
    sigma and step_size are in pixel units; step_size 0 means epsilon / 4. momentum is that of the estimate.
    """

    pairs: int = 20
    sigma: float = 0.01
    step_size: float = 0.0
    momentum: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "pairs", "sigma")

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or self.threat_model.epsilon / 4

    def _spend(self, oracle: Oracle, margins: Tensor, generator: torch.Generator) -> Tensor:
        threat_model, x_adv = self.threat_model, oracle.x.clone()
        velocity = torch.zeros_like(x_adv)
        rows = oracle.unbroken
        while len(rows := rows[oracle.open(rows, cost=3)]):
            gradient = antithetic(oracle, x_adv[rows], rows, self.pairs, self.sigma, normal, generator)
            velocity[rows] = self.momentum * velocity[rows] + (1 - self.momentum) * gradient
            rows = rows[oracle.open(rows)]
            step = self.step * threat_model.geometry.steepest(velocity[rows])
            x_adv[rows] = threat_model.project(x_adv[rows] + step, oracle.x[rows])
            oracle.logits(x_adv[rows], rows)
        return x_adv

    def __str__(self) -> str:
        return (
            f"NES, {self.threat_model}, {self.queries} queries, {self.pairs} pairs, sigma {self.sigma:.6g}, "
            f"step {self.step:.6g}, momentum {self.momentum:.6g}"
        )


def antithetic(
    oracle: Oracle,
    points: Tensor,
    rows: Tensor,
    pairs: int,
    sigma: float,
    draw: Callable[[tuple[int, ...], Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Gradient [n, C, H, W] of the margin at ``points``, from ``pairs`` opposite probes of directions ``draw``.

    Fewer of them where not all can be paid and one query is to be left. Directions have independent components of mean
    0 and variance 1: on a linear model the expectation is the gradient, whatever sigma.
    """
    # All samples of an attack that uses this have spent alike.
    pairs = min(pairs, (int(oracle.left(rows).min()) - 1) // 2)
    gradient = torch.zeros_like(points)
    for several in portions(pairs, 2 * len(rows)):
        u = draw((len(rows), several, *points.shape[1:]), points, generator)
        probes = torch.stack([points.unsqueeze(1) + sigma * u, points.unsqueeze(1) - sigma * u], 2)
        margins = oracle.margins(probes.flatten(1, 2), rows).unflatten(1, (several, 2))
        slope = (margins[:, :, 0] - margins[:, :, 1]) / (2 * sigma)
        gradient += (per_image(slope, u) * u).sum(1)
    return gradient / pairs


PLUGIN = Nes
