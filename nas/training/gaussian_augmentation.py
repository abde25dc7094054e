"""Training for randomised smoothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from nas.defences.noise import ImageNoise
from nas.errors import InputError
from nas.objective import Batch, Metrics, State
from nas.prediction import MeanOverNoise


@dataclass(frozen=True)
class GaussianAugmentation:
    """Gaussian augmentation: cross-entropy on images with Gaussian noise, what randomised smoothing is trained with.

    Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918, section 3.3. draws: 0 for a network that predicts by itself;
    above, it predicts, and is attacked, by the mean over so many draws of the noise: the smoothed network, which
    ``nas.evaluation.certification`` certifies (given the network alone).
    """

    noise: ImageNoise = field(default_factory=ImageNoise)
    draws: int = 0

    def __post_init__(self) -> None:
        if self.draws < 0:
            raise InputError(f"draws must be at least 0 (0: the network predicts by itself), not {self.draws}")
        _ = self.prediction  # it checks the rest

    @property
    def prediction(self) -> MeanOverNoise | None:
        """The mean over the noise it trains with, if draws are asked for."""
        return MeanOverNoise(self.noise, self.draws) if self.draws else None

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the batch, noise drawn once for each image."""
        with self.noise.within(model, state.method_generator):
            logits = model(batch.x)
        loss = F.cross_entropy(logits, batch.y)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


PLUGIN = GaussianAugmentation
