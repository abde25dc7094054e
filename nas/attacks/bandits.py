"""Bandits with time and data priors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.attacks.queries import Oracle, ScoreBased, check_positive, normal, per_image
from nas.errors import InputError


@dataclass(frozen=True)
class Bandits(ScoreBased):
    """Bandits-TD: a coarse estimate of the gradient, kept over time and improved by two queries a step.

    Ilyas, Engstrom & Madry, ICLR 2019, arXiv 1807.07978, algorithms 1 to 3, on the margin of the logits. The estimate v
    lives on ``tiles`` x ``tiles`` tiles of the image (0: a pixel each). With u ~ N(0, I / dim) the slope between
    v + exploration u and v - exploration u, each of unit length and ``probe`` away from the image, moves v along u. A
    step costs three queries: two probes and the new image. Probes may leave the ball; only images in it count as found.

    update: how v moves. "exponentiated" keeps it in [-1, 1] by exponentiated gradients (the paper's for l_inf);
    "ascent" adds to it (the paper's for l_2). probe and step_size are in pixel units; step_size 0 means epsilon / 5.
    Reconstruction in one respect: slopes are divided by the root of their mean square so far, so that ``rate`` does
    not depend on the scale of the logits.
    """

    tiles: int = 0
    exploration: float = 1.0
    probe: float = 0.1
    rate: float = 1.0
    update: Literal["ascent", "exponentiated"] = "ascent"
    step_size: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "exploration", "probe", "rate")
        if self.tiles < 0:
            raise InputError(f"attack tiles must be at least 0 (0 = a pixel each), not {self.tiles}")

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or self.threat_model.epsilon / 5

    def _spend(self, oracle: Oracle, margins: Tensor, generator: torch.Generator) -> Tensor:
        threat_model, x_adv = self.threat_model, oracle.x.clone()
        channels, height, width = x_adv.shape[1:]
        grid = (min(self.tiles or height, height), min(self.tiles or width, width))
        prior = x_adv.new_zeros(len(x_adv), channels, *grid)
        squares, updates = torch.zeros_like(margins), 0
        rows = oracle.unbroken
        while len(rows := rows[oracle.open(rows, cost=3)]):
            u = normal((len(rows), *prior.shape[1:]), prior, generator) * prior[0].numel() ** -0.5
            ends = torch.stack([prior[rows] + self.exploration * u, prior[rows] - self.exploration * u], 1)
            ends = F.interpolate(ends.flatten(0, 1), (height, width))
            ends = ends / per_image(ends.flatten(1).norm(dim=1).clamp_min(torch.finfo(ends.dtype).tiny), ends)
            found = oracle.margins(x_adv[rows].unsqueeze(1) + self.probe * ends.unflatten(0, (-1, 2)), rows)
            slope = (found[:, 0] - found[:, 1]) / (self.probe * self.exploration)
            updates += 1
            squares[rows] += slope.square()
            slope = slope / (squares[rows] / updates).sqrt().clamp_min(torch.finfo(slope.dtype).tiny)
            prior[rows] = self._moved(prior[rows], per_image(slope, u) * u)
            rows = rows[oracle.open(rows)]
            direction = threat_model.geometry.steepest(F.interpolate(prior[rows], (height, width)))
            x_adv[rows] = threat_model.project(x_adv[rows] + self.step * direction, oracle.x[rows])
            oracle.logits(x_adv[rows], rows)
        return x_adv

    def _moved(self, prior: Tensor, gradient: Tensor) -> Tensor:
        if self.update == "ascent":
            return prior + self.rate * gradient
        # (1 + v) / 2 times exp(r g), (1 - v) / 2 times exp(-r g), normalised: an addition under atanh.
        edge = 1 - torch.finfo(prior.dtype).eps
        return torch.tanh(torch.atanh(prior.clamp(-edge, edge)) + self.rate * gradient)

    def __str__(self) -> str:
        tiles = f"{self.tiles}x{self.tiles} tiles" if self.tiles else "a tile a pixel"
        return (
            f"Bandits-TD, {self.threat_model}, {self.queries} queries, {tiles}, exploration {self.exploration:.6g}, "
            f"probe {self.probe:.6g}, rate {self.rate:.6g} ({self.update}), step {self.step:.6g}"
        )


PLUGIN = Bandits
