"""Unrecognisable images: noise to people, a class to the network, down to its hidden layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.attacks.gradient import objective_gradient
from nas.attacks.hidden_features import features_of, hidden_layers, recorded, relative_change
from nas.attacks.hidden_layers import check_hidden
from nas.attacks.losses import LOSSES
from nas.attacks.penalty import Adam
from nas.errors import InputError
from nas.model_state import crafting


@dataclass(frozen=True)
class Unrecognisable:
    """Hidden-layer attack, unrecognisable kind: from noise to an image that the network takes for a given one.

    Reconstruction after Shen et al., arXiv 2011.14045, of which the abstract alone was read: minimises cross-entropy +
    weight * sum_l |F_l(x') - F_l(x)|_2 / |F_l(x)|_2 by Adam from uniform noise, within the pixel bounds alone. It
    is no attack on an image, and no plug-in: nothing keeps the result near ``x``, on the contrary.

    layers: module names; none means the last hidden block (``hidden_features.hidden_layers``). Not the early ones: a
    layer with more values than pixels knows the image, and what agrees with it there is the image itself.
    """

    steps: int = 500
    learning_rate: float = 0.01
    weight: float = 1.0
    layers: tuple[str, ...] = ()
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        check_hidden(self.steps, 0.0, self.weight)
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate must be a number above 0, not {self.learning_rate}")
        if not self.lower < self.upper:
            raise InputError(f"pixel bounds must satisfy lower < upper, not [{self.lower}, {self.upper}]")

    def collide(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, start: Tensor | None = None
    ) -> Tensor:
        """Images [N, C, H, W] whose hidden layers and class ``y`` [N] are those of ``x``.

        start: images to begin with, such as ones of other classes, instead of noise.
        """
        if start is None:
            noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            start = self.lower + (self.upper - self.lower) * noise
        images, adam = start, Adam(start, self.learning_rate)
        with crafting(model):
            layers = (self.layers or hidden_layers(model, x)[-1:]) if self.weight else ()
            with recorded(model, layers) as features:
                aim = features_of(model, x, features) if layers else {}

                def objective(images: Tensor) -> Tensor:
                    losses = LOSSES["cross_entropy"](model(images), y, None)
                    return losses + self.weight * relative_change(features, aim) if aim else losses

                for _ in range(self.steps):
                    gradient, _ = objective_gradient(objective, images)
                    images = (images + adam.step(gradient)).clamp(self.lower, self.upper)
        return images
