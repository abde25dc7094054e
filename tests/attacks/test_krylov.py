"""The Krylov attack against explicit Hessians, full trust-region optima and plain gradient steps."""

import pytest
import torch
from torch import nn

from nas.attacks.krylov import Krylov, lanczos, newton, second_order, trust_region
from nas.attacks.losses import LOSSES
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.threat_model import ThreatModel

THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.7)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _smooth(inputs=12, dtype=torch.float64):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 9), nn.Tanh(), nn.Linear(9, 3))
    with torch.no_grad():
        model[1].weight *= 3
        model[3].weight *= 3
    return model.to(dtype).eval()


def _images(n=6, shape=(1, 3, 4), dtype=torch.float64):
    x = 0.2 + 0.6 * torch.rand(n, *shape, generator=_generator(2), dtype=dtype)
    return x, torch.arange(n) % 3


def _losses(model, y):
    return lambda images: LOSSES["cross_entropy"](model(images), y, None)


def _quadratic(seed, n=4, size=6, shift=0.0):
    """Gradients [n, D] and symmetric Hessians [n, D, D], with ``shift`` added to every curvature."""
    g = torch.randn(n, size, generator=_generator(seed), dtype=torch.float64)
    h = torch.randn(n, size, size, generator=_generator(seed + 1), dtype=torch.float64)
    return g, (h + h.transpose(1, 2)) / 2 + shift * torch.eye(size, dtype=torch.float64)


def _rise(g, h, d):
    return (g * d).sum(1) + torch.einsum("nd,nde,ne->n", d, h, d) / 2


def _climb(g, h, dimensions, radius):
    basis, matrix, counts = lanczos(g, lambda v: torch.einsum("nde,ne->nd", h, v), dimensions)
    radii = torch.full((len(g),), radius, dtype=g.dtype)
    return torch.einsum("nmd,nm->nd", basis, trust_region(matrix[:, :-1], g.norm(dim=1), radii, counts)), counts


