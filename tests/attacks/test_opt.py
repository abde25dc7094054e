"""OPT: distances along directions against their closed form, and their gradient."""

import math

import pytest
import torch

from nas.attacks.opt import Opt, boundary_radius, distance_slopes
from nas.errors import InputError
from nas.threat_model import ThreatModel

L2 = ThreatModel("l2", 0.1)


def _short(model, x):
    return model.offset - ((x - 0.5) * model.w).flatten(1).sum(1)


def test_distances_are_those_of_the_boundary(half_space, oracle_of):
    """margin / (w.theta): nearer than the guess, farther, much farther, never; and given up where not nearer."""
    model, x, y = half_space(n=2)
    unit = (model.w / model.w.norm()).expand(2, 1, 1, 8, 8)
    theta = torch.cat([unit, unit * 0.9, unit * 3, unit * 0.3, -unit], 1)
    exact = _short(model, x).unsqueeze(1) / model.w.norm() / torch.tensor([1.0, 0.9, 3.0, 0.3])
    guess = 1.05 * exact[:, 0]
    oracle, rows = oracle_of(model, x, y, L2)
    found = boundary_radius(oracle, rows, theta, guess, 1e-5)
    assert bool(found[:, 4].isinf().all())
    found = found[:, :4]
    assert bool((found >= exact).all())
    bounded = found[:, :3]
    assert bool((bounded <= exact[:, :3] + 1e-5 * guess.unsqueeze(1)).all())
    assert bool((found[:, 3].isinf() | (found[:, 3] <= exact[:, 3] + 1e-5 * guess)).all())
    oracle, rows = oracle_of(model, x, y, L2)
    assert boundary_radius(oracle, rows, theta[:, 3:4], guess, 1e-5, nearer=True).isinf().all()
    assert oracle.queries.tolist() == [1, 1]


def test_the_estimate_is_the_gradient_of_the_distance(half_space, oracle_of, cosine):
    """-margin w / (w.theta)^2; exact along theta, and the rest has a cosine of about sqrt(n / (n + d - 2))."""
    model, x, y = half_space(n=8)
    generator = torch.Generator().manual_seed(1)
    theta = model.w + torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)
    theta = theta / theta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    along = (theta * model.w).flatten(1).sum(1)
    radius = _short(model, x) / along
    exact = -(radius / along).view(-1, 1, 1, 1) * model.w
    for directions in (10, 100, 1000):
        oracle, rows = oracle_of(model, x, y, L2)
        # As seen from inside: the boundary itself is not misclassified.
        found = distance_slopes(oracle, rows, theta, radius, directions, 1e-3, 1e-8, generator)
        torch.testing.assert_close((found * theta).flatten(1).sum(1), -radius, rtol=0, atol=1e-9)
        across = [g - (g * theta).flatten(1).sum(1).view(-1, 1, 1, 1) * theta for g in (found, exact)]
        agreement = torch.cosine_similarity(across[0].flatten(1), across[1].flatten(1)).mean()
        assert float(agreement) == pytest.approx(math.sqrt(directions / (directions + 62)), abs=0.07)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), exact.flatten(1).norm(dim=1), rtol=0.1, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_exact_distance_of_a_half_space_is_approached(half_space, norm):
    model, x, y = half_space(side=4)
    threat_model = ThreatModel(norm, 0.01)
    dual = model.w.abs().sum() if norm == "linf" else model.w.norm()
    found = Opt(threat_model, queries=3000).nearest(model, x, y, generator=torch.Generator().manual_seed(0))
    ratio = threat_model.distance(found, x) / (_short(model, x) / dual)
    assert bool((model(found).argmax(1) == 1).all())
    assert float(ratio.min()) >= 1
    assert float(ratio.max()) < 1.1


def test_settings_are_checked():
    with pytest.raises(InputError, match="beta"):
        Opt(beta=0.0)
