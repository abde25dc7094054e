"""Vision transformers for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from search_spaces.genotype import GenotypeError, StageGenotype
from search_spaces.layers import Normalise
from search_spaces.stage_space import StageSpace

PATCHES = 8
"""Patches along each side of the image."""
HEAD_WIDTH = 16


class TransformerNetwork(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021, arXiv 2010.11929), by torchvision, of 8x8 patches.

    One stage: ``depths[0]`` layers of ``widths[0]`` features (a multiple of 16, one head for each 16), hidden layers
    twice as wide. Pixels [N, C, H, W] in [0, 1], square, H a multiple of 8, to logits [N, classes].
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
        channels, height, width = input_shape
        features = genotype.widths[0]
        if height != width or height % PATCHES:
            raise GenotypeError(
                f"space 'vit' cuts square images into {PATCHES}x{PATCHES} patches, not {height}x{width} pixels"
            )
        if features % HEAD_WIDTH:
            raise GenotypeError(f"space 'vit': the width must be a multiple of {HEAD_WIDTH}, not {features}")
        self.normalise = Normalise(mean, std)
        self.network = VisionTransformer(
            image_size=height,
            patch_size=height // PATCHES,
            num_layers=genotype.depths[0],
            num_heads=features // HEAD_WIDTH,
            hidden_dim=features,
            mlp_dim=2 * features,
            num_classes=classes,
        )
        if channels != 3:
            self.network.conv_proj = nn.Conv2d(channels, features, height // PATCHES, height // PATCHES)
        # Zero at first, by torchvision for fine-tuning: attacks on a new network then find no gradient.
        nn.init.trunc_normal_(self.network.heads.head.weight, std=features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.normalise(x))


SPACE = StageSpace("vit", TransformerNetwork, stages=1)
