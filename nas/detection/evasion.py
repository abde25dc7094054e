"""The adaptive attack on feature squeezing: gradient steps that fool the network and its detector at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.detection.feature_squeezing import Detector, joint_score
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Evasion:
    """PGD that knows the detector: misclassified, with a score that is not above the detector's threshold.

    Each step lowers, for the image and all its squeezed versions, the cross-entropy of one wrong class, and
    ``score_weight`` times the excess of the score over the threshold: where all versions show the same wrong class,
    the score is low. The class is, in the first restart and at every step, the one that is likeliest on average over
    the versions; further restarts aim at the likeliest, second likeliest, ... class of the clean image and stay with
    it. Steps begin at ``step_size`` (pixel units; 0 means half of epsilon) and shrink linearly to nothing. Rounding
    is passed straight through, other squeezers have their own gradient (``nas.detection.squeezers``). A sample that
    evades is done. One that never does ends as its misclassified iterate of lowest score, if there is one, and else
    as its last iterate.

    The idea of attacking the squeezers too is that of He et al., USENIX WOOT 2017, arXiv 1706.04701, who minimise a
    norm; the form for a fixed budget is ours, after Carlini & Wagner, arXiv 1705.07263, and Tramer et al., arXiv
    2002.08347.
    """

    detector: Detector
    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 100
    step_size: float = 0.0
    score_weight: float = 1.0
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise InputError(f"steps and restarts must be at least 1, not {self.steps} and {self.restarts}")
        if not self.step_size >= 0 or not self.score_weight >= 0:
            raise InputError("step_size (0 = automatic) and score_weight must be at least 0")

    @property
    def step(self) -> float:
        """The size of the first step."""
        return self.step_size or 0.5 * self.threat_model.epsilon

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        result, rank = x.clone(), torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
        with crafting(model):
            with torch.no_grad():
                clean = model(x).scatter(1, y.unsqueeze(1), -torch.inf)
            order = clean.argsort(dim=1, descending=True, stable=True)
            for restart in range(self.restarts):
                rows = (~(rank <= self.detector.threshold)).nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                target = None if restart == 0 else order[rows, (restart - 1) % (order.shape[1] - 1)]
                found, score = self._walk(model, x[rows], y[rows], target, generator)
                better = score < rank[rows] if restart else torch.ones_like(rows, dtype=torch.bool)
                result[rows[better]], rank[rows[better]] = found[better], score[better]
        return result

    def _walk(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The best iterates and their scores, infinite where they are not misclassified."""
        threat_model, threshold = self.threat_model, self.detector.threshold
        x_adv = threat_model.random_start(x, generator)
        best, best_score = x_adv.clone(), torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
        rows = torch.arange(len(x), device=x.device)
        for step in range(self.steps + 1):
            gradient, score = self._gradient(model, x_adv, y, target)
            better = score < best_score[rows]
            better |= best_score[rows].isinf()
            best[rows[better]], best_score[rows[better]] = x_adv[better], score[better]
            going = ~(score <= threshold)
            rows, x_adv, x, y, gradient = rows[going], x_adv[going], x[going], y[going], gradient[going]
            target = None if target is None else target[going]
            if len(rows) == 0 or step == self.steps:
                break
            size = self.step * (1 - step / self.steps)
            x_adv = threat_model.project(x_adv - size * threat_model.geometry.steepest(gradient), x)
        return best, best_score

    def _gradient(self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradient [N, C, H, W] of the loss, and the scores [N], infinite where ``x`` is not misclassified."""
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            views = self.detector.squeezing.views(model, point)
            score = joint_score(views)
            if target is None:
                target = views.detach().softmax(2).mean(0).scatter(1, y.unsqueeze(1), -1.0).argmax(1)
            entropies = F.cross_entropy(views.flatten(0, 1), target.repeat(len(views)), reduction="none")
            excess = (score - self.detector.threshold).relu()
            (gradient,) = torch.autograd.grad(entropies.sum() + self.score_weight * excess.sum(), point)
        wrong = views[0].argmax(1) != y
        return gradient, torch.where(wrong, score.detach(), torch.inf)

    def __str__(self) -> str:
        again = f", {self.restarts} restarts" if self.restarts > 1 else ""
        return (
            f"adaptive PGD-{self.steps}, {self.threat_model}, first step {self.step:.6g}, "
            f"score weight {self.score_weight:g}{again}, against {self.detector}"
        )
