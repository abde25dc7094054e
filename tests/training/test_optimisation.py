"""The schedules, and the weight step against its formula."""

import copy
import math

import pytest
import torch
from torch import nn

from nas.errors import InputError
from nas.optimisation import Sgd, optimiser_tree, restore_optimiser, weight_step

PROGRESS = [i / 1000 for i in range(1001)]


def test_cosine_falls_from_the_first_to_the_last_rate():
    sgd = Sgd(0.1, schedule="cosine", final_learning_rate=0.01)
    rates = [sgd.rate(progress) for progress in PROGRESS]
    assert rates[0] == pytest.approx(0.1)
    assert rates[500] == pytest.approx(0.055)
    assert rates[-1] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)
    for progress, rate in zip(PROGRESS, rates, strict=True):
        assert rate == pytest.approx(0.01 + 0.09 * math.cos(math.pi * progress / 2) ** 2)


def test_steps_multiply_at_each_milestone():
    sgd = Sgd(1.0, schedule="steps", milestones=(0.25, 0.5, 0.9), decay=0.1)
    for progress, rate in [(0, 1), (0.2499, 1), (0.25, 0.1), (0.4999, 0.1), (0.5, 0.01), (0.95, 0.001)]:
        assert sgd.rate(progress) == pytest.approx(rate)


def test_one_cycle_rises_to_the_peak_and_falls_to_the_end():
    sgd = Sgd(0.4, schedule="one_cycle", warmup=0.3, final_learning_rate=0.0)
    rates = [sgd.rate(progress) for progress in PROGRESS]
    assert max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) == 300
    assert 0 < rates[0] < 0.01
    assert rates[150] == pytest.approx(0.2)
    assert rates[650] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.0)
    assert all(rate >= 0 for rate in rates)


def test_constant_is_constant():
    assert {Sgd(0.3, schedule="constant").rate(progress) for progress in PROGRESS} == {0.3}


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
def test_weight_step_is_clipped_sgd_with_momentum_and_decay(clip):
    """Three steps against the formulas, in float64; parameters that were not named do not move."""
    torch.manual_seed(0)
    layer, other = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    sgd = Sgd(0.1, momentum=0.8, weight_decay=0.02, clip=clip)
    parameters = list(layer.parameters())
    optimiser = sgd.optimiser(parameters)
    weights = [parameter.detach().clone() for parameter in parameters]
    buffers = [torch.zeros_like(weight) for weight in weights]
    untouched = other.weight.detach().clone()
    x = torch.randn(5, 3, dtype=torch.float64)
    for rate in (0.1, 0.05, 0.2):
        loss = (layer(x) + other(x)).square().mean()
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        shrink = min(1.0, clip / (length + 1e-6)) if clip else 1.0
        for weight, buffer, gradient in zip(weights, buffers, gradients, strict=True):
            buffer.mul_(0.8).add_(shrink * gradient + 0.02 * weight)
            weight.sub_(rate * buffer)
        weight_step(loss, parameters, optimiser, rate, sgd.clip)
        for parameter, weight in zip(parameters, weights, strict=True):
            torch.testing.assert_close(parameter.detach(), weight, rtol=1e-9, atol=1e-12)
            assert parameter.grad is None
    assert torch.equal(other.weight, untouched)
    assert other.weight.grad is None


def test_parameters_the_loss_does_not_use_are_left_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimiser = Sgd(0.1, weight_decay=0.5).optimiser([used, unused])
    weight_step(used.square().sum(), [used, unused], optimiser, 0.1, 5.0)
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize(
    "loss_of", [torch.sum, lambda total: (total - 1).square().sum() / 2], ids=["expanded", "shared"]
)
def test_gradients_that_share_memory_are_clipped_once(loss_of, clip):
    """autograd.grad hands out one tensor for two weights that are added, and an expanded one for a sum."""
    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimiser = Sgd(1.0, momentum=0.0, weight_decay=0.0).optimiser([first, second])
    loss = loss_of(first + second)
    (slope,) = {float(value) for value in torch.autograd.grad(loss, first, retain_graph=True)[0]}
    weight_step(loss, [first, second], optimiser, 1.0, clip)
    for parameter in (first, second):
        expected = torch.full((4,), -slope * (clip / 8**0.5 if clip else 1))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_optimiser_goes_on_from_its_tree(kind, momentum):
    def make():
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
        if kind == "adam":
            return parameters, torch.optim.Adam(parameters, betas=(momentum, 0.99), weight_decay=0.1)
        return parameters, Sgd(0.1, momentum=momentum).optimiser(parameters)

    def step(parameters, optimiser):
        weight_step(sum(p.pow(4).sum() for p in parameters), parameters, optimiser, 0.05, 1.0)

    parameters, optimiser = make()
    for _ in range(3):
        step(parameters, optimiser)
    tree = copy.deepcopy(optimiser_tree(optimiser))  # as a file would
    weights = [parameter.detach().clone() for parameter in parameters]
    fresh, again = make()
    with torch.no_grad():
        for parameter, weight in zip(fresh, weights, strict=True):
            parameter.copy_(weight)
    restore_optimiser(again, tree)
    for _ in range(2):
        step(parameters, optimiser)
        step(fresh, again)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fresh, parameters, strict=True))


def test_wrong_settings_are_refused():
    nan = float("nan")
    for settings in (
        {"learning_rate": 0.0}, {"learning_rate": -1.0}, {"learning_rate": nan}, {"momentum": 1.0}, {"momentum": -0.1},
        {"weight_decay": -1e-4}, {"clip": -1.0}, {"clip": nan}, {"warmup": 0.0}, {"warmup": 1.0},
        {"milestones": (0.5, 1.5)}, {"milestones": (0.0,)},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Sgd(**settings)
