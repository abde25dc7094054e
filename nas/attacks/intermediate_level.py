"""The intermediate level attack."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.gradient import ascend
from nas.attacks.hidden_features import hidden_layers, recorded
from nas.attacks.hidden_layers import check_hidden
from nas.attacks.ifgsm import IterativeFgsm
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class IntermediateLevel:
    """Intermediate level attack (ILA): pushes a hidden layer on in the direction that a first attack moved it.

    Huang et al., ICCV 2019, arXiv 1907.10823, the projection form (ILAP): maximises
    <F(x') - F(x), F(x_0) - F(x)> over the ball, x_0 from I-FGSM with as many steps on ``loss``; steepest steps from x,
    the last iterate. Made for transfer to other networks: the loss of the network at hand need not rise further.

    layer: module name; none means the last block of the middle stage (``hidden_features.hidden_layers``), or the logits
    of a network without hidden layers. step_size is in pixel units; 0 means epsilon / steps.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 10
    step_size: float = 0.0
    loss: str = "cross_entropy"
    layer: str = ""

    def __post_init__(self) -> None:
        check_hidden(self.steps, self.step_size, 1.0)
        _ = self._first

    @property
    def _first(self) -> IterativeFgsm:
        return IterativeFgsm(self.threat_model, self.steps, self.step_size, self.loss)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]; draws nothing."""
        first = self._first(model, x, y, generator=generator)
        with crafting(model):
            stages = hidden_layers(model, x)
            layers = (self.layer,) if self.layer else stages[(len(stages) - 1) // 2 :][:1]
            with recorded(model, layers) as features:

                def outputs(images: Tensor) -> Tensor:
                    logits = model(images)
                    return (features[layers[0]] if layers else logits).flatten(1)

                with torch.no_grad():
                    # Cloned: a network may go on working in place on what a layer returned.
                    clean = outputs(x).clone()
                    direction = outputs(first) - clean

                def objective(images: Tensor) -> Tensor:
                    return ((outputs(images) - clean) * direction).sum(1)

                return ascend(objective, x, x, self.threat_model, steps=self.steps, step=self._first.step)

    def __str__(self) -> str:
        layer = self.layer or "the middle stage"
        return f"ILA on {layer} after {self._first}"


PLUGIN = IntermediateLevel
