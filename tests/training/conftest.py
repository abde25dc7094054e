"""A small task of 8x8 images, and a network that learns it: nothing here needs more than milliseconds."""

import pytest
import torch
from torch import nn

from nas.data.image_data import ImageData
from nas.data.split import split
from search_spaces.layers import Normalise


class SmallNetwork(nn.Module):
    """Convolution, batch normalisation, a pooled classifier, and an auxiliary head that runs in train mode only."""

    def __init__(self, auxiliary=False):
        super().__init__()
        self.normalise = Normalise((0.5,), (0.25,))
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten())
        if auxiliary:
            self.auxiliary = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
        self.classifier = nn.Linear(64, 3)

    def forward(self, x):
        features = self.features(self.normalise(x))
        if self.training and hasattr(self, "auxiliary"):
            self.auxiliary(features)
        return self.classifier(features)


@pytest.fixture
def network():
    """Makes a network; equal seeds give equal weights."""

    def make(seed=0, auxiliary=False):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return SmallNetwork(auxiliary)

    return make


@pytest.fixture
def data():
    """72 noisy images of three prototypes to train on, 9 to test."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(60, 196, (3, 1, 8, 8), generator=generator)
    y = torch.arange(81) % 3
    x = (prototypes[y] + 25 * torch.randn(81, 1, 8, 8, generator=generator)).clamp(0, 255).to(torch.uint8)
    return ImageData("prototypes", x[:72], y[:72], x[72:], y[72:], ("a", "b", "c"))


@pytest.fixture
def parts(data):
    """Two thirds of the images to train on, the rest to validate."""
    return split(data.y_train, architecture=0.5, validation=0.33, seed=0)
