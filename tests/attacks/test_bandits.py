"""Bandits-TD: three queries a step, a prior on tiles that turns towards the gradient."""

import pytest
import torch

from nas.attacks.bandits import Bandits
from nas.errors import InputError
from nas.threat_model import ThreatModel


@pytest.mark.parametrize("update", ["ascent", "exponentiated"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_comes_near_the_worst_case_of_a_linear_function(half_space, norm, update):
    model, x, y = half_space(distance=5.0)
    attack = Bandits(ThreatModel(norm, 0.05), queries=3001, update=update)
    attempt = attack.attempt(model, x, y, generator=torch.Generator().manual_seed(0))
    best = 0.05 * float(model.w.abs().sum() if norm == "linf" else model.w.norm())
    gained = ((attempt.x_adv - x) * model.w).flatten(1).sum(1)
    assert attempt.queries.tolist() == [3001] * 3
    assert float(gained.min()) > 0.75 * best


def test_tiles_make_changes_constant_on_them(half_space):
    """And nearly as good as tiles can be: eps times the l_1 norm of the sums of w over the tiles."""
    model, x, y = half_space(distance=9.0)
    attack = Bandits(ThreatModel("linf", 0.05), queries=601, tiles=2)
    change = attack(model, x, y, generator=torch.Generator().manual_seed(0)) - x
    blocks = change.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    torch.testing.assert_close(blocks, blocks[..., :1].expand_as(blocks), rtol=0, atol=1e-9)
    sums = model.w.unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4))
    gained = (change * model.w).flatten(1).sum(1)
    assert float(gained.min()) > 0.9 * 0.05 * float(sums.abs().sum())


def test_the_exponentiated_update_is_the_papers():
    """(1 + v) exp(r g) and (1 - v) exp(-r g), normalised to a sum of two, subtracted."""
    generator = torch.Generator().manual_seed(0)
    v = 2 * torch.rand(5, 1, 3, 3, generator=generator, dtype=torch.float64) - 1
    g = torch.randn(5, 1, 3, 3, generator=generator, dtype=torch.float64)
    up, down = (1 + v) * (0.7 * g).exp(), (1 - v) * (-0.7 * g).exp()
    found = Bandits(rate=0.7, update="exponentiated")._moved(v, g)
    torch.testing.assert_close(found, (up - down) / (up + down))
    saturated = Bandits(update="exponentiated")._moved(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), -99.0))
    assert bool((saturated < 0).all()), "never stuck at the edge"


def test_settings_are_checked():
    with pytest.raises(InputError, match="tiles"):
        Bandits(tiles=-1)
    with pytest.raises(InputError, match="rate"):
        Bandits(rate=0.0)
