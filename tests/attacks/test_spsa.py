"""SPSA: random signs instead of Gaussians."""

import pytest
import torch

from nas.attacks.nes import antithetic
from nas.attacks.spsa import Spsa, signs
from nas.errors import InputError
from nas.threat_model import ThreatModel


def test_directions_are_signs_and_balanced():
    u = signs((1000, 10), torch.zeros(1, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert u.dtype == torch.float64
    assert bool((u.abs() == 1).all())
    assert abs(float(u.mean())) < 0.05


def test_one_pair_gives_the_exact_derivative_of_a_single_pixel(half_space, oracle_of):
    """u u = 1 there: no Gaussian estimate could."""
    model, x, y = half_space(side=1)
    oracle, rows = oracle_of(model, x, y, ThreatModel())
    found = antithetic(oracle, x, rows, 1, 0.1, signs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, (2 * model.w).expand_as(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_comes_near_the_worst_case_of_a_linear_function(half_space, norm):
    model, x, y = half_space(distance=5.0)
    attempt = Spsa(ThreatModel(norm, 0.05), queries=3000).attempt(model, x, y, generator=torch.Generator())
    best = 0.05 * float(model.w.abs().sum() if norm == "linf" else model.w.norm())
    gained = ((attempt.x_adv - x) * model.w).flatten(1).sum(1)
    assert float(gained.min()) > 0.75 * best
    with pytest.raises(InputError, match="delta"):
        Spsa(delta=-1.0)
