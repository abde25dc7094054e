"""ZOO: symmetric differences pixel by pixel, and the nearest image of the C&W objective."""

import pytest
import torch
from torch import nn

from nas.attacks.zoo import Zoo
from nas.errors import InputError
from nas.threat_model import ThreatModel

L2 = ThreatModel("l2", 0.5)


def test_symmetric_differences_are_exact_for_a_quadratic_function(oracle_of):
    class Quadratic(nn.Module):
        def forward(self, x):
            value = (x.flatten(1) ** 2 * torch.arange(16)).sum(1)
            return torch.stack([-value / 2, value / 2], 1)

    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle, rows = oracle_of(Quadratic(), x, torch.zeros(3, dtype=torch.int64), L2)
    pixels = torch.tensor([3, 15, 0, 7])
    found = Zoo(L2)._slopes(oracle, x.flatten(1), rows, pixels)
    torch.testing.assert_close(found, 2 * pixels * x.flatten(1)[:, pixels], rtol=0, atol=1e-8)
    assert oracle.queries.tolist() == [8, 8, 8]


def test_more_queries_come_nearer_to_the_exact_distance(half_space):
    model, x, y = half_space(side=4)
    exact = (model.offset - ((x - 0.5) * model.w).flatten(1).sum(1)) / model.w.norm()
    ratios = []
    for queries in (100, 500, 4000):
        found = Zoo(L2, queries=queries).nearest(model, x, y, generator=torch.Generator().manual_seed(0))
        assert bool((model(found).argmax(1) == 1).all()), "what is returned is not the clean image"
        ratios.append(float((L2.distance(found, x) / exact).max()))
    assert ratios[0] >= ratios[1] >= ratios[2] >= 1
    assert ratios[2] < 1.03


def test_a_block_smaller_than_the_image_gets_there_too(half_space):
    model, x, y = half_space(side=8)
    attempt = Zoo(L2, queries=2000, block=8).attempt(model, x, y, generator=torch.Generator().manual_seed(0))
    assert bool((attempt.broken_at > 0).all())


def test_other_norms_are_refused():
    with pytest.raises(InputError, match="l2"):
        Zoo(ThreatModel("linf"))
    with pytest.raises(InputError, match="adaptation"):
        Zoo(adaptation=1.0)