def test_products_are_those_of_the_explicit_hessian():
    model, (x, y) = _smooth(), _images()
    gradient, exact = second_order(_losses(model, y), x)
    _, differences = second_order(_losses(model, y), x, exact=False)
    v = torch.randn(len(x), 12, generator=_generator(), dtype=torch.float64)
    u = torch.randn(len(x), 12, generator=_generator(1), dtype=torch.float64)
    for i in range(len(x)):
        loss = _losses(model, y[i : i + 1])
        hessian = torch.autograd.functional.hessian(lambda image, loss=loss: loss(image[None]).sum(), x[i])
        expected = hessian.reshape(12, 12) @ v[i]
        torch.testing.assert_close(exact(v)[i], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(differences(v)[i], expected, rtol=1e-3, atol=2e-3 * float(expected.norm()))
    torch.testing.assert_close((u * exact(v)).sum(1), (v * exact(u)).sum(1), rtol=0, atol=1e-9)
    assert float(gradient.abs().amin()) >= 0


def test_the_basis_is_orthonormal_and_makes_the_hessian_tridiagonal():
    g, h = _quadratic(0)
    basis, matrix, counts = lanczos(g, lambda v: torch.einsum("nde,ne->nd", h, v), 5)
    eye = torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
    torch.testing.assert_close(basis @ basis.transpose(1, 2), eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(basis @ h @ basis.transpose(1, 2), matrix[:, :-1], rtol=0, atol=1e-9)
    assert counts.tolist() == [5] * 4


@pytest.mark.parametrize("radius", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("shift", [0.0, 6.0, -6.0])
def test_the_quadratic_model_rises_with_the_dimension_up_to_its_maximum_in_the_ball(radius, shift):
    """All dimensions: no point of the ball is higher (checked against many, and by the condition of optimality)."""
    g, h = _quadratic(3, shift=shift)
    rises = torch.stack([_rise(g, h, _climb(g, h, m, radius)[0]) for m in range(1, 7)])
    assert float((rises[1:] - rises[:-1]).min()) >= -1e-9
    d, _ = _climb(g, h, 6, radius)
    assert float(d.norm(dim=1).max()) <= radius * (1 + 1e-9)
    points = torch.randn(4000, 6, generator=_generator(5), dtype=torch.float64)
    points = radius * points / points.norm(dim=1, keepdim=True)
    points = torch.cat([points, 0.5 * points])
    for i in range(4):
        n = len(points)
        others = _rise(g[i].expand(n, -1), h[i].expand(n, -1, -1), points)
        assert float(others.max()) <= float(rises[-1, i]) + 1e-9
    mu = ((g + torch.einsum("nde,ne->nd", h, d)) * d).sum(1) / d.square().sum(1)  # g + H d = mu d
    residual = g + torch.einsum("nde,ne->nd", h, d) - mu.unsqueeze(1) * d
    assert float(residual.norm(dim=1).max()) < 1e-6 * float(g.norm(dim=1).max() + 20)
    assert bool((mu >= torch.linalg.eigvalsh(h)[:, -1].clamp_min(0) - 1e-6).all())


def test_the_hard_case_is_filled_up_along_the_top_curvature():
    """c has nothing along the top eigenvector and the ball is large: the maximum lies on its edge all the same."""
    matrix = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)).unsqueeze(0)
    length, radius = torch.tensor([1.0], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)
    inner = trust_region(matrix, length, radius)
    assert float(inner.norm()) == pytest.approx(5.0, rel=1e-6)
    assert float(inner[0, 0]) == pytest.approx(0.5, rel=1e-6)  # 1 / (3 - 1)


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_one_dimension_is_projected_gradient_descent_bit_for_bit(threat_model, loss):
    model, (x, y) = _smooth(dtype=torch.float32), _images(dtype=torch.float32)
    krylov = Krylov(threat_model, steps=4, dimensions=1, loss=loss)
    pgd = Pgd(threat_model, steps=4, loss=loss)
    found = krylov(model, x, y, generator=_generator())
    assert torch.equal(found, pgd(model, x, y, generator=_generator()))
    assert not torch.equal(found, Krylov(threat_model, steps=4)(model, x, y, generator=_generator()))


@pytest.mark.parametrize("solver", ["trust", "gmres"])
def test_where_there_is_no_curvature_the_gradient_is_followed(solver):
    """The margin of a ReLU network is piecewise linear: the subspace has one dimension."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    x, y = _images()
    _, product = second_order(lambda images: LOSSES["margin"](model(images), y, None), x)
    g = torch.randn(len(x), 12, generator=_generator(), dtype=torch.float64)
    assert lanczos(g, product, 4)[2].tolist() == [1] * len(x)
    settings = {"steps": 3, "loss": "margin"}
    for threat_model in THREATS:
        found = Krylov(threat_model, solver=solver, **settings)(model, x, y, generator=_generator())
        expected = Pgd(threat_model, **settings)(model, x, y, generator=_generator())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_small_ball_is_climbed_along_the_gradient():
    """1 - cos(d, g) = O(radius^2)."""
    g, h = _quadratic(7)

    def apart(radius):
        d, _ = _climb(g, h, 6, radius)
        return float((1 - (d * g).sum(1) / (d.norm(dim=1) * g.norm(dim=1))).max())

    assert apart(1e-2) < 1e-3
    assert apart(1e-3) == pytest.approx(apart(1e-2) / 100, rel=0.1)


def test_the_newton_residual_falls_with_the_dimension_to_zero():
    g, h = _quadratic(11)

    def residual(m):
        basis, matrix, _ = lanczos(g, lambda v: torch.einsum("nde,ne->nd", h, v), m)
        d = torch.einsum("nmd,nm->nd", basis, newton(matrix, g.norm(dim=1)))
        return (torch.einsum("nde,ne->nd", h, d) + g).norm(dim=1)

    residuals = torch.stack([residual(m) for m in range(1, 7)])
    assert float((residuals[1:] - residuals[:-1]).max()) <= 1e-9
    assert float(residuals[-1].max()) < 1e-8
    assert float(residuals[0].min()) > 1e-3


class _Bowl(nn.Module):
    """Two logits whose margin is a bowl of positive curvature: the literal Newton step runs to its bottom."""

    def forward(self, x):
        rising = (x.flatten(1) - 0.4).square().sum(1)
        return torch.stack([torch.zeros_like(rising), rising], 1)


def test_the_newton_direction_is_turned_where_it_would_descend():
    x, y = 0.5 + 0.1 * torch.rand(3, 1, 2, 3, generator=_generator(), dtype=torch.float64), torch.zeros(3).long()
    objective = lambda images: LOSSES["margin"](_Bowl()(images), y, None)  # noqa: E731
    gradient, product = second_order(objective, x)
    flat = gradient.flatten(1)
    basis, matrix, _ = lanczos(flat, product, 3)
    literal = torch.einsum("nmd,nm->nd", basis, newton(matrix, flat.norm(dim=1)))
    assert bool((objective(x + literal.view_as(x)) < objective(x)).all())
    attack = Krylov(ThreatModel("l2", 0.1), 1, solver="gmres", loss="margin", random_start=False)
    assert bool((objective(attack(_Bowl(), x, y, generator=_generator())) > objective(x)).all())


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("towards", ["steepest", "scaled"])
def test_more_dimensions_reach_a_higher_loss_on_a_curved_network(threat_model, towards):
    """One step each, on average over many images; in l_2 the direction is that of the optimum itself."""
    model, (x, y) = _smooth(), _images(60)
    losses = []
    for dimensions in (1, 3):
        attack = Krylov(threat_model, 1, dimensions=dimensions, random_start=False, towards=towards)
        losses.append(_losses(model, y)(attack(model, x, y, generator=_generator())).mean().item())
    assert losses[1] > losses[0]


def test_samples_do_not_meet():
    model, (x, y) = _smooth(), _images()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    attack = Krylov(THREATS[0], random_start=False)
    whole = attack(model, x, y, generator=_generator())
    torch.testing.assert_close(attack(model, x[order], y[order], generator=_generator()), whole[order])


def test_a_saturated_sample_stays_where_it_is():
    """A loss whose gradient underflows has no direction; its neighbours are attacked as ever."""
    model, (x, y) = _smooth(dtype=torch.float32), _images(dtype=torch.float32)
    with torch.no_grad():
        model[3].weight *= 1e4
    y = model(x).argmax(1)
    x_adv = Krylov(THREATS[0], 1, random_start=False)(model, x, y, generator=_generator())
    gradient, _ = second_order(_losses(model, y), x)
    flat = gradient.flatten(1).abs().amax(1) == 0
    assert bool(flat.any())
    assert torch.equal(x_adv[flat], x[flat])
    assert bool(x_adv.isfinite().all())


def test_fast_convolutions_are_differentiated_twice():
    """3x3 convolutions of many channels run in their fastest form while attacked, and still have curvature."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 64, 3),
    ).eval()  # fmt: skip
    x, y = _images(8, (1, 8, 8), torch.float32)
    attack = Krylov(ThreatModel("l2", 0.5), 2, random_start=False)
    found = attack(model, x, y, generator=_generator())
    exact = attack(model.double(), x.double(), y, generator=_generator())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-3)


class _Attention(nn.Module):
    """Pixels of a row as the tokens of one head."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        tokens = x.flatten(1, 2)
        return self.classifier(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_products_go_through_attention():
    """The fused kernels that attention takes otherwise have no second derivative."""
    torch.manual_seed(3)
    model, (x, y) = _Attention().double().eval(), _images()
    _, product = second_order(_losses(model, y), x)
    v = torch.randn(len(x), 12, generator=_generator(), dtype=torch.float64)
    _, differences = second_order(_losses(model, y), x, exact=False, distance=1e-4)
    torch.testing.assert_close(product(v), differences(v), rtol=1e-4, atol=1e-8)
    assert float(product(v).abs().amax()) > 1e-4
    found = Krylov(THREATS[1], 2)(model, x, y, generator=_generator())
    assert float((found - x).abs().amax()) > 0.01


def test_wrong_settings_are_refused():
    for settings in ({"dimensions": 0}, {"steps": 0}, {"step_size": -1.0}, {"loss": "margins"}):
        with pytest.raises(InputError):
            Krylov(**settings)
