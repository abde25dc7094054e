"""Architecture gradients against full automatic differentiation through the virtual weight step, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from nas.errors import InputError
from nas.model_state import frozen_statistics
from nas.search.architecture_gradient import FirstOrder, Unrolled, WeightStep
from search_spaces.cell_space import CellSpace
from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.layout import Layout

SIZES = {8: "matrices", 12: "convolutions"}
RATE, MOMENTUM, DECAY = 0.3, 0.9, 0.05


class _Problem:
    """A supernet in train mode, a training and a held-out batch, two objectives, momentum buffers."""

    def __init__(self, side, space=DSARA, channels=2, with_buffers=True):
        torch.manual_seed(0)
        sizes = {"channels": channels, "cells": 4, "input_shape": (2, side, side), "classes": 3}
        self.supernet = space.supernet(**sizes, mean=(0.4, 0.6), std=(0.2, 0.3)).double().train()
        with torch.no_grad():
            for alpha in self.supernet.architecture_parameters():
                alpha.normal_()
        self.x, self.held_out, self.adversarial = (torch.rand(5, 2, side, side, dtype=torch.float64) for _ in range(3))
        self.y = torch.tensor([0, 1, 2, 0, 1])
        weights = self.supernet.weight_parameters()
        buffers = [torch.randn_like(weight) * 0.1 for weight in weights] if with_buffers else [None] * len(weights)
        self.step = WeightStep(RATE, MOMENTUM, DECAY, buffers)

    def weight_loss(self):
        return F.cross_entropy(self.supernet(self.x), self.y)

    def objectives(self):
        return [
            lambda: F.cross_entropy(self.supernet(self.held_out), self.y),
            lambda: 0.5 * F.cross_entropy(self.supernet(self.adversarial), self.y.flip(0)),
        ]

    def gradients(self, method):
        with frozen_statistics(self.supernet):
            return method(self.supernet, self.weight_loss, self.objectives(), self.step)

    def brute_force(self):
        """d/d(alpha) of L_k(w - lr (m b + grad_w L(w, alpha) + decay w), alpha), in one differentiable expression."""
        parameters = dict(self.supernet.named_parameters())
        alphas = {name: value for name, value in parameters.items() if name.startswith("alpha.")}
        weights = {name: value for name, value in parameters.items() if name not in alphas}
        with frozen_statistics(self.supernet):

            def loss(values, x, y):
                return F.cross_entropy(functional_call(self.supernet, values, (x,)), y)

            gradients = torch.autograd.grad(
                loss({**weights, **alphas}, self.x, self.y),
                list(weights.values()),
                create_graph=True,
                materialize_grads=True,
            )
            moved = {}
            for (name, weight), gradient, buffer in zip(weights.items(), gradients, self.step.buffers, strict=True):
                update = gradient + DECAY * weight
                moved[name] = weight - RATE * (update if buffer is None else update + MOMENTUM * buffer)
            losses = [
                loss({**moved, **alphas}, self.held_out, self.y),
                0.5 * loss({**moved, **alphas}, self.adversarial, self.y.flip(0)),
            ]
            return [
                torch.cat([part.flatten() for part in torch.autograd.grad(value, alphas.values(), retain_graph=True)])
                for value in losses
            ]


def _error(ours, exact):
    return float((ours - exact).norm() / exact.norm())


def _state(supernet):
    return {name: value.detach().clone() for name, value in supernet.state_dict().items()}


PROBLEMS = {}


def _problem(side):
    """The problem and its exact gradients, computed once."""
    if side not in PROBLEMS:
        problem = _Problem(side)
        PROBLEMS[side] = problem, problem.brute_force()
    return PROBLEMS[side]


@pytest.mark.parametrize("side", SIZES, ids=SIZES.get)
def test_the_exact_unrolled_gradient(side):
    problem, exact = _problem(side)
    found = problem.gradients(Unrolled("exact"))
    assert [gradient.shape for gradient in found] == [(294,)] * 2
    for ours, theirs in zip(found, exact, strict=True):
        assert _error(ours, theirs) < 1e-8
    first_order = problem.gradients(FirstOrder())
    assert _error(first_order[0], exact[0]) > 1e-2, "otherwise the second-order term was not put to the test"


@pytest.mark.parametrize("side", SIZES, ids=SIZES.get)
def test_finite_differences_approach_it_as_the_radius_shrinks(side):
    """The supernet is piecewise smooth: a radius that crosses kinks of its ReLUs finds something else."""
    problem, exact = _problem(side)
    for coarse, fine, theirs in zip(
        problem.gradients(Unrolled(radius=1e-2)), problem.gradients(Unrolled(radius=1e-6)), exact, strict=True
    ):
        assert _error(fine, theirs) < 1e-6
        assert _error(fine, theirs) < 0.01 * _error(coarse, theirs)


class _Smooth:
    """Two tanh layers mixed by a softmax: what ``Unrolled`` needs of a supernet, without kinks."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.alpha, self.weights = [draw(3)], [draw(4, 3, 5), draw(5, 2)]
        self.x, self.target = draw(6, 4).detach(), draw(2, 6, 2).detach()

    def weight_parameters(self):
        return self.weights

    def architecture_parameters(self):
        return self.alpha

    def loss(self, part, weights=None):
        first, second = weights or self.weights
        mixed = torch.einsum("ni,iko,k->no", self.x, first, torch.softmax(self.alpha[0], 0))
        return (torch.tanh(mixed) @ second - self.target[part]).square().mean()


