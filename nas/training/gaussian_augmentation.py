"""Training for randomised smoothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from nas.defences.noise import ImageNoise
from nas.objective import Batch, Metrics, State


@dataclass(frozen=True)
class GaussianAugmentation:
    """Gaussian augmentation: cross-entropy on images with Gaussian noise, what randomised smoothing is trained with.

    Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918, section 3.3. The smoothed network is
    ``nas.defences.noise.NoiseEnsemble``; ``nas.evaluation.certification`` certifies it.
    """

    noise: ImageNoise = field(default_factory=ImageNoise)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the batch, noise drawn once for each image."""
        with self.noise.within(model, state.method_generator):
            logits = model(batch.x)
        loss = F.cross_entropy(logits, batch.y)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


PLUGIN = GaussianAugmentation
