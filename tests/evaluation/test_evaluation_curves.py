"""Curves against the exact accuracy of a linear model, transfer, expectation and the gallery."""

import pytest
import torch
from torch import nn

from nas.evaluation.curves import epsilon_curve, step_curve, transfer
from nas.evaluation.expectation import Expectation
from nas.evaluation.gallery import gallery
from nas.threat_model import ThreatModel

BALL = ThreatModel("linf", 0.04)


def _linear(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 16, generator=generator))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
    x = 0.4 + 0.2 * torch.rand(200, 1, 4, 4, generator=generator)
    with torch.no_grad():
        y = model(x).argmax(1)
        margins = model(x)[torch.arange(200), y] - model(x)[torch.arange(200), 1 - y]
    reach = (model[1].weight[0] - model[1].weight[1]).abs().sum().detach()
    return model, x, y, margins, reach


def test_the_epsilon_curve_of_a_linear_model_is_exact_and_never_rises():
    model, x, y, margins, reach = _linear()
    points = epsilon_curve(model, x, y, BALL, seed=0, multiples=(1.0, 0.25, 3.0), batch_size=64)
    assert [point["epsilon"] for point in points] == pytest.approx([0, 0.01, 0.04, 0.12])
    for point in points:
        exact = float((margins > point["epsilon"] * reach).double().mean())
        assert point["accuracy"] == pytest.approx(exact, abs=0.011)
    accuracies = [point["accuracy"] for point in points]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] < accuracies[0]


def test_the_step_curve_ends_level_at_the_worst_case():
    model, x, y, margins, reach = _linear()
    points = step_curve(model, x, y, BALL, seed=0, steps=(50, 1, 20))
    assert [point["steps"] for point in points] == [1, 20, 50]
    exact = float((margins > BALL.epsilon * reach).double().mean())
    assert points[1]["accuracy"] == points[2]["accuracy"] == pytest.approx(exact, abs=0.006)
    assert points[0]["accuracy"] > exact, "one step from a random start does not reach the corner"


def test_examples_for_the_network_itself_transfer_and_those_for_another_do_less():
    model, x, y, margins, reach = _linear()
    other, *_ = _linear(seed=5)
    found = transfer(model, {"itself": model, "other": other}, x, y, BALL, seed=0)
    exact = float((margins > BALL.epsilon * reach).double().mean())
    assert found["from"]["itself"] == pytest.approx(exact, abs=0.006)
    assert found["from"]["other"] > exact + 0.1
    assert found["worst_case"] <= min(found["from"].values())


def test_the_expectation_of_a_random_model_has_the_mean_gradient():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 3)

        def forward(self, x):
            return self.linear((x * (1 + torch.randn_like(x))).flatten(1))

    torch.manual_seed(0)
    model, x = Noisy(), torch.rand(4, 1, 4, 4, requires_grad=True)

    def gradient(network):
        return torch.autograd.grad(network(x)[:, 0].sum(), x)[0].flatten(1)

    mean = model.linear.weight[0].detach().expand(4, 16)
    few, many = gradient(model), gradient(Expectation(model, 400))
    assert float((many - mean).norm() / mean.norm()) < 0.15 < float((few - mean).norm() / mean.norm())
    with pytest.raises(ValueError, match="at least 1"):
        Expectation(model, 0)


def test_the_gallery_shows_right_images_and_what_became_of_them():
    model, x, y, margins, reach = _linear()
    pairs = gallery(model, x, y, BALL, seed=0, pairs=6)
    assert len(pairs) == 6
    for index, pair in enumerate(pairs):
        assert pair.label == pair.seen_clean == int(y[index])
        assert float((pair.adversarial - pair.clean).abs().max()) <= BALL.epsilon + 1e-6
        assert (pair.seen_adversarial != pair.label) == bool(margins[index] < BALL.epsilon * reach)
