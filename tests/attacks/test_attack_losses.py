"""The attack losses against their formulas, written out sample by sample."""

import math

import pytest
import torch

from nas.attacks.gradient import clean_logits_for, input_gradient
from nas.attacks.losses import LOSSES, cross_entropy, kl, margin


def _logits(n=20, classes=5, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


def test_margin_by_hand():
    logits, y = _logits()
    expected = [
        max(value for label, value in enumerate(row) if label != right) - row[right]
        for row, right in zip(logits.tolist(), y.tolist(), strict=True)
    ]
    assert margin(logits, y, None).tolist() == expected
    assert torch.equal(margin(logits, y, None) > 0, logits.argmax(1) != y)


def test_cross_entropy_by_hand():
    logits, y = _logits()
    expected = [
        math.log(sum(math.exp(value) for value in row)) - row[right]
        for row, right in zip(logits.tolist(), y.tolist(), strict=True)
    ]
    assert cross_entropy(logits, y, None).tolist() == pytest.approx(expected, abs=1e-12)


def test_kl_by_hand():
    logits, y = _logits(seed=1)
    clean, _ = _logits(seed=2)
    expected = []
    for row, clean_row in zip(logits.tolist(), clean.tolist(), strict=True):
        q = [math.exp(value) / sum(map(math.exp, row)) for value in row]
        p = [math.exp(value) / sum(map(math.exp, clean_row)) for value in clean_row]
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert kl(logits, y, clean).tolist() == pytest.approx(expected, abs=1e-12)
    assert min(expected) > 0


def test_kl_is_zero_with_zero_gradient_at_the_clean_point():
    clean, y = _logits()
    logits = clean.clone().requires_grad_()
    losses = kl(logits, y, clean)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert float(losses.detach().abs().max()) < 1e-14
    assert float(gradient.abs().max()) < 1e-14
    (elsewhere,) = torch.autograd.grad(kl(logits * 1.5, y, clean).sum(), logits)
    assert float(elsewhere.abs().amax(1).min()) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits_give_finite_losses_and_gradients(loss):
    logits, y = _logits()
    point = (1e4 * logits.float()).requires_grad_()
    losses = LOSSES[loss](point, y, 1e4 * logits.float().flip(1))
    (gradient,) = torch.autograd.grad(losses.sum(), point)
    assert bool(torch.isfinite(losses).all())
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_input_gradient_is_the_derivative(loss):
    """Against central differences in float64; summed, so a sample's gradient is its own."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()
    x = torch.rand(3, 1, 3, 3, dtype=torch.float64)
    y = torch.tensor([0, 2, 1])
    clean = clean_logits_for(loss, model, x * 0.9)
    assert (clean is None) == (loss != "kl")
    gradient, losses, logits = input_gradient(model, x, y, loss, clean)
    assert torch.equal(logits, model(x).detach())
    torch.testing.assert_close(losses, LOSSES[loss](logits, y, clean))
    step = 1e-6
    for position in range(9):
        shift = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
        shift.view(-1)[position] = step
        ahead, behind = (LOSSES[loss](model(x + sign * shift), y, clean).detach() for sign in (1, -1))
        slope = gradient.flatten(1)[:, position]
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
