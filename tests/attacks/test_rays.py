"""RayS: blocks of signs, and the exact distance of a half-space in l_inf."""

import pytest
import torch
from torch import nn

from nas.attacks.rays import RayS, blocks
from nas.errors import InputError
from nas.threat_model import ThreatModel

LINF = ThreatModel("linf", 0.001)


@pytest.mark.parametrize("size", [1, 2, 12, 64, 75])
def test_every_level_of_blocks_covers_every_pixel_once(size):
    levels = [list(range(size))]
    covered = []
    for block in blocks(size):
        covered += range(size)[block]
        if len(covered) == size:
            levels.append(covered)
            covered = []
    assert covered == []
    assert levels == [list(range(size))] * len(levels)
    assert len(levels) == 2 + (size - 1).bit_length()
    assert [range(size)[block] for block in blocks(size)][-size:] == [range(i, i + 1) for i in range(size)]


def test_the_distance_of_a_half_space_is_found_to_the_tolerance(half_space):
    """Every pixel ends with the sign of its weight."""
    model, x, y = half_space()
    exact = (model.offset - ((x - 0.5) * model.w).flatten(1).sum(1)) / model.w.abs().sum()
    found = RayS(LINF, queries=10**5, tolerance=1e-6).nearest(model, x, y, generator=torch.Generator())
    assert bool((model(found).argmax(1) == 1).all())
    distance = LINF.distance(found, x)
    assert bool((distance >= exact - 1e-12).all())
    assert bool((distance <= exact + 2e-6).all())
    torch.testing.assert_close((found - x).sign(), model.w.sign().expand_as(x))


def test_the_signs_of_a_start_image_are_the_first(half_space):
    model, x, y = half_space(distance=1.0)
    start = x + 0.3 * model.w.sign()
    attack = RayS(ThreatModel("linf", 0.3), queries=3)
    attempt = attack.attempt(model, x, y, generator=torch.Generator(), start=start)
    assert attempt.broken_at.tolist() == [3] * 3, "the far end is outside the ball, its projection is the last query"
    nearest = RayS(LINF, queries=2).nearest(model, x, y, generator=torch.Generator(), start=start)
    assert torch.equal(nearest, (x + model.w.sign()).clamp(0, 1))


def test_random_corners_are_tried_where_the_white_image_is_no_other_class():
    """And what has a start by itself uses no chance at all."""

    class Uneven(nn.Module):
        """Class 1 where the left half is darker than the right by a third of what is possible."""

        def forward(self, x):
            value = x[..., 2:].flatten(1).mean(1) - x[..., :2].flatten(1).mean(1) - 0.33
            return torch.stack([-value, value], 1)

    x, y = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0])
    found = RayS(LINF).nearest(Uneven(), x, y, generator=torch.Generator().manual_seed(0))
    assert float(LINF.distance(found, x)) == pytest.approx(0.165, abs=2e-3)


def test_other_norms_are_refused():
    with pytest.raises(InputError, match="linf"):
        RayS(ThreatModel("l2"))
