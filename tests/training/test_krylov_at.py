"""Krylov adversarial training: what its attack costs, that it needs no Hessian, and where its limits lie."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nas.attacks.krylov import Krylov
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Batch, State
from nas.threat_model import ThreatModel
from nas.training.krylov_at import KrylovAt
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from runs.recipe import method_from

THREAT = ThreatModel("linf", 0.1)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _state(seed=0):
    return State(0, 0, 0.0, _generator(seed), _generator(seed + 100))


def _batch(n=12, shape=(1, 8, 8), dtype=torch.float64):
    x = torch.rand(n, *shape, generator=_generator(1), dtype=dtype)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def _loss_and_gradients(method, model, batch):
    loss, _ = method(model, batch, _state())
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def _assert_same(first, second, tolerance=0.0):
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_one_dimension_is_pgd_adversarial_training_bit_for_bit(network):
    batch = _batch(dtype=torch.float32)
    for attack in (Krylov(THREAT, steps=3, dimensions=1), Krylov(ThreatModel("l2", 0.5), steps=3, dimensions=1)):
        ours = _loss_and_gradients(KrylovAt(attack), network(), batch)
        pgd = Pgd(attack.threat_model, steps=3)
        _assert_same(ours, _loss_and_gradients(PgdAt(pgd), network(), batch))
        second = _loss_and_gradients(KrylovAt(replace(attack, dimensions=3)), network(), batch)
        assert float((second[0] - ours[0]).abs()) > 1e-6, "three dimensions find other images"


def test_clean_images_have_their_weight(network):
    batch, attack = _batch(), Krylov(THREAT, steps=2)
    parts = [
        _loss_and_gradients(method, network().double(), batch) for method in (PgdAt(attack), Standard())
    ]  # fmt: skip
    mixed = [0.75 * adversarial + 0.25 * clean for adversarial, clean in zip(*parts, strict=True)]
    _assert_same(_loss_and_gradients(KrylovAt(attack, 0.25), network().double(), batch), mixed, 1e-12)
    _assert_same(_loss_and_gradients(KrylovAt(attack), network().double(), batch), parts[0])
    nothing = Krylov(ThreatModel("linf", 0.0), steps=2)
    _assert_same(_loss_and_gradients(KrylovAt(nothing), network().double(), batch), parts[1], 1e-12)


def _smooth(inputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        model[1].weight *= 3
        model[3].weight *= 4
    return model


def test_images_are_those_of_the_explicit_hessian():
    """All dimensions of a ten-pixel image: the maximum of the quadratic model over the l_2 ball, solved for apart."""
    model, radius = _smooth(10), 0.4
    x = 0.4 + 0.2 * torch.rand(6, 1, 2, 5, generator=_generator(2), dtype=torch.float64)
    y = torch.arange(6) % 3
    attack = Krylov(ThreatModel("l2", radius), 1, dimensions=10, random_start=False, towards="scaled")
    found = attack(model, x, y, generator=_generator()) - x
    for i in range(6):

        def loss(flat, i=i):
            return F.cross_entropy(model(flat.view(1, 1, 2, 5)), y[i : i + 1])

        point = x[i].flatten()
        gradient = torch.autograd.functional.jacobian(loss, point).squeeze(0)
        values, vectors = torch.linalg.eigh(
            torch.autograd.functional.hessian(lambda flat, loss=loss: loss(flat).sum(), point)
        )
        along, top = vectors.T @ gradient, float(values[-1].clamp_min(0))

        def solution(mu, along=along, values=values):
            return along / (mu - values)

        mu = brentq(lambda mu: float(solution(mu).norm()) - radius, top + 1e-9, top + float(gradient.norm()) / radius)
        expected = vectors @ solution(mu)
        torch.testing.assert_close(found[i].flatten(), expected, rtol=0, atol=1e-6)
        # It is not the way of the gradient.
        assert float(F.cosine_similarity(expected, gradient, dim=0)) < 0.999


class _Passes:
    """Counts forward passes of a model, gradients taken through it, and gradients of these."""

    def __init__(self, model):
        self.forward = self.gradients = self.second = 0
        model.register_forward_hook(self._after)

    def _after(self, module, inputs, output):
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._back)

    def _back(self, gradient):
        self.gradients += 1
        if gradient.requires_grad:
            gradient.register_hook(self._again)

    def _again(self, gradient):
        self.second += 1


@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_a_step_costs_a_gradient_and_two_for_each_product(dimensions):
    """1 + 2 m: a product goes back through the backward pass and through the forward pass once more."""
    model, batch, steps = _smooth(64), _batch(), 3
    passes = _Passes(model)
    KrylovAt(Krylov(THREAT, steps, dimensions=dimensions))(model, batch, _state())
    products = 0 if dimensions == 1 else dimensions
    assert passes.forward == steps + 1, "one for each step, one for the loss"
    assert passes.gradients == steps * (1 + products)
    assert passes.second == steps * products
    assert passes.gradients + passes.second == steps * (1 + 2 * products)


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return result


def test_no_hessian_is_ever_formed():
    """3,072 pixels: the Hessian of one image has 9 million numbers, nothing made here as many as m images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Softplus(), nn.Flatten(), nn.Linear(1024, 3))
    batch, dimensions = _batch(2, (3, 32, 32), torch.float32), 3
    with _Largest() as made:
        KrylovAt(Krylov(THREAT, 1, dimensions=dimensions))(model, batch, _state())
    assert 0 < made.size <= 2 * dimensions * 3072


def test_second_order_images_have_the_higher_loss_on_a_curved_network():
    """What training sees is harder than images of one gradient step in the same ball."""
    model, batch = _smooth(64), _batch(60)
    losses = []
    for dimensions in (1, 3):
        attack = Krylov(ThreatModel("l2", 0.5), 1, dimensions=dimensions, random_start=False)
        losses.append(KrylovAt(attack)(model, batch, _state())[0].item())
    assert losses[1] > losses[0] + 1e-3


def _method(attack_table, name="krylov_at"):
    return method_from({"name": name}, "train.method", attack_table, "train.attack", THREAT)


def test_a_recipe_that_names_no_attack_gets_krylov_and_another_one_is_refused():
    assert _method({}).attack == Krylov(THREAT)
    assert _method({"name": "krylov", "dimensions": 5}).attack.dimensions == 5
    assert _method({}, "pgd_at").attack == Pgd(THREAT)
    with pytest.raises(InputError, match=r"train\.attack\.name is 'pgd': write 'krylov'"):
        _method({"name": "pgd", "steps": 3})


def test_wrong_settings_are_refused():
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError):
            KrylovAt(clean_weight=weight)
