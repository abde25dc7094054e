"""Zeroth order optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.queries import Attempt, Oracle, ScoreBased, check_positive, portions
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Zoo(ScoreBased):
    """ZOO: the objective of Carlini and Wagner in l_2, minimised by Adam on one random block of pixels after another.

    Chen et al., AISec 2017, arXiv 1708.03999, algorithms 1 and 2: |delta|_2^2 + c max(-margin, 0), the margin's
    derivative by each pixel of the block taken as a symmetric difference over 2 ``h``. A step costs two queries a pixel
    and one for the new image. The samples of a batch share their blocks.

    Reconstruction in two respects, for budgets of thousands rather than millions. c is not searched for in several
    runs, each of which costs as many queries: it starts where the first derivatives say that both terms balance at the
    boundary, and is multiplied or divided by ``adaptation`` after every step, as the image is still right or not: a
    multiplier that settles at the boundary. And the n-th step at a pixel is ``step_size`` / sqrt(n), in pixel units.
    """

    threat_model: ThreatModel = field(default_factory=lambda: ThreatModel("l2"))
    block: int = 64
    h: float = 1e-3
    step_size: float = 0.1
    adaptation: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "block", "h", "step_size")
        if self.threat_model.norm != "l2":
            raise InputError(f"zoo minimises the l2 norm, not {self.threat_model.norm}: set norm = 'l2'")
        if not self.adaptation > 1:
            raise InputError(f"attack adaptation must be above 1, not {self.adaptation}")

    def attempt(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Attempt:
        """As every score-based attack; the last query is for the projection of the last iterate."""
        oracle = Oracle(model, x, y, self.threat_model, max(self.queries - 1, 1))
        last = self._spent(oracle, generator)
        with crafting(model):
            return oracle.attempt_with(last, self.queries)

    def nearest(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The nearest misclassified images [N, C, H, W] that all ``queries`` find, however far they are.

        A sample that is misclassified already, or for which none was found, comes back as it was.
        """
        oracle = Oracle(model, x, y, self.threat_model, self.queries, until_broken=False)
        self._spent(oracle, generator)
        return oracle.nearest

    def _spend(self, oracle: Oracle, margins: Tensor, generator: torch.Generator) -> Tensor:
        x, size = oracle.x.flatten(1), oracle.x[0].numel()
        x_adv, margins, c = x.clone(), margins.clone(), torch.zeros_like(margins)
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        updates = x.new_zeros(size)
        lower, upper = self.threat_model.lower, self.threat_model.upper
        rows = torch.arange(len(x), device=x.device)
        while len(rows := rows[oracle.open(rows, cost=3)]):
            block = min(self.block, size, (int(oracle.left(rows).min()) - 1) // 2)
            pixels = torch.randperm(size, generator=generator, device=x.device)[:block]
            slopes = self._slopes(oracle, x_adv[rows], rows, pixels)
            # At the boundary 2 delta = c slopes, where delta = -margin slopes / |slopes|^2.
            steepness = slopes.square().sum(1) * size / block
            balanced = 2 * margins[rows].abs() / steepness.clamp_min(torch.finfo(x.dtype).tiny)
            c[rows] = torch.where(c[rows] > 0, c[rows], balanced)
            pull = 2 * (x_adv[rows] - x[rows])[:, pixels]
            push = torch.where(margins[rows] > 0, 0, c[rows]).unsqueeze(1) * slopes
            updates[pixels] += 1
            self._adam(x_adv, rows, pixels, pull - push, mean, square, updates[pixels])
            x_adv[rows] = x_adv[rows].clamp(lower, upper)
            rows = rows[oracle.open(rows)]
            margins[rows] = oracle.margins(x_adv[rows].view(-1, *oracle.x.shape[1:]), rows)
            c[rows] = torch.where(margins[rows] > 0, c[rows] / self.adaptation, c[rows] * self.adaptation)
        return x_adv.view_as(oracle.x)

    def _slopes(self, oracle: Oracle, points: Tensor, rows: Tensor, pixels: Tensor) -> Tensor:
        """Derivatives [n, block] of the margin at ``points`` [n, C * H * W] by ``pixels`` [block]."""
        found: list[Tensor] = []
        for several in portions(len(pixels), 2 * len(rows)):
            done = sum(part.shape[1] for part in found)
            steps = torch.zeros(several, points.shape[1], dtype=points.dtype, device=points.device)
            steps[torch.arange(several), pixels[done : done + several]] = self.h
            probes = points.view(-1, 1, 1, points.shape[1]) + torch.stack([steps, -steps], 1)
            margins = oracle.margins(probes.view(len(rows), 2 * several, *oracle.x.shape[1:]), rows)
            found.append((margins[:, 0::2] - margins[:, 1::2]) / (2 * self.h))
        return torch.cat(found, 1)

    def _adam(
        self,
        x_adv: Tensor,
        rows: Tensor,
        pixels: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        updates: Tensor,
    ) -> None:
        """A step of Adam at ``pixels`` of the images ``rows``, in place; every pixel counts its own ``updates``."""
        at = rows.unsqueeze(1), pixels
        mean[at] = 0.9 * mean[at] + 0.1 * gradient
        square[at] = 0.999 * square[at] + 0.001 * gradient.square()
        scale = (square[at] / (1 - 0.999**updates)).sqrt().clamp_min(torch.finfo(x_adv.dtype).tiny)
        x_adv[at] -= self.step_size / updates.sqrt() * mean[at] / (1 - 0.9**updates) / scale

    def __str__(self) -> str:
        return (
            f"ZOO, {self.threat_model}, {self.queries} queries, blocks of {self.block} pixels, h {self.h:.6g}, "
            f"first step {self.step_size:.6g}, c adapted by {self.adaptation:.6g}"
        )


PLUGIN = Zoo
