"""Checks with which the evaluator suspects itself: signs that an attack failed rather than the defence held.

After Carlini et al. (arXiv 1902.06705), Athalye et al. (arXiv 1802.00420), Tramer et al. (arXiv 2002.08347) and the
indicators of attack failure of Pintor et al. (arXiv 2106.09947).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nas.attacks.losses import right
from nas.evaluation.expectation import suited
from nas.evaluation.robustness import Evaluation
from nas.model_state import evaluating
from nas.objective import Attack
from nas.prediction import begin
from nas.randomness import generator
from nas.threat_model import ThreatModel

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One graded line: what was looked at, the verdict, and the numbers."""

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, eq=False)
class Case:
    """An evaluated model with the samples that are looked at.

    x [n, C, H, W] in [0, 1], y [n];  natural, robust: [n] bool, right on clean images and under all attacks of the
    evaluation.  surrogates: other networks, for examples that transfer.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    natural: Tensor
    robust: Tensor
    threat_model: ThreatModel
    seed: int
    surrogates: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """Worst-case accuracy of the evaluation on these samples."""
        return share(self.robust)

    def generator(self, purpose: str) -> torch.Generator:
        """The random stream of a check."""
        return generator(self.seed, f"suspicion {purpose}", device=self.x.device)

    def answers(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Which of ``images`` are classified right; rows: the samples they belong to, all unless given."""
        with torch.no_grad():
            return right(self.model(images), self.y if rows is None else self.y[rows])

    def withstood(self, attack: Attack, purpose: str) -> Tensor:
        """Samples [n] that are right and stay right under ``attack``."""
        attack = suited(attack, self.model)
        return self.natural & self.answers(attack(self.model, self.x, self.y, generator=self.generator(purpose)))


def suspicions(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    evaluation: Evaluation,
    threat_model: ThreatModel,
    *,
    seed: int,
    samples: int = 128,
    surrogates: Mapping[str, nn.Module] | None = None,
) -> list[Check]:
    """All checks on the first ``samples`` images (x in [0, 1]) of an evaluation, in eval mode."""
    # They build on this module.
    from nas.evaluation.attack_checks import ATTACK_CHECKS
    from nas.evaluation.model_checks import MODEL_CHECKS

    x, y = x[:samples], y[:samples]
    begin(model)
    with evaluating(model):
        with torch.no_grad():
            natural = right(model(x), y)
        robust = evaluation.worst_case[: len(x)]
        case = Case(model, x, y, natural, robust, threat_model, seed, surrogates or {})
        found = [check(case) for check in (*MODEL_CHECKS, *ATTACK_CHECKS)]
    return [line for lines in found for line in (lines if isinstance(lines, list) else [lines])]


def share(mask: Tensor) -> float:
    """The part of a mask that is true; 0 of an empty one."""
    return float(mask.double().mean()) if len(mask) else 0.0


def grade(value: float, good: float, bad: float) -> Verdict:
    """``value`` may be ``good`` at most to pass; above ``bad`` it fails."""
    return "pass" if value <= good else "warn" if value <= bad else "fail"
