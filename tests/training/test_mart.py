"""MART by hand, and what it reduces to."""

import pytest
import torch
from methods import batch_of, loss_and_gradients, state_of

from nas.attacks.fixed import Fixed
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Batch
from nas.threat_model import ThreatModel
from nas.training.mart import Mart, boosted_cross_entropy


def _by_hand(model, x, x_adv, y, beta):
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    total = 0
    for i, label in enumerate(y.tolist()):
        others = [k for k in range(p.shape[1]) if k != label]
        boosted = -q[i, label].log() - (1.0001 - q[i, others].max()).log()
        divergence = sum(p[i, k] * (p[i, k] / q[i, k]).log() for k in range(p.shape[1]))
        total = total + boosted + beta * divergence * (1 - p[i, label])
    return total / len(y)


def test_the_loss_and_its_gradient_by_hand(network):
    model, batch = network().double(), batch_of()
    x_adv = (batch.x + 0.1 * torch.randn(batch.x.shape, dtype=torch.float64).sign()).clamp(0, 1)
    loss, gradients = loss_and_gradients(Mart(Fixed(x_adv), beta=2.5), model, batch)
    expected = _by_hand(model, batch.x, x_adv, batch.y, 2.5)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
    # The weight 1 - p_y is followed as well: detached, this would differ.
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_without_the_divergence_it_is_the_boosted_cross_entropy(network):
    model, batch = network().double().eval(), batch_of()
    attack = Pgd(ThreatModel("linf", 0.1), steps=2)
    loss, _ = Mart(attack, beta=0.0)(model, batch, state_of())
    x_adv = attack(model, batch.x, batch.y, generator=state_of().attack_generator)
    torch.testing.assert_close(loss, boosted_cross_entropy(model(x_adv).log_softmax(1), batch.y))


def test_images_that_are_certain_do_not_count_in_the_divergence(network):
    """Of two images, the divergence of the one that the network is sure of is weighed with nothing."""

    class Sure(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1)[:, 0] * 2000 - 1000, x.flatten(1)[:, 1]], 1)

    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    x[0, 0, 0, 0] = 1.0  # certain of class 0
    x[1, 0, 0, 0] = 0.5  # undecided
    x_adv = x.clone()
    x_adv[0, 0, 0, 1] = 1.0
    batch = Batch(x, torch.tensor([0, 0]), torch.arange(2))
    _, still = Mart(Fixed(x_adv), beta=1.0)(Sure(), batch, state_of())
    assert float(still["divergence"]) == pytest.approx(0, abs=1e-12)
    x_adv[1, 0, 0, 1] = 1.0
    _, moved = Mart(Fixed(x_adv), beta=1.0)(Sure(), batch, state_of())
    assert float(moved["divergence"]) > 0.01


def test_the_runner_up_is_never_the_right_class():
    log_p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    found = boosted_cross_entropy(log_p, torch.tensor([0]))
    expected = -torch.log(torch.tensor(0.7)) - torch.log(torch.tensor(1.0001 - 0.2))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_bad_settings():
    for beta in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError):
            Mart(beta=beta)
