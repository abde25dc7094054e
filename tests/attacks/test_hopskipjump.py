"""HopSkipJump: the direction from decisions alone, and exact distances of a half-space in both norms."""

import math

import pytest
import torch

from nas.attacks.hopskipjump import HopSkipJump, direction
from nas.errors import InputError
from nas.threat_model import ThreatModel


def _on_the_boundary(model, x):
    short = model.offset - ((x - 0.5) * model.w).flatten(1).sum(1)
    return x + (short / model.w.square().sum()).view(-1, 1, 1, 1) * model.w


def test_the_cosine_with_the_gradient_rises_with_the_probes_as_it_should(half_space, oracle_of, cosine):
    """The mean of sign(u.w) u has a cosine of about sqrt(n / (n + d pi / 2))."""
    model, x, y = half_space(n=20)
    points = _on_the_boundary(model, x)
    for probes in (10, 100, 1600):
        oracle, rows = oracle_of(model, x, y, ThreatModel("l2", 1.0))
        counts, away = torch.full((20,), probes), torch.full((20,), 0.01, dtype=torch.float64)
        found = direction(oracle, points, rows, counts, away, torch.Generator().manual_seed(0))
        expected = math.sqrt(probes / (probes + 64 * math.pi / 2))
        assert float(cosine(found, model.w).mean()) == pytest.approx(expected, abs=0.05)
        assert oracle.queries.tolist() == [probes] * 20


@pytest.mark.parametrize("side", [-1, 1])
def test_where_all_decisions_agree_their_mean_direction_is_taken(half_space, oracle_of, side):
    """The sum of u where all are misclassified, the opposite where none is: never nothing."""
    model, x, y = half_space(n=2)
    points = _on_the_boundary(model, x) + side * 0.1 * model.w / model.w.norm()
    oracle, rows = oracle_of(model, x, y, ThreatModel("l2", 1.0))
    probes, away = torch.tensor([3, 5]), torch.full((2,), 1e-3, dtype=torch.float64)
    found = direction(oracle, points, rows, probes, away, torch.Generator().manual_seed(0))
    u = torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u / u.flatten(2).norm(dim=2).view(2, 5, 1, 1, 1)
    torch.testing.assert_close(found, side * torch.stack([u[0, :3].sum(0), u[1].sum(0)]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_exact_distance_of_a_half_space_is_approached(half_space, norm):
    model, x, y = half_space()
    threat_model = ThreatModel(norm, 0.01)
    dual = model.w.abs().sum() if norm == "linf" else model.w.norm()
    exact = (model.offset - ((x - 0.5) * model.w).flatten(1).sum(1)) / dual
    ratios = []
    for queries in (300, 1500, 8000):
        attack = HopSkipJump(threat_model, queries=queries)
        found = attack.nearest(model, x, y, generator=torch.Generator().manual_seed(0))
        assert bool((model(found).argmax(1) == 1).all())
        ratios.append(float((threat_model.distance(found, x) / exact).max()))
    assert ratios[0] > ratios[1] > ratios[2] >= 1 - 1e-9
    assert ratios[2] < 1.08


def test_settings_are_checked():
    with pytest.raises(InputError, match="evaluations"):
        HopSkipJump(evaluations=0)
