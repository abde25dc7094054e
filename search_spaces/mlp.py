"""Multilayer perceptrons on pixels."""

from __future__ import annotations

import math

from torch import Tensor, nn

from search_spaces.genotype import StageGenotype
from search_spaces.layers import Normalise
from search_spaces.stage_space import StageSpace


class Perceptron(nn.Module):
    """``depths[i]`` hidden linear layers of ``widths[i]`` units, each with ReLU, and a linear classifier.

    Pixels [N, C, H, W] in [0, 1] to logits [N, classes].
    """

    def __init__(
        self,
        genotype: StageGenotype,
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        layers: list[nn.Module] = []
        features = math.prod(input_shape)
        for depth, width in zip(genotype.depths, genotype.widths, strict=True):
            for _ in range(depth):
                layers += [nn.Linear(features, width), nn.ReLU()]
                features = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.normalise(x).flatten(1)))


SPACE = StageSpace("mlp", Perceptron)
