"""A model whose gradients, boundaries and nearest misclassified images are known exactly."""

import pytest
import torch
from torch import nn

from nas.attacks.queries import Oracle


class Half(nn.Module):
    """Two classes, float64: label 0 within the half-space w.(x - 1/2) < offset. The margin's gradient is 2 w."""

    def __init__(self, w, offset):
        super().__init__()
        self.w, self.offset = w, offset

    def forward(self, x):
        value = ((x - 0.5) * self.w).flatten(1).sum(1) - self.offset
        return torch.stack([-value, value], 1)


@pytest.fixture
def half_space():
    """(model, x, y) of shape [n, 1, side, side] near grey, ``distance`` away in l_2 from the boundary at grey."""

    def make(side=8, n=3, distance=0.3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(1, side, side, generator=generator, dtype=torch.float64)
        x = 0.5 + 0.01 * torch.randn(n, 1, side, side, generator=generator, dtype=torch.float64)
        return Half(w, float(distance * w.norm())), x, torch.zeros(n, dtype=torch.int64)

    return make


@pytest.fixture
def oracle_of():
    """An oracle over a whole batch that never ends early, and its rows."""

    def make(model, x, y, threat_model, budget=10**6):
        return Oracle(model, x, y, threat_model, budget, until_broken=False), torch.arange(len(x))

    return make


@pytest.fixture
def cosine():
    """Cosines [n] between estimates [n, C, H, W] and a direction [C, H, W]."""
    return lambda found, w: torch.nn.functional.cosine_similarity(found.flatten(1), w.flatten()[None], dim=1)
