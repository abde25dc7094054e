"""DeepFool."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.gradient import input_jacobian, per_image
from nas.attacks.losses import right
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class DeepFool:
    """DeepFool: steps to the nearest boundary of the network linearised where it stands, until the class changes.

    Moosavi-Dezfooli, Fawzi & Frossard, CVPR 2016, arXiv 1511.04599, algorithm 2 and, for norms other than l_2, section
    3.3. Of the boundaries f_k = f_y the one is taken to which |f_k - f_y| / |grad(f_k - f_y)|_q is least, q the dual
    norm. What is added up leads to the boundary; the image is taken ``overshoot`` times its length beyond. Pixels
    at a bound in whose direction the step points stay out of it, so that the step is not lost on them.

    classes: how many are looked at, those of the largest logits on the clean image (the paper's code takes 10 for
    ImageNet); each costs a backward pass a step. 0 means all.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 50
    overshoot: float = 0.02
    classes: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"attack steps must be at least 1, not {self.steps}")
        if not 0 < self.overshoot < float("inf"):
            raise InputError(f"overshoot must be a number above 0, not {self.overshoot}")
        if self.classes < 0 or self.classes == 1:
            raise InputError(f"classes must be at least 2, or 0 for all, not {self.classes}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """``nearest``, projected into the threat model; draws nothing."""
        return self.threat_model.project(self.nearest(model, x, y, generator=generator), x)

    def nearest(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Misclassified images [N, C, H, W] near ``x``, within the pixel bounds at whatever distance.

        A sample that is misclassified already, or for which none was found, comes back as it was.
        """
        del generator
        lower, upper = self.threat_model.lower, self.threat_model.upper
        result = x.clone()
        with crafting(model):
            with torch.no_grad():
                logits = model(x)
            candidates = self._candidates(logits, y)
            rows = right(logits, y).nonzero().squeeze(1)
            clean, x_adv, total = x[rows], x[rows], torch.zeros_like(x[rows])
            for _ in range(self.steps):
                if len(rows) == 0:
                    break
                total = total + self._step(model, x_adv, candidates[rows])
                x_adv = (clean + (1 + self.overshoot) * total).clamp(lower, upper)
                with torch.no_grad():
                    held = right(model(x_adv), y[rows])
                result[rows[~held]] = x_adv[~held]
                rows, clean, x_adv, total = rows[held], clean[held], x_adv[held], total[held]
        return result

    def _candidates(self, logits: Tensor, y: Tensor) -> Tensor:
        """The label, then the wrong classes of the largest logits: [N, classes]."""
        count = min(self.classes or logits.shape[1], logits.shape[1])
        wrong = logits.scatter(1, y.unsqueeze(1), -torch.inf).topk(count - 1, dim=1).indices
        return torch.cat([y.unsqueeze(1), wrong], 1)

    def _step(self, model: nn.Module, x_adv: Tensor, candidates: Tensor) -> Tensor:
        """The shortest perturbation to a boundary of the linearised network."""
        jacobian, logits = input_jacobian(model, x_adv, candidates)
        logits = logits.gather(1, candidates)
        gaps = (logits[:, 1:] - logits[:, :1]).abs().flatten()
        normals = (jacobian[:, 1:] - jacobian[:, :1]).flatten(0, 1)
        images = x_adv.repeat_interleave(candidates.shape[1] - 1, 0)
        stuck = (images >= self.threat_model.upper) & (normals > 0) | (images <= self.threat_model.lower) & (
            normals < 0
        )
        geometry = self.threat_model.geometry
        # The dual norm; of all pixels, so that what the bounds take from a step is left to the next, linearised anew.
        slopes = (normals * geometry.steepest(normals)).flatten(1).sum(1)
        directions = geometry.steepest(normals.masked_fill(stuck, 0))
        lengths = (gaps / slopes.clamp_min(torch.finfo(x_adv.dtype).tiny)).view(len(x_adv), -1)
        shortest, nearest = lengths.min(1)
        direction = directions.view(len(x_adv), -1, *x_adv.shape[1:])[torch.arange(len(x_adv)), nearest]
        # No slope, no step; on the boundary itself a step of length zero would stay there.
        shortest = torch.where(shortest < 1 / torch.finfo(x_adv.dtype).eps, shortest + 1e-6, 0)
        return per_image(shortest, x_adv) * direction

    def __str__(self) -> str:
        classes = self.classes or "all"
        return f"DeepFool-{self.steps}, {self.threat_model}, overshoot {self.overshoot:.6g}, {classes} classes"


PLUGIN = DeepFool
