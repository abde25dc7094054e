"""Residual networks for small images: a 3x3 stem and stages of basic blocks."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from search_spaces.genotype import StageGenotype
from search_spaces.layers import Normalise
from search_spaces.stage_space import StageSpace


class ResNetwork(nn.Module):
    """ResNet (He et al., 2016, arXiv 1512.03385) with the stem that is usual for 32x32 pixels: 3x3, stride 1, no pool.

    Stages of ``depths[i]`` basic blocks of ``widths[i]`` channels; all but the first begin with stride 2. ResNet-18:
    depths 2, 2, 2, 2 and widths 64, 128, 256, 512. Pixels [N, C, H, W] in [0, 1] to logits [N, classes].
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
        channels = genotype.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        stages = []
        for stage, (depth, width) in enumerate(zip(genotype.depths, genotype.widths, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                shortcut = None
                if stride > 1 or channels != width:
                    shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
                blocks.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(self.normalise(x))).mean((2, 3)))


SPACE = StageSpace("resnet", ResNetwork)
