"""FAB against exact distances to the boundaries of linear models, also where pixel bounds stand in the way."""

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

from nas.attacks.fab import Fab
from nas.attacks.losses import margin
from nas.errors import InputError
from nas.threat_model import NORMS, ThreatModel


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _linear(classes, n=12, low=0.4, high=0.6, seed=0, dtype=torch.float64):
    """A linear model, and images with the labels that it gives them."""
    generator = _seeded(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).to(dtype)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 12, generator=generator))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
    x = low + (high - low) * torch.rand(n, 1, 3, 4, generator=generator).to(dtype)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def _distances(model, x, y, norm):
    """To the nearest boundary, ignoring the pixel bounds: [N]."""
    with torch.no_grad():
        gaps = model(x) - model(x).gather(1, y[:, None])
        steepness = torch.stack([ThreatModel(norm).geometry.dual(w - model[1].weight[y]) for w in model[1].weight], 1)
        return (gaps.abs() / steepness).scatter(1, y[:, None], torch.inf).amin(1)


@pytest.mark.parametrize("settings", [{}, {"targets": 9}, {"targets": 9, "restarts": 2}], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_boundary_of_many_is_found(norm, settings):
    model, x, y = _linear(4)
    nearest = Fab(ThreatModel(norm, 0.1), **settings).nearest(model, x, y, generator=_seeded())
    assert bool((model(nearest).argmax(1) != y).all())
    ratio = ThreatModel(norm).distance(nearest, x) / _distances(model, x, y, norm)
    assert float(ratio.min()) >= 1 - 1e-9
    assert float(ratio.max()) < 1.02


def test_pixel_bounds_are_part_of_the_distance():
    """Half of the pixels cannot move where they would: the nearest image in l_inf solves a linear programme."""
    model, x, y = _linear(2, n=30, low=0.0, high=1.0)
    x = x.round() * 0.9 + 0.05
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = Fab(ThreatModel("linf", 0.1))
    nearest = attack.nearest(model, x, y, generator=_seeded())
    found, compared, constrained = attack.threat_model.distance(nearest, x), 0, 0
    for row in range(len(x)):
        with torch.no_grad():
            w = (model[1].weight[1 - y[row]] - model[1].weight[y[row]]).numpy()
            gap = float(margin(model(x[row : row + 1]), y[row : row + 1], None))
        flat = x[row].flatten().numpy()
        ends = np.concatenate([np.eye(12), -np.eye(12)])
        solution = optimize.linprog(
            [0.0] * 12 + [1.0],
            A_ub=np.concatenate([np.hstack([ends, -np.ones((24, 1))]), [[*-w, 0.0]]]),
            b_ub=[0.0] * 24 + [gap],
            bounds=[(-value, 1 - value) for value in flat] + [(0, None)],
        )
        if solution.success:
            compared += 1
            constrained += solution.fun > 1.05 * abs(gap) / np.abs(w).sum()
            assert 1 - 1e-9 <= float(found[row]) / solution.fun < 1.03
    assert compared > 20
    assert constrained > 5


@pytest.mark.parametrize("settings", [{}, {"stop_when_broken": True, "batch_size": 5, "targets": 3}], ids=str)
@pytest.mark.parametrize("norm, epsilon", [("linf", 0.012), ("l2", 0.035), ("l1", 0.06)])
def test_what_lies_within_the_threat_model_is_broken_and_only_that(norm, epsilon, settings):
    model, x, y = _linear(4, n=30)
    distance = _distances(model, x, y, norm)
    threat_model = ThreatModel(norm, epsilon)
    assert 5 < int((distance < epsilon).sum()) < 25
    attack = Fab(threat_model, **settings)
    best = attack.found(model, x, y, generator=_seeded())
    assert bool(best.broken[distance < 0.98 * epsilon].all())
    assert not bool(best.broken[distance > epsilon].any())
    broken = best.images[best.broken]
    assert bool(threat_model.contains(broken, x[best.broken]).all())
    assert bool((model(broken).argmax(1) != y[best.broken]).all())
    x_adv = attack(model, x, y, generator=_seeded())
    assert bool(threat_model.contains(x_adv, x).all())


def test_stopping_saves_steps():
    model, x, y = _linear(4, n=30)
    count = 0

    def add(module, inputs):
        nonlocal count
        count += len(inputs[0])

    model.register_forward_pre_hook(add)
    needed = []
    for stop in (False, True):
        count = 0
        Fab(ThreatModel("linf", 0.05), 3, stop_when_broken=stop).found(model, x, y, generator=_seeded())
        needed.append(count)
    assert needed[1] < 0.3 * needed[0]


def test_without_boundary_images_stay():
    """A model that always answers the same, with no gradient either."""

    class Constant(nn.Module):
        def forward(self, x):
            return torch.stack([1 + 0 * x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    x = torch.rand(3, 1, 4, 4, generator=_seeded())
    for y in (torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)):
        assert torch.equal(Fab()(Constant(), x, y, generator=_seeded()), x)


def test_settings_are_checked():
    for settings in ({"steps": 0}, {"targets": -1}, {"pull": 2.0}, {"retreat": 1.0}, {"overshoot": 0.9}):
        with pytest.raises(InputError):
            Fab(**settings)
