"""The min-norm point of two gradients: optimal by brute force, and a descent direction for both."""

import math

import pytest
import torch

from nas.min_norm import min_norm_direction, min_norm_weight


def _random(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, size, generator=generator, dtype=torch.float64)


def _pairs():
    for seed in range(40):
        first, second = _random(seed)
        yield f"random {seed}", first, second * 10.0 ** (seed % 7 - 3)
        yield f"acute {seed}", first, first + 0.3 * second
        yield f"obtuse {seed}", first, -first + 0.3 * second
    first, second = _random(99)
    yield "parallel", first, 3 * first
    yield "parallel, shorter second", first, 0.2 * first
    yield "opposite", first, -2 * first
    yield "equal and opposite", first, -first
    yield "equal", first, first.clone()
    yield "one is zero", first, torch.zeros(6).double()
    yield "other is zero", torch.zeros(6).double(), second
    yield "both are zero", torch.zeros(6).double(), torch.zeros(6).double()
    yield "tiny", 1e-150 * first, 1e-150 * second
    yield "huge", 1e150 * first, 1e150 * second


PAIRS = {name: (first, second) for name, first, second in _pairs()}


def test_the_direction_descends_on_both_objectives():
    """d.u1 >= |d|^2 and d.u2 >= |d|^2, and d lies between them."""
    for name, (first, second) in PAIRS.items():
        direction, gamma = min_norm_direction(first, second)
        assert 0 <= gamma <= 1, name
        torch.testing.assert_close(direction, gamma * first + (1 - gamma) * second)
        scale = float(torch.maximum(first.abs().max(), second.abs().max())) or 1.0
        unit, length = direction / scale, float((direction / scale).square().sum())
        for gradient in (first / scale, second / scale):
            assert float(unit @ gradient) >= length - 1e-12, name


def test_no_other_weight_gives_a_shorter_vector():
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    for name, (first, second) in PAIRS.items():
        direction, _ = min_norm_direction(first, second)
        lengths = (grid * first + (1 - grid) * second).norm(dim=1)
        assert float(direction.norm()) <= float(lengths.min()) * (1 + 1e-12) + 1e-300, name


def test_cases_by_hand():
    first, second = PAIRS["opposite"]
    assert min_norm_weight(first, second) == pytest.approx(2 / 3)
    assert float(min_norm_direction(first, second)[0].abs().max()) < 1e-15, "a Pareto-stationary point"
    assert min_norm_weight(*PAIRS["parallel"]) == 1.0
    assert min_norm_weight(*PAIRS["parallel, shorter second"]) == 0.0
    assert min_norm_weight(*PAIRS["one is zero"]) == 0.0
    assert min_norm_weight(*PAIRS["other is zero"]) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_gradients_give_one_half_and_not_nan(dtype):
    gradient = _random(0)[0].to(dtype)
    direction, gamma = min_norm_direction(gradient, gradient.clone())
    assert gamma == 0.5
    torch.testing.assert_close(direction, gradient)
    assert min_norm_weight(torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype)) == 0.5


@pytest.mark.parametrize(("scale", "gamma"), [(1.0, 0.5), (0.5, 0.2), (0.1, 0.0099)])
def test_the_table_of_adversarial_gradient_scales(scale, gamma):
    """Orthogonal gradients of equal length: gamma is scale^2 / (1 + scale^2), the step leans to the scaled one."""
    natural, adversarial = torch.tensor([1.0, 0.0]), scale * torch.tensor([0.0, 1.0])
    direction, found = min_norm_direction(natural, adversarial)
    assert found == pytest.approx(gamma, abs=5e-5)
    assert found == pytest.approx(scale**2 / (1 + scale**2))
    assert float(direction[1] / direction[0]) == pytest.approx(1 / scale, rel=1e-5)


def test_single_precision_gradients_are_combined_in_double():
    """In float32 the product of a long gradient and a small difference would lose what decides."""
    noise = 1e-2 * _random(3, 1000)
    first, second = (300 + noise - noise.mean(1, keepdim=True)).float()
    exact = float(
        (second.double() - first.double()) @ second.double() / (second.double() - first.double()).square().sum()
    )
    assert 0 < exact < 1
    assert min_norm_weight(first, second) == pytest.approx(exact, rel=1e-12)
    naive = float((second - first) @ second / (second - first).square().sum())
    assert abs(naive - exact) > 1e-5
    assert math.isfinite(min_norm_weight(first * 1e25, second * 1e25))
