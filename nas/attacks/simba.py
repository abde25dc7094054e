"""The simple black-box attack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nas.attacks.queries import Oracle, ScoreBased, per_image
from nas.errors import InputError


@dataclass(frozen=True)
class Simba(ScoreBased):
    """SimBA: one direction of an orthogonal basis after another, kept forwards or backwards if that helps.

    Guo et al., ICML 2019, arXiv 1905.07121, algorithm 1, on the margin of the logits. A step costs one query, or two
    where the first does not help. basis: single "pixels" or the low frequencies of the discrete cosine transform,
    "dct". Directions come in random order, which the samples of a batch share, without repetition in a pass; a new pass
    begins until the budget is spent. frequencies: share of the frequencies of each axis that the first pass of "dct" is
    made of; each pass doubles it. A step has size ``step_size`` in the norm of the threat model, in pixel units; 0
    means epsilon, but no more than 0.2, the paper's. Candidates are projected: without that, in l_2,
    T steps move an image by at most sqrt(T) step_size.
    """

    basis: Literal["pixels", "dct"] = "pixels"
    frequencies: float = 0.25
    step_size: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.frequencies <= 1:
            raise InputError(f"attack frequencies must be above 0 and at most 1, not {self.frequencies}")

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or min(self.threat_model.epsilon, 0.2)

    def _spend(self, oracle: Oracle, margins: Tensor, generator: torch.Generator) -> Tensor:
        x_adv, best = oracle.x.clone(), margins.clone()
        rows, share = oracle.unbroken, self.frequencies if self.basis == "dct" else 1.0
        while len(rows):
            moved = torch.zeros_like(best, dtype=torch.bool)
            for direction in self._directions(x_adv, share, generator):
                rows = rows[oracle.open(rows)]
                if len(rows) == 0:
                    break
                self._try(oracle, x_adv, best, moved, rows, direction)
            if share >= 1:
                rows = rows[moved[rows]]  # no direction of a whole basis helps the others
            share = min(2 * share, 1.0)
        return x_adv

    def _try(self, oracle: Oracle, x_adv: Tensor, best: Tensor, moved: Tensor, rows: Tensor, direction: Tensor) -> None:
        """A step forwards or else backwards for the samples ``rows``, in place."""
        for signed in (direction, -direction):
            candidates = self.threat_model.project(x_adv[rows] + self.step * signed, oracle.x[rows])
            # At the edge of the ball a step may lead nowhere, which needs no query.
            asked = oracle.open(rows) & (candidates != x_adv[rows]).flatten(1).any(1)
            better = torch.zeros_like(asked)
            if bool(asked.any()):
                tried = rows[asked]
                margins = oracle.margins(candidates[asked], tried)
                better[asked] = helps = margins > best[tried]
                best[tried] = torch.where(helps, margins, best[tried])
            x_adv[rows[better]] = candidates[better]
            moved[rows[better]] = True
            rows = rows[~better]

    def _directions(self, like: Tensor, share: float, generator: torch.Generator) -> Iterator[Tensor]:
        """A pass over the basis: directions [1, C, H, W] of unit size in the norm of the threat model."""
        channels, height, width = like.shape[1:]
        axis = cosines if self.basis == "dct" else torch.eye
        vertical, horizontal = axis(height).to(like), axis(width).to(like)
        rows, columns = math.ceil(share * height), math.ceil(share * width)
        for number in torch.randperm(channels * rows * columns, generator=generator, device=like.device).tolist():
            direction = torch.zeros_like(like[:1])
            row, column = divmod(number % (rows * columns), columns)
            direction[0, number // (rows * columns)] = torch.outer(vertical[row], horizontal[column])
            yield direction / per_image(self.threat_model.geometry.size(direction), direction)

    def __str__(self) -> str:
        basis = self.basis if self.basis == "pixels" else f"dct from {self.frequencies:.6g} of the frequencies"
        return f"SimBA, {self.threat_model}, {self.queries} queries, {basis}, step {self.step:.6g}"


def cosines(length: int) -> Tensor:
    """The orthonormal basis [length, length] of the discrete cosine transform (DCT-II), lowest frequency first."""
    frequency = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    place = torch.arange(length, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi / length * frequency * place) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis


PLUGIN = Simba
