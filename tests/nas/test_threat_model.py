"""The geometry of the threat models: nearest points, steepest directions, uniform draws."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from nas.errors import InputError
from nas.threat_model import NORMS, ThreatModel

THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.8), ThreatModel("l1", 0.3)]
DUAL = {
    "linf": lambda g: g.flatten(1).abs().sum(1),
    "l2": lambda g: g.flatten(1).square().sum(1).sqrt(),
    "l1": lambda g: g.flatten(1).abs().amax(1),
}
SIZE = {
    "linf": lambda d: d.flatten(1).abs().amax(1),
    "l2": lambda d: d.flatten(1).square().sum(1).sqrt(),
    "l1": lambda d: d.flatten(1).abs().sum(1),
}


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_projection_lands_in_the_set_keeps_its_points_and_is_idempotent(threat_model):
    x = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = x + _random(50, 3, 4, 4)
    near = threat_model.project(far, x)
    assert float(threat_model.distance(near, x).max()) <= threat_model.epsilon + 1e-12
    assert 0 <= near.min() <= near.max() <= 1
    torch.testing.assert_close(threat_model.project(near, x), near, rtol=0, atol=1e-15)
    inside = threat_model.random_start(x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(threat_model.project(inside, x), inside, rtol=0, atol=1e-12)
    assert torch.equal(threat_model.project(x, x), x)


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_what_lies_outside_the_ball_or_the_bounds_is_not_contained(threat_model):
    x = 0.5 + 0.1 * _random(20, 3, 8, 8).clamp(-1, 1)
    edge = x + threat_model.epsilon * threat_model.geometry.steepest(_random(20, 3, 8, 8, seed=1))
    assert bool(threat_model.contains(edge, x).all())
    assert not bool(threat_model.contains(x + 1.001 * (edge - x), x).any())
    bright = x.clone()
    bright[:, 0, 0, 0] = 1.01
    assert not bool(ThreatModel(threat_model.norm, 9.0).contains(bright, x).any())


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_shrink_finds_the_nearest_point_of_the_ball(threat_model):
    """No point of the ball, however drawn, is nearer."""
    geometry, epsilon = threat_model.geometry, threat_model.epsilon
    delta = _random(20, 1, 2, 2)
    nearest = geometry.shrink(delta, epsilon)
    distance = (delta - nearest).flatten(1).norm(dim=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        other = geometry.draw(delta, epsilon, generator)
        assert bool(((delta - other).flatten(1).norm(dim=1) >= distance - 1e-12).all())
        toward = nearest + 0.05 * (other - nearest)  # near the nearest point as well
        assert bool(((delta - toward).flatten(1).norm(dim=1) >= distance - 1e-12).all())


@pytest.mark.parametrize("norm", NORMS)
def test_size_is_the_norm(norm):
    delta = _random(9, 2, 3, 3)
    torch.testing.assert_close(NORMS[norm].size(delta), SIZE[norm](delta))


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e-38, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_direction_is_of_unit_size_and_attains_the_dual_norm(norm, dtype, scale):
    """<g, s(g)> = |g|_1 for l_inf, |g|_2 for l_2, |g|_inf for l_1; squares of gradients may under- or overflow."""
    gradient = _random(7, 1, 4, 4, dtype=dtype)
    gradient = (gradient.sign() * gradient.abs().clamp_min(0.1)) * scale
    direction = NORMS[norm].steepest(gradient).double()
    torch.testing.assert_close(SIZE[norm](direction), torch.ones(7).double(), rtol=1e-5, atol=0)
    unscaled = gradient.double() / scale
    torch.testing.assert_close((direction * unscaled).flatten(1).sum(1), DUAL[norm](unscaled), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_direction(norm):
    assert torch.equal(NORMS[norm].steepest(torch.zeros(2, 1, 3, 3)), torch.zeros(2, 1, 3, 3))


def test_the_linf_start_is_uniform():
    threat_model = ThreatModel("linf", 0.1)
    x = torch.full((200, 1, 5, 5), 0.5, dtype=torch.float64)
    start = threat_model.random_start(x, torch.Generator().manual_seed(0))
    shares = ((start - x) / 0.1 + 1) / 2
    assert stats.kstest(shares.flatten().numpy(), "uniform").pvalue > 1e-3
    # Pixels are independent: the largest of 25 follows U^25, and neighbours are not correlated.
    assert stats.kstest((shares.flatten(1).amax(1) ** 25).numpy(), "uniform").pvalue > 1e-3
    columns = shares.flatten(1)
    assert abs(float(torch.corrcoef(torch.stack([columns[:, 0], columns[:, 1]]))[0, 1])) < 0.25


def test_the_l2_start_is_uniform():
    """The radius to the power of the dimension is uniform, the square of one coordinate of the direction is Beta."""
    threat_model, dimension = ThreatModel("l2", 0.3), 12
    x = torch.full((3000, 3, 2, 2), 0.5, dtype=torch.float64)
    delta = (threat_model.random_start(x, torch.Generator().manual_seed(0)) - x).flatten(1)
    radius = delta.norm(dim=1)
    assert stats.kstest(((radius / 0.3) ** dimension).numpy(), "uniform").pvalue > 1e-3
    square = (delta[:, 4] / radius) ** 2
    assert stats.kstest(square.numpy(), "beta", args=(0.5, (dimension - 1) / 2)).pvalue > 1e-3
    assert abs(float(delta.sign().mean())) < 0.02


def test_the_l1_start_is_uniform():
    """The radius to the power of the dimension is uniform, the share of one coordinate is Beta(1, D - 1)."""
    threat_model, dimension = ThreatModel("l1", 0.3), 12
    x = torch.full((3000, 3, 2, 2), 0.5, dtype=torch.float64)
    delta = (threat_model.random_start(x, torch.Generator().manual_seed(0)) - x).flatten(1)
    radius = delta.abs().sum(1)
    assert stats.kstest(((radius / 0.3) ** dimension).numpy(), "uniform").pvalue > 1e-3
    share = delta[:, 4].abs() / radius
    assert stats.kstest(share.numpy(), "beta", args=(1, dimension - 1)).pvalue > 1e-3
    assert abs(float(delta.sign().mean())) < 0.02


@pytest.mark.parametrize("epsilon", [0.05, 0.7, 2.5])
def test_the_l1_projection_is_the_solution_of_its_quadratic_programme(epsilon):
    """min |d - v|^2 with |d|_1 <= eps and x + d in the box, with d split into rise and fall, by scipy."""
    x = torch.rand(4, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 0, 0, 0], x[1, 0, 1, 2] = 0.0, 1.0
    wanted = _random(4, 1, 2, 3)
    found = (ThreatModel("l1", epsilon).project(x + wanted, x) - x).flatten(1)
    for row in range(4):
        v, here = wanted[row].flatten().numpy(), x[row].flatten().numpy()

        def cost(parts, v=v):
            return ((parts[:6] - parts[6:] - v) ** 2).sum()

        solution = optimize.minimize(
            cost,
            [0.0] * 12,
            method="SLSQP",
            bounds=[(0, 1 - value) for value in here] + [(0, value) for value in here],
            constraints={"type": "ineq", "fun": lambda parts: epsilon - parts.sum()},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert found[row].tolist() == pytest.approx(solution.x[:6] - solution.x[6:], abs=1e-5)
        assert ((found[row].numpy() - v) ** 2).sum() <= solution.fun + 1e-9


def test_l1_at_the_bounds_keeps_the_whole_budget():
    """Half of the pixels cannot move where the perturbation wants to; the others take their share."""
    x = torch.cat([torch.ones(5, 1, 4, 4), torch.full((5, 1, 4, 4), 0.5)], 2)
    near = ThreatModel("l1", 1.0).project(x + 0.4, x)
    assert (near - x).flatten(1).sum(1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_starts_are_clipped_to_the_pixel_range(threat_model):
    x = torch.cat([torch.zeros(20, 1, 4, 4), torch.ones(20, 1, 4, 4)])
    start = threat_model.random_start(x, torch.Generator().manual_seed(0))
    assert 0 <= start.min() <= start.max() <= 1
    assert 0.3 < float((start == x).double().mean()) < 0.7, "half of the draws leave the range"


def test_other_pixel_bounds_hold():
    threat_model = ThreatModel("linf", 5.0, lower=-1.0, upper=2.0)
    projected = threat_model.project(_random(3, 1, 4, 4) * 9, torch.zeros(3, 1, 4, 4, dtype=torch.float64))
    assert (projected.min(), projected.max()) == (-1, 2)


def test_single_precision_stays_within_a_millionth():
    for threat_model in THREATS:
        x = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        near = threat_model.project(x + _random(100, 3, 8, 8, dtype=torch.float32), x)
        assert float(SIZE[threat_model.norm]((near - x).double()).max()) <= threat_model.epsilon + 1e-6


def test_wrong_threat_models_are_refused():
    for settings in (
        {"norm": "l3"},
        {"epsilon": -0.1},
        {"epsilon": math.nan},
        {"epsilon": math.inf},
        {"lower": 1.0, "upper": 1.0},
        {"lower": math.nan},
    ):
        with pytest.raises(InputError):
            ThreatModel(**settings)
    with pytest.raises(InputError, match="linf"):
        ThreatModel("lin")


@pytest.mark.parametrize("norm", NORMS)
def test_edges_and_dual_norms(norm):
    delta, generator = _random(9, 2, 3, 3), torch.Generator().manual_seed(0)
    edge = NORMS[norm].edge(delta, 0.7, generator)
    torch.testing.assert_close(SIZE[norm](edge), torch.full((9,), 0.7).double())
    assert 0.3 < float((edge > 0).double().mean()) < 0.7
    torch.testing.assert_close(NORMS[norm].dual(delta), DUAL[norm](delta))


def _smallest_move(norm, x, normal, height):
    """The size of the solution of the linear or quadratic programme, by scipy; None where there is none."""
    d = len(x)
    bounds = [(-value, 1 - value) for value in x]
    if norm == "l2":
        solution = optimize.minimize(
            lambda move: (move**2).sum(),
            [0.0] * d,
            jac=lambda move: 2 * move,
            method="SLSQP",
            bounds=bounds,
            constraints={"type": "eq", "fun": lambda move: normal @ move + height, "jac": lambda move: normal},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        return solution.fun**0.5 if solution.success else None
    # Variables: the move, then a bound of each size (l_1: their sum, l_inf: all the same) is minimised.
    sizes = np.eye(d) if norm == "l1" else np.ones((d, 1))
    above = np.block([[np.eye(d), -sizes], [-np.eye(d), -sizes]])
    solution = optimize.linprog(
        [0.0] * d + [1.0] * sizes.shape[1],
        A_ub=above,
        b_ub=[0.0] * 2 * d,
        A_eq=[[*normal, *[0.0] * sizes.shape[1]]],
        b_eq=[-height],
        bounds=bounds + [(0, None)] * sizes.shape[1],
    )
    return solution.fun if solution.success else None


@pytest.mark.parametrize("norm", NORMS)
def test_the_smallest_move_onto_a_plane(norm):
    """Against scipy; where the box does not reach the plane, every pixel goes to its end."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 1, 2, 4, generator=generator, dtype=torch.float64)
    x[0, 0, 0, :2], x[1, 0, 1] = 0.0, 1.0
    normal = _random(60, 1, 2, 4, seed=1)
    normal[2, 0, 0] = 0
    height = 2.5 * _random(60, seed=2)
    height[3] = 0
    move = NORMS[norm].onto_plane(x, normal, height, 0.0, 1.0)
    assert float((x + move).min()) >= -1e-12
    assert float((x + move).max()) <= 1 + 1e-12
    reached = (normal * move).flatten(1).sum(1) + height
    missed = 0
    for row in range(60):
        flat, weights = x[row].flatten().numpy(), normal[row].flatten().numpy()
        least = _smallest_move(norm, flat, weights, float(height[row]))
        if least is None:
            missed += 1
            ends = torch.where(normal[row] * height[row] > 0, 0.0, 1.0)
            there = (x[row] + move[row] == ends) | (normal[row] == 0)
            assert bool(there.all()), row
        else:
            assert abs(float(reached[row])) < 1e-9
            assert float(NORMS[norm].size(move[row : row + 1])) == pytest.approx(least, rel=1e-5, abs=1e-7)
    assert 0 < missed < 30


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e15])
def test_planes_of_tiny_and_huge_gradients(norm, scale):
    x = torch.full((3, 1, 4, 4), 0.5)
    normal = _random(3, 1, 4, 4, dtype=torch.float32)
    height = torch.tensor([0.1, -0.2, 0.3])
    expected = NORMS[norm].onto_plane(x, normal, height, 0.0, 1.0)
    found = NORMS[norm].onto_plane(x, normal * scale, height * scale, 0.0, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    nowhere = NORMS[norm].onto_plane(x, torch.zeros_like(x), height, 0.0, 1.0)
    assert torch.equal(nowhere, torch.zeros_like(x))
