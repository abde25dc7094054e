"""Training of a random self-ensemble."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from nas.defences.noise import LayerNoise
from nas.objective import Batch, Metrics, State


@dataclass(frozen=True)
class SelfEnsemble:
    """Random self-ensemble: cross-entropy with Gaussian noise before every convolution.

    Liu, Cheng, Zhang & Hsieh, ECCV 2018, arXiv 1712.00673, algorithm 1. The trained network alone has no noise in it:
    predict and attack it as a ``nas.defences.noise.NoiseEnsemble``.
    """

    noise: LayerNoise = field(default_factory=LayerNoise)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the batch, noise drawn once for each image."""
        with self.noise.within(model, state.method_generator):
            logits = model(batch.x)
        loss = F.cross_entropy(logits, batch.y)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


PLUGIN = SelfEnsemble
