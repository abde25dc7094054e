"""Diagnostics by the Jacobian against exact distances and explicit Jacobians."""

import pytest
import torch
from torch import nn

from nas.analysis.jacobian import jacobian_norm, local_radius
from nas.threat_model import ThreatModel


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)).double().eval()


def _images(n=8):
    return torch.rand(n, 1, 4, 4, generator=_generator(1), dtype=torch.float64)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf)])
def test_the_radius_of_a_linear_network_is_its_exact_distance(norm, dual):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()
    x = _images()
    logits, w = model(x).detach(), model[1].weight.detach()
    y = logits.argmax(1)
    y[0] = (y[0] + 1) % 5
    slopes = torch.linalg.vector_norm(w[y][:, None] - w[None], ord=dual, dim=2)
    gaps = logits.gather(1, y[:, None]) - logits
    expected = (gaps / slopes).scatter(1, y[:, None], torch.inf).amin(1)
    expected[0] = 0
    radius = local_radius(model, x, y, ThreatModel(norm, 0.1))
    torch.testing.assert_close(radius, expected)
    assert float(radius[1:].min()) > 0


def test_without_any_slope_the_radius_is_infinite():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert bool(local_radius(model, _images(), torch.zeros(8).long(), ThreatModel()).isinf().all())


def test_as_many_projections_as_classes_give_the_norm_exactly():
    model, x = _network(), _images()
    jacobian = torch.autograd.functional.jacobian(lambda images: model(images).sum(0), x)  # [K, N, 1, 4, 4]
    exact = jacobian.transpose(0, 1).flatten(1).norm(dim=1)
    for projections in (5, 50):
        torch.testing.assert_close(jacobian_norm(model, x, projections=projections, generator=_generator()), exact)
    draws = torch.stack([jacobian_norm(model, x, projections=1, generator=_generator(seed)) for seed in range(600)])
    torch.testing.assert_close(draws.square().mean(0), exact.square(), rtol=0.12, atol=0)
    two = torch.stack([jacobian_norm(model, x, projections=2, generator=_generator(seed)) for seed in range(600)])
    assert bool((two.square().var(0) < draws.square().var(0)).all())


def test_the_network_is_left_as_found():
    model, x = _network().train(), _images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    jacobian_norm(model, x, projections=1, generator=_generator())
    local_radius(model, x, torch.zeros(8).long(), ThreatModel())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
