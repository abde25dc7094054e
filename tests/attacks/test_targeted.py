"""Targeted PGD against the exact optimum of a linear model, and the matrix of hits against counting by hand."""

import pytest
import torch
from torch import nn

from nas.attacks.targeted import TargetedPgd, success_matrix
from nas.errors import InputError
from nas.threat_model import ThreatModel


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _linear():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 16, generator=_generator(), dtype=torch.float64))
        model[1].bias.zero_()
    return model, 0.4 + 0.2 * torch.rand(6, 1, 4, 4, generator=_generator(1), dtype=torch.float64)


@pytest.mark.parametrize("norm,epsilon", [("linf", 0.05), ("l2", 0.2)])
def test_the_lead_of_the_target_becomes_the_largest_possible(norm, epsilon):
    model, x = _linear()
    target = torch.tensor([0, 1, 0, 1, 0, 1])
    attack = TargetedPgd(ThreatModel(norm, epsilon), steps=60, step_size=epsilon)
    x_adv = attack.towards(model, x, target, generator=_generator())
    w = (model[1].weight[target] - model[1].weight[1 - target]).detach()
    gain = epsilon * (w.abs().sum(1) if norm == "linf" else w.norm(dim=1))

    def lead(images):
        logits = model(images).detach()
        return logits.gather(1, target[:, None])[:, 0] - logits.gather(1, 1 - target[:, None])[:, 0]

    torch.testing.assert_close(lead(x_adv), lead(x) + gain, rtol=0, atol=1e-6)
    assert bool(attack.threat_model.contains(x_adv, x).all())
    assert not x_adv.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(attack.towards(model, x, target, generator=_generator()), x_adv)
    nowhere = TargetedPgd(ThreatModel(norm, 0.0), steps=2)
    assert torch.equal(nowhere.towards(model, x, target, generator=_generator()), x)


class _Some:
    """Hits the target where the first pixel is bright, and then only classes above the image's own."""

    def towards(self, model, x, target, *, generator):
        own = x[:, 0, 0, 1].mul(3).round().long()
        reached = torch.where((x[:, 0, 0, 0] > 0.5) & (target > own), target, own)
        images = x.clone()
        images[:, 0, 0, 1] = reached / 3
        return images


class _Second(nn.Module):
    """Four classes, told by the second pixel."""

    def forward(self, x):
        return -(x[:, 0, 0, 1, None] * 3 - torch.arange(4)).abs()


def test_the_matrix_counts_hits_by_class_and_target():
    y = torch.tensor([0, 0, 1, 1, 1, 2])
    x = torch.zeros(6, 1, 2, 2)
    x[:, 0, 0, 1] = y / 3
    x[[0, 2, 3, 5], 0, 0, 0] = 1.0
    matrix = success_matrix(_Some(), _Second(), x, y, 4, generator=_generator(), batch_size=4)
    expected = torch.tensor(
        [[torch.nan, 0.5, 0.5, 0.5], [0, torch.nan, 2 / 3, 2 / 3], [0, 0, torch.nan, 1.0], [torch.nan] * 4]
    ).double()
    torch.testing.assert_close(matrix, expected, equal_nan=True, rtol=0, atol=1e-7)


def test_wrong_settings_are_refused():
    for wrong in ({"steps": 0}, {"step_size": -1.0}):
        with pytest.raises(InputError):
            TargetedPgd(**wrong)
    assert "PGD-40" in str(TargetedPgd())
