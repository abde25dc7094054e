"""Feature adversaries: images that hidden layers take for other images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.gradient import ascend
from nas.attacks.hidden_features import features_of, hidden_layers, recorded, relative_change
from nas.attacks.hidden_layers import check_hidden
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class FeatureAdversary:
    """Feature adversary: brings hidden layers as near as the ball allows to those of a guide of another class.

    Sabour et al., ICLR 2016, arXiv 1511.05122, section 3: min |F_l(x') - F_l(guide)|_2, here relative to |F_l(guide)|_2
    and summed over the layers, by projected steepest descent instead of L-BFGS; the iterate nearest to the guide is
    kept. No loss is looked at.

    layers: module names; none means the last hidden block (``hidden_features.hidden_layers``), or the logits of a
    network without hidden layers. step_size is in pixel units; 0 means 2.5 epsilon / steps, but no more than epsilon.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 50
    step_size: float = 0.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_hidden(self.steps, self.step_size, 1.0)

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or min(2.5 / self.steps, 1.0) * self.threat_model.epsilon

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, guides: Tensor | None = None
    ) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N].

        guides: an image for each sample [N, C, H, W]; otherwise each has one of another class drawn from the batch.
        A sample in whose batch there is no other class has uniform noise for a guide.
        """
        if guides is None:
            guides = other_images(x, y, generator, self.threat_model)
        with crafting(model):
            layers = self.layers or hidden_layers(model, x)[-1:]
            return approached(model, guides, x, x, self.threat_model, layers, self.steps, self.step)

    def __str__(self) -> str:
        layers = ", ".join(self.layers) or "the last hidden block"
        return f"feature adversary, {self.threat_model}, {self.steps} steps of {self.step:.6g}, {layers}"


def other_images(x: Tensor, y: Tensor, generator: torch.Generator, threat_model: ThreatModel) -> Tensor:
    """For each sample an image of ``x`` [N, C, H, W] of another class, drawn uniformly; noise where there is none."""
    chances = torch.rand(len(x), len(x), generator=generator, device=x.device)
    chances = chances.masked_fill(y.unsqueeze(0) == y.unsqueeze(1), -1.0)
    best, place = chances.max(1)
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    noise = threat_model.lower + (threat_model.upper - threat_model.lower) * noise
    return torch.where((best >= 0).view(-1, *[1] * (x.dim() - 1)), x[place], noise)


def approached(
    model: nn.Module,
    guides: Tensor,
    start: Tensor,
    x: Tensor,
    threat_model: ThreatModel,
    layers: tuple[str, ...],
    steps: int,
    step: float,
) -> Tensor:
    """From ``start`` in the ball around ``x``, the images found whose ``layers`` are nearest to those of ``guides``.

    No layers means the logits. Call it inside ``model_state.crafting``.
    """
    with recorded(model, layers) as features:
        with torch.no_grad():
            logits = model(guides)
        aim = features_of(model, guides, features) if layers else {"": logits}

        def objective(images: Tensor) -> Tensor:
            output = model(images)
            return -relative_change(features if layers else {"": output}, aim)

        return ascend(objective, start, x, threat_model, steps=steps, step=step, keep="best")


PLUGIN = FeatureAdversary