def test_on_a_smooth_problem_the_error_falls_with_the_square_of_the_radius():
    smooth = _Smooth()
    step = WeightStep(0.5, 0.9, 0.1, [torch.ones_like(weight) for weight in smooth.weights])
    gradients = torch.autograd.grad(smooth.loss(0), smooth.weights, create_graph=True)
    moved = [w - 0.5 * (g + 0.1 * w + 0.9) for w, g in zip(smooth.weights, gradients, strict=True)]
    (exact,) = torch.autograd.grad(smooth.loss(1, moved), smooth.alpha)

    def error(method):
        return _error(method(smooth, lambda: smooth.loss(0), [lambda: smooth.loss(1)], step)[0], exact)

    assert error(Unrolled("exact")) < 1e-12
    errors = [error(Unrolled(radius=radius)) for radius in (0.1, 0.01, 0.001)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.1)
    assert errors[1] < 1e-3, "the default radius"


def test_momentum_buffers_may_be_missing():
    problem = _Problem(8, with_buffers=False)
    for ours, theirs in zip(problem.gradients(Unrolled("exact")), problem.brute_force(), strict=True):
        assert _error(ours, theirs) < 1e-8


def test_the_space_with_none():
    problem = _Problem(8, DARTS)
    for ours, theirs in zip(problem.gradients(Unrolled("exact")), problem.brute_force(), strict=True):
        assert _error(ours, theirs) < 1e-8


@pytest.mark.parametrize("side", SIZES, ids=SIZES.get)
def test_the_first_order_gradient_is_plain_autograd(side):
    problem, _ = _problem(side)
    alphas = problem.supernet.architecture_parameters()
    with frozen_statistics(problem.supernet):
        for ours, objective in zip(problem.gradients(FirstOrder()), problem.objectives(), strict=True):
            expected = torch.cat([part.flatten() for part in torch.autograd.grad(objective(), alphas)])
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("method", [FirstOrder(), Unrolled("exact"), Unrolled()], ids=str)
def test_weights_and_statistics_are_left_as_found(method):
    """Bit for bit, in single precision as well, where w + d - d would not be w."""
    for double in (True, False):
        problem = _Problem(8)
        if not double:
            problem.supernet.float()
            problem.x, problem.held_out, problem.adversarial = (
                images.float() for images in (problem.x, problem.held_out, problem.adversarial)
            )
            problem.step = WeightStep(RATE, MOMENTUM, DECAY, [buffer.float() for buffer in problem.step.buffers])
        before, buffers = _state(problem.supernet), [buffer.clone() for buffer in problem.step.buffers]
        gradients = problem.gradients(method)
        assert all(not gradient.requires_grad and bool(torch.isfinite(gradient).all()) for gradient in gradients)
        after = _state(problem.supernet)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in problem.supernet.parameters())
        assert all(torch.equal(now, then) for now, then in zip(problem.step.buffers, buffers, strict=True))
        assert problem.supernet.training


@pytest.mark.parametrize("method", [Unrolled("exact"), Unrolled()], ids=str)
def test_weights_are_restored_after_an_error(method):
    problem = _Problem(8)
    before = _state(problem.supernet)

    def fails():
        raise FloatingPointError

    with pytest.raises(FloatingPointError), frozen_statistics(problem.supernet):
        method(problem.supernet, problem.weight_loss, [fails], problem.step)
    assert all(torch.equal(value, before[name]) for name, value in _state(problem.supernet).items())


def test_a_learning_rate_of_zero_gives_the_first_order_gradient():
    problem, _ = _problem(8)
    still = WeightStep(0.0, MOMENTUM, DECAY, problem.step.buffers)
    with frozen_statistics(problem.supernet):
        arguments = problem.supernet, problem.weight_loss, problem.objectives(), still
        for ours, theirs in zip(Unrolled()(*arguments), FirstOrder()(*arguments), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_an_objective_without_gradient_gives_zeros():
    """The direction of the finite difference has no length then."""
    problem, _ = _problem(8)
    flat = [lambda: F.cross_entropy(0 * problem.supernet(problem.x), problem.y)]
    with frozen_statistics(problem.supernet):
        (gradient,) = Unrolled()(problem.supernet, problem.weight_loss, flat, problem.step)
    assert torch.equal(gradient, torch.zeros(294, dtype=torch.float64))


@pytest.mark.parametrize(
    "names",
    [("skip_connect", "max_pool_3x3"), ("dil_conv_3x3", "skip_connect"), ("sep_conv_3x3", "none")],
    ids=str,
)
@pytest.mark.parametrize("method", [FirstOrder(), Unrolled("exact"), Unrolled()], ids=str)
def test_every_choice_of_candidates_can_be_searched(names, method):
    """An ablation may leave out the twice repeated convolutions, or all convolutions."""
    space = CellSpace("dsara", names, Layout(("a", "b"), (1, 2)), nodes=2)
    problem = _Problem(8, space)
    gradients = problem.gradients(method)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    if method == Unrolled("exact"):
        for ours, theirs in zip(gradients, problem.brute_force(), strict=True):
            assert _error(ours, theirs) < 1e-8


def test_wrong_radius_is_refused():
    for radius in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError):
            Unrolled(radius=radius)
