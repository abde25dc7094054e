"""VGG networks: stages of 3x3 convolutions with a pool after each, and a large fully connected head."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vgg import VGG, make_layers

from search_spaces.genotype import GenotypeError, StageGenotype
from search_spaces.layers import Normalise
from search_spaces.stage_space import StageSpace

REFERENCE_WIDTH = 512
"""Last width of VGG-16, whose hidden linear layers are 4096 wide: eight times as many."""


class VggNetwork(nn.Module):
    """VGG with batch normalisation (Simonyan & Zisserman, 2015, arXiv 1409.1556), by torchvision.

    Stages of ``depths[i]`` convolutions of ``widths[i]`` channels, each followed by a 2x2 max pool. The head is that of
    the paper: the map resized to 7x7, then two hidden linear layers eight times as wide as the last stage. VGG-16:
    depths 2, 2, 3, 3, 3 and widths 64, 128, 256, 512, 512. Pixels [N, C, H, W] in [0, 1] to logits [N, classes].
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
        if min(input_shape[1:]) < 2 ** len(genotype.depths):
            raise GenotypeError(
                f"space 'vgg': {len(genotype.depths)} stages halve the image as often, which images of "
                f"{input_shape[1]}x{input_shape[2]} pixels are too small for"
            )
        self.normalise = Normalise(mean, std)
        plan: list[str | int] = []
        for depth, width in zip(genotype.depths, genotype.widths, strict=True):
            plan += [*[width] * depth, "M"]
        features = make_layers(plan, batch_norm=True)
        first = features[0]
        if input_shape[0] != 3:
            features[0] = nn.Conv2d(input_shape[0], first.out_channels, 3, padding=1)
        network = VGG(features, num_classes=classes)
        last = genotype.widths[-1]
        if last != REFERENCE_WIDTH:
            hidden = 8 * last
            network.classifier[0] = nn.Linear(last * 7 * 7, hidden)
            network.classifier[3] = nn.Linear(hidden, hidden)
            network.classifier[6] = nn.Linear(hidden, classes)
        self.features, self.avgpool, self.classifier = network.features, network.avgpool, network.classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(self.normalise(x))).flatten(1))


SPACE = StageSpace("vgg", VggNetwork)
