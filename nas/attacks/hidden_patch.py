"""A patch that misleads the classifier and its hidden layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.gradient import Objective, ascend, better, check_loss, check_start
from nas.attacks.hidden_layers import check_hidden, described, with_hidden_objective
from nas.errors import InputError
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class HiddenPatch:
    """Hidden-layer attack, patch kind: only the pixels of a square may change; the objective is that of hidden_layers.

    Reconstruction after Shen et al., arXiv 2011.14045, of which the abstract alone was read. The patch is a threat
    of its own: for values that are free, give an epsilon that allows them (l_inf 1). Each image has its own
    place, drawn uniformly, and its own patch; of ``places`` tries the one of the highest objective is kept.

    area: share of the image that the patch covers, at least one pixel, at most the largest square that fits;
    weight, layers, step_size as in hidden_layers.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    area: float = 0.05
    places: int = 1
    steps: int = 50
    step_size: float = 0.0
    loss: str = "cross_entropy"
    weight: float = 1.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, random_start=True)
        check_hidden(self.steps, self.step_size, self.weight)
        if not 0 < self.area <= 1:
            raise InputError(f"the area of a patch is a share of the image in (0, 1], not {self.area}")
        if self.places < 1:
            raise InputError(f"a patch is tried at 1 place at least, not {self.places}")

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or min(2.5 / self.steps, 1.0) * self.threat_model.epsilon

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Images [N, C, H, W] with a patch each, for images ``x`` and labels ``y`` [N]."""
        masks = [self.mask(x, generator) for _ in range(self.places)]
        starts = [
            self.threat_model.project(torch.where(mask, self.threat_model.random_start(x, generator), x), x)
            for mask in masks
        ]

        def climb(objective: Objective) -> Tensor:
            best, highest = x, torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
            for mask, start in zip(masks, starts, strict=True):
                steps, step = self.steps, self.step
                x_adv = ascend(
                    objective, start, x, self.threat_model, steps=steps, step=step, keep="best", free=mask.to(x.dtype)
                )
                with torch.no_grad():
                    best, highest = better(best, highest, x_adv, objective(x_adv))
            return best

        return with_hidden_objective(model, x, y, self.loss, self.weight, self.layers, climb)

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Which pixels [N, 1, H, W] may change: one square for each image."""
        height, width = x.shape[2:]
        side = min(max(round((self.area * height * width) ** 0.5), 1), height, width)
        draws = torch.rand(2, len(x), 1, generator=generator, device=x.device)
        top = (draws[0] * (height - side + 1)).long()
        left = (draws[1] * (width - side + 1)).long()
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        inside = ((rows >= top) & (rows < top + side)).unsqueeze(2) & (
            (columns >= left) & (columns < left + side)
        ).unsqueeze(1)
        return inside.unsqueeze(1)

    def __str__(self) -> str:
        return (
            f"patch of {self.area:.3g} of the image at {self.places} place(s), {self.threat_model}, "
            f"{self.steps} steps of {self.step:.6g}, {described(self.loss, self.weight, self.layers)}"
        )


PLUGIN = HiddenPatch
