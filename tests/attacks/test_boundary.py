"""The boundary attack: proposals on spheres, and the exact distance of a half-space."""

import pytest
import torch

from nas.attacks.boundary import Boundary
from nas.errors import InputError
from nas.threat_model import ThreatModel

L2 = ThreatModel("l2", 0.1)


def test_proposals_lie_on_the_sphere_and_nearer(half_space, oracle_of):
    model, x, y = half_space()
    oracle, rows = oracle_of(model, x, y, L2)
    assert bool(oracle.misclassified(x + 0.1 * model.w.sign(), rows).all())
    radius = oracle.distance.clone()
    spherical, source = torch.tensor([0.01, 0.1, 0.3], dtype=torch.float64), torch.full_like(radius, 0.2)
    generator = torch.Generator().manual_seed(0)
    on_sphere, candidates = Boundary(L2)._proposed(oracle, rows, spherical, source, generator)
    torch.testing.assert_close(L2.distance(on_sphere, x), radius)
    torch.testing.assert_close(L2.distance(candidates, x), 0.8 * radius)
    way, turned = oracle.nearest - x, on_sphere - x
    angle = torch.arccos((way * turned).flatten(1).sum(1) / radius.square())
    torch.testing.assert_close(angle.tan(), spherical)


def test_the_exact_distance_of_a_half_space_is_approached(half_space):
    model, x, y = half_space()
    exact = (model.offset - ((x - 0.5) * model.w).flatten(1).sum(1)) / model.w.norm()
    ratios = []
    for queries in (300, 1000, 3000):
        found = Boundary(L2, queries=queries).nearest(model, x, y, generator=torch.Generator().manual_seed(0))
        assert bool((model(found).argmax(1) == 1).all())
        ratios.append(float((L2.distance(found, x) / exact).max()))
    assert ratios[0] > ratios[1] > ratios[2] >= 1
    assert ratios[2] < 1.05


def test_other_norms_are_refused():
    with pytest.raises(InputError, match="l2"):
        Boundary(ThreatModel("linf"))
    with pytest.raises(InputError, match="adaptation"):
        Boundary(adaptation=0.9)
