"""NES: the estimate is the gradient of a linear function on average, whatever sigma."""

import math

import pytest
import torch

from nas.attacks.nes import Nes, antithetic
from nas.attacks.queries import normal
from nas.errors import InputError
from nas.threat_model import ThreatModel


def test_the_cosine_with_the_gradient_rises_with_the_pairs_as_it_should(half_space, oracle_of, cosine):
    """For d pixels and n pairs the mean of u u^T w has a cosine of about sqrt(n / (n + d))."""
    model, x, y = half_space(n=20)
    for pairs in (4, 64, 1024):
        oracle, rows = oracle_of(model, x, y, ThreatModel("l2", 1.0))
        found = antithetic(oracle, x, rows, pairs, 0.01, normal, torch.Generator().manual_seed(0))
        assert float(cosine(found, model.w).mean()) == pytest.approx(math.sqrt(pairs / (pairs + 64)), abs=0.05)
        assert oracle.queries.tolist() == [2 * pairs] * 20
    torch.testing.assert_close(found.mean(0), 2 * model.w, rtol=0, atol=0.5)  # four standard deviations


def test_sigma_does_not_matter_to_a_linear_function(half_space, oracle_of):
    model, x, y = half_space()
    found = []
    for sigma in (1e-3, 1.0):
        oracle, rows = oracle_of(model, x, y, ThreatModel("l2", 1.0))
        found.append(antithetic(oracle, x, rows, 5, sigma, normal, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_comes_near_the_worst_case_of_a_linear_function(half_space, norm):
    """In a ball too small to be broken in: the gain is eps |w|_1 in l_inf and eps |w|_2 in l_2."""
    model, x, y = half_space(distance=5.0)
    threat_model = ThreatModel(norm, 0.05)
    attempt = Nes(threat_model, queries=3000).attempt(model, x, y, generator=torch.Generator().manual_seed(0))
    assert attempt.broken_at.tolist() == [-1] * 3
    best = 0.05 * float(model.w.abs().sum() if norm == "linf" else model.w.norm())
    gained = ((attempt.x_adv - x) * model.w).flatten(1).sum(1)
    assert float(gained.min()) > 0.75 * best
    assert float(gained.max()) <= best * (1 + 1e-9)


def test_a_step_costs_its_pairs_and_the_new_image(half_space):
    model, x, y = half_space(distance=5.0)
    attempt = Nes(ThreatModel("linf", 0.01), queries=1 + 3 * 21, pairs=10).attempt(
        model, x, y, generator=torch.Generator()
    )
    assert attempt.queries.tolist() == [64] * 3
    with pytest.raises(InputError, match="sigma"):
        Nes(sigma=0.0)
