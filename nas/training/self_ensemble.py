"""Training of a random self-ensemble."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from nas.defences.noise import LayerNoise
from nas.objective import Batch, Metrics, State
from nas.prediction import MeanOverNoise


@dataclass(frozen=True)
class SelfEnsemble:
    """Random self-ensemble: cross-entropy with Gaussian noise before every convolution.

    Liu, Cheng, Zhang & Hsieh, ECCV 2018, arXiv 1712.00673, algorithm 1. The trained network predicts, and is attacked,
    by the mean over ``draws`` of the same noise.
    """

    noise: LayerNoise = field(default_factory=LayerNoise)
    draws: int = 10

    def __post_init__(self) -> None:
        _ = self.prediction  # it checks the draws

    @property
    def prediction(self) -> MeanOverNoise:
        """The mean over the noise it trains with."""
        return MeanOverNoise(self.noise, self.draws)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the batch, noise drawn once for each image."""
        with self.noise.within(model, state.method_generator):
            logits = model(batch.x)
        loss = F.cross_entropy(logits, batch.y)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


PLUGIN = SelfEnsemble
