"""Plain convolutional networks: stages of 3x3 convolution, BN, ReLU. The baseline a search has to beat."""

from __future__ import annotations

from torch import Tensor, nn

from search_spaces.genotype import StageGenotype
from search_spaces.layers import Normalise
from search_spaces.stage_space import StageSpace


class PlainNetwork(nn.Module):
    """Stages of [3x3 convolution, BN, ReLU]; every stage but the first begins with stride 2.

    Pixels [N, C, H, W] in [0, 1] to logits [N, classes]. Normalisation is inside.
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
        in_channels = input_shape[0]
        for stage, (depth, width) in enumerate(zip(genotype.depths, genotype.widths, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                layers += [nn.Conv2d(in_channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.normalise(x)).mean((2, 3)))


SPACE = StageSpace("plain", PlainNetwork)
