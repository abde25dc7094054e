"""Simultaneous perturbation stochastic approximation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nas.attacks.nes import antithetic
from nas.attacks.queries import Oracle, ScoreBased, check_positive


@dataclass(frozen=True)
class Spsa(ScoreBased):
    """SPSA: the gradient estimated from pairs of opposite probes with random signs, followed by Adam.

    Uesato et al., ICML 2018, arXiv 1802.05666, algorithm 1, on the margin of the logits; iterates are projected. A step
    costs 2 ``pairs`` queries and one for the new image. delta is the size of a probe in every pixel and step_size
    Adam's learning rate, both in pixel units; step_size 0 means epsilon / 2. The paper is about l_inf; in other norms a
    step is brought down to that size, and NES is better. Probes may leave pixel bounds and ball by ``delta`` a pixel;
    only images within them count as found.
    """

    pairs: int = 20
    delta: float = 0.01
    step_size: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "pairs", "delta")

    @property
    def step(self) -> float:
        """The learning rate in force."""
        return self.step_size or self.threat_model.epsilon / 2

    def _spend(self, oracle: Oracle, margins: Tensor, generator: torch.Generator) -> Tensor:
        x_adv, rows, updates = oracle.x.clone(), oracle.unbroken, 0
        mean, square = torch.zeros_like(x_adv), torch.zeros_like(x_adv)
        while len(rows := rows[oracle.open(rows, cost=3)]):
            gradient = antithetic(oracle, x_adv[rows], rows, self.pairs, self.delta, signs, generator)
            updates += 1
            mean[rows] = 0.9 * mean[rows] + 0.1 * gradient
            square[rows] = 0.999 * square[rows] + 0.001 * gradient.square()
            rows = rows[oracle.open(rows)]
            scale = (square[rows] / (1 - 0.999**updates)).sqrt().clamp_min(torch.finfo(x_adv.dtype).tiny)
            # At most of unit size in the norm: in l_inf that is Adam's own step.
            direction = self.threat_model.geometry.shrink(mean[rows] / (1 - 0.9**updates) / scale, 1.0)
            x_adv[rows] = self.threat_model.project(x_adv[rows] + self.step * direction, oracle.x[rows])
            oracle.logits(x_adv[rows], rows)
        return x_adv

    def __str__(self) -> str:
        return (
            f"SPSA, {self.threat_model}, {self.queries} queries, {self.pairs} pairs, delta {self.delta:.6g}, "
            f"step {self.step:.6g}"
        )


def signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent random signs."""
    return torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


PLUGIN = Spsa
