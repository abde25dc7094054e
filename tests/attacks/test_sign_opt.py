"""Sign-OPT: slopes from one decision a direction."""

import math

import pytest
import torch

from nas.attacks.sign_opt import SignOpt, sign_slopes
from nas.errors import InputError
from nas.threat_model import ThreatModel

L2 = ThreatModel("l2", 0.1)


def test_the_cosine_with_the_gradient_rises_with_the_directions_as_it_should(half_space, oracle_of):
    """At right angles to theta; about sqrt(n / (n + d pi / 2)), as for any mean of sign(u.g) u."""
    model, x, y = half_space(n=20)
    generator = torch.Generator().manual_seed(1)
    theta = model.w + torch.randn(20, 1, 8, 8, generator=generator, dtype=torch.float64)
    theta = theta / theta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    radius = (model.offset - ((x - 0.5) * model.w).flatten(1).sum(1)) / (theta * model.w).flatten(1).sum(1)

    def across(g):
        return (g - (g * theta).flatten(1).sum(1).view(-1, 1, 1, 1) * theta).flatten(1)

    for directions in (10, 100, 1600):
        oracle, rows = oracle_of(model, x, y, L2)
        found = sign_slopes(oracle, rows, theta, radius, directions, 1e-4, generator)
        agreement = torch.cosine_similarity(across(found), across(-model.w.expand_as(x))).mean()
        expected = math.sqrt(directions / (directions + 64 * math.pi / 2))
        assert float(agreement) == pytest.approx(expected, abs=0.06)
        assert oracle.queries.tolist() == [directions] * 20


def test_the_exact_distance_of_a_half_space_is_approached(half_space):
    model, x, y = half_space()
    exact = (model.offset - ((x - 0.5) * model.w).flatten(1).sum(1)) / model.w.norm()
    ratios = []
    for queries in (300, 1000, 4000):
        found = SignOpt(L2, queries=queries).nearest(model, x, y, generator=torch.Generator().manual_seed(0))
        assert bool((model(found).argmax(1) == 1).all())
        ratios.append(float((L2.distance(found, x) / exact).max()))
    assert ratios[0] > ratios[1] > ratios[2] >= 1
    assert ratios[2] < 1.05


def test_other_norms_are_refused():
    with pytest.raises(InputError, match="l2"):
        SignOpt(ThreatModel("linf"))
    with pytest.raises(InputError, match="directions"):
        SignOpt(directions=0)
