"""J-SIGR: both penalties against mathematics, their limits, and that each does what it is for."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.analysis.jacobian import jacobian_norm, squared_jacobian_norm
from nas.analysis.saliency import PerturbationSaliency, most_salient, share_inside
from nas.attacks.fixed import Fixed
from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.model_state import crafting
from nas.objective import Batch, State
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.jsigr import JSigr
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard

ATTACK = Pgd(ThreatModel("linf", 0.1), steps=2)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _state(seed=0):
    return State(0, 0, 0.0, _generator(seed), _generator(seed + 100))


def _batch(n=12, shape=(1, 8, 8)):
    x = torch.rand(n, *shape, generator=_generator(1), dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def _linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()


def _smooth():
    """Without batch statistics: samples do not meet."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(48, 3)).double()


def _loss_and_gradients(method, model, batch, seed=0):
    loss, _ = method(model, batch, _state(seed))
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def _assert_same(first, second, tolerance=1e-10):
    torch.testing.assert_close(first[0], second[0], rtol=tolerance, atol=0)
    for ours, theirs in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-13)


def test_without_weights_it_is_standard_or_adversarial_training(network):
    batch, plain = _batch(), JSigr(ATTACK, jacobian_weight=0, saliency_weight=0)
    ours = _loss_and_gradients(plain, network().double(), batch)
    _assert_same(ours, _loss_and_gradients(Standard(), network().double(), batch), tolerance=0)
    ours = _loss_and_gradients(replace(plain, adversarial=True), network().double(), batch)
    _assert_same(ours, _loss_and_gradients(PgdAt(ATTACK), network().double(), batch), tolerance=0)


def test_the_jacobian_of_a_linear_network_is_its_weight():
    """Exactly with as many projections as classes, so that the gradient of the penalty is the weight itself."""
    model, batch = _linear(), _batch()
    base, gradients = _loss_and_gradients(Standard(), model, batch)
    weight = model[1].weight.detach()
    method = JSigr(jacobian_weight=0.3, saliency_weight=0, projections=3)
    loss, found = _loss_and_gradients(method, model, batch)
    torch.testing.assert_close(loss, base + 0.3 / 2 * weight.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], gradients[0] + 0.3 * weight, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found[1], gradients[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("projections", [1, 2])
def test_few_projections_estimate_the_jacobian_without_bias(projections):
    """Ten thousand draws, with the explicit Jacobian of each image of a network that is not linear."""
    model, x = _smooth(), _batch(2).x
    jacobian = torch.autograd.functional.jacobian(lambda images: model(images).sum(0), x).transpose(0, 1)
    exact = jacobian.flatten(1).square().sum(1)
    many = x.repeat_interleave(5000, 0).requires_grad_(True)
    drawn = squared_jacobian_norm(model(many), many, projections=projections, generator=_generator()).view(2, 5000)
    error = (drawn.mean(1) - exact).abs() / (drawn.std(1) / 5000**0.5)
    assert float(error.max()) < 4
    torch.testing.assert_close(drawn.mean(1), exact, rtol=0.02, atol=0)
    assert float(drawn.std(1).min()) > 0, "it is an estimate"


def test_without_a_mask_the_second_penalty_is_double_backpropagation():
    """For a linear network in closed form: g = W'(p - e_y)."""
    model, batch = _linear(), _batch()
    loss, found = _loss_and_gradients(JSigr(jacobian_weight=0, saliency_weight=0.7, keep=0.0), model, batch)
    logits = model(batch.x)
    error = logits.softmax(1) - F.one_hot(batch.y, 3)
    penalty = (error @ model[1].weight).square().sum(1).mean()
    by_hand = F.cross_entropy(logits, batch.y) + 0.7 * penalty
    _assert_same((loss, found), (by_hand.detach(), torch.autograd.grad(by_hand, list(model.parameters()))))
    assert float(penalty.detach()) > 1e-4


def test_where_everything_is_salient_there_is_no_second_penalty():
    batch = _batch()
    ours = _loss_and_gradients(JSigr(jacobian_weight=0, saliency_weight=50, keep=1.0), _smooth(), batch)
    _assert_same(ours, _loss_and_gradients(Standard(), _smooth(), batch), tolerance=0)


def test_gradients_are_penalised_outside_of_the_salient_pixels_alone():
    """By hand from the mask; the wrong half is another number."""
    model, batch = _smooth(), _batch()
    method = JSigr(jacobian_weight=0, saliency_weight=2.0, keep=0.3, saliency=PerturbationSaliency(windows=8))
    loss, metrics = method(model, batch, _state())
    mask = most_salient(method.saliency(model, batch.x), 0.3)
    assert mask.flatten(1).sum(1).tolist() == [19] * 12
    point = batch.x.clone().requires_grad_(True)
    natural = F.cross_entropy(model(point), batch.y, reduction="sum")
    (gradient,) = torch.autograd.grad(natural, point)
    squares = gradient.square().sum(1)
    outside, inside = (squares * ~mask).sum() / 12, (squares * mask).sum() / 12
    torch.testing.assert_close(loss.detach(), natural.detach() / 12 + 2 * outside, rtol=1e-12, atol=0)
    assert abs(float(outside - inside)) > 1e-3 * float(outside)
    torch.testing.assert_close(metrics["outside"], outside, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["inside_share"], share_inside(gradient, mask).mean(), rtol=1e-12, atol=0)


def test_the_control_takes_as_many_pixels_at_random():
    model, batch = _smooth(), _batch()
    method = JSigr(jacobian_weight=0, keep=0.3, selection="random")
    masks = [method._mask(model, batch.x, _state(seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert all(mask.flatten(1).sum(1).tolist() == [19] * 12 for mask in masks)
    assert not torch.equal(masks[0][0], masks[0][1])
    salient = replace(method, selection="saliency")._mask(model, batch.x, _state())
    losses = [kind(model, batch, _state())[0].item() for kind in (method, replace(method, selection="saliency"))]
    assert losses[0] != losses[1]
    assert float((salient == masks[0]).double().mean()) < 0.8


@pytest.mark.parametrize("statistics", ["batch", "none"])
def test_weights_have_the_gradient_of_the_whole_loss(statistics, network):
    """Finite differences in float64: both penalties are differentiated through the gradients they are made of."""
    model = network().double() if statistics == "batch" else _smooth()
    batch = _batch()
    method = JSigr(jacobian_weight=0.1, saliency_weight=3.0, keep=0.3)
    mask = method._mask(model, batch.x, _state())
    fixed = replace(method, saliency=_Given(mask))
    _, gradients = _loss_and_gradients(fixed, model, batch)
    direction = [torch.randn(p.shape, generator=_generator(9), dtype=torch.float64) for p in model.parameters()]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))

    def moved(step):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, change in zip(other.parameters(), direction, strict=True):
                parameter += step * change
        return fixed(other, batch, _state())[0].item()

    assert slope == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-5)
    _, plain = _loss_and_gradients(Standard(), model, batch)
    first = sum(float((g * d).sum()) for g, d in zip(plain, direction, strict=True))
    assert abs(slope - first) > 1e-2 * abs(slope), "the penalties count"


class _Given:
    """A saliency known beforehand."""

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, model, x):
        return self.mask.double()


def test_a_batch_that_comes_twice_has_the_same_loss():
    batch = _batch()
    twice = Batch(batch.x.repeat(2, 1, 1, 1), batch.y.repeat(2), batch.indices.repeat(2))
    method = JSigr(jacobian_weight=0.2, saliency_weight=2.0, projections=3)
    _assert_same(_loss_and_gradients(method, _smooth(), batch), _loss_and_gradients(method, _smooth(), twice))


def test_the_cross_entropy_may_be_taken_at_attacked_images():
    model, batch = _smooth(), _batch()
    x_adv = ATTACK(model, batch.x, batch.y, generator=_generator())
    method = JSigr(Fixed(x_adv), jacobian_weight=0.2, saliency_weight=2.0, projections=3)
    clean, metrics = method(model, batch, _state())
    attacked, _ = replace(method, adversarial=True)(model, batch, _state())
    moved = F.cross_entropy(model(x_adv), batch.y) - F.cross_entropy(model(batch.x), batch.y)
    torch.testing.assert_close(attacked - clean, moved, rtol=1e-8, atol=0)
    assert float(moved.detach()) > 0.01 and float(metrics["squared_jacobian"]) > 0


def test_batch_statistics_are_recorded_once(network):
    ours, theirs, batch = network().double(), network().double(), _batch()
    JSigr()(ours, batch, _state())
    Standard()(theirs, batch, _state())
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def _trained(network, data, parts, method, epochs=8):
    model = network()
    training = Training(epochs=epochs, batch_size=16, optimiser=Sgd(0.05), augmentation=Augmentation())
    train(model, data, parts, method, training, validation_attack=ATTACK, seed=0)
    return model.eval()


def test_training_shrinks_the_jacobian_and_gathers_the_gradient(network, data, parts):
    """Against the same training without each penalty, on images that were not trained on."""
    x, y = data.x_test.float() / 255, data.y_test
    saliency = PerturbationSaliency()

    def norm(model):
        return float(jacobian_norm(model, x, projections=3, generator=_generator()).mean())

    def inside(model):
        mask = most_salient(saliency(model, x), 0.2)
        point = x.clone().requires_grad_(True)
        with crafting(model), torch.enable_grad():
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
        return float(share_inside(gradient, mask).mean())

    plain = _trained(network, data, parts, Standard())
    small = _trained(network, data, parts, JSigr(jacobian_weight=0.05, saliency_weight=0))
    gathered = _trained(network, data, parts, JSigr(jacobian_weight=0, saliency_weight=30.0))
    assert norm(small) < 0.7 * norm(plain)
    assert inside(gathered) > inside(plain) + 0.05
    assert float((small(x).argmax(1) == y).float().mean()) > 0.8


def test_wrong_settings_are_refused():
    for settings in (
        {"jacobian_weight": -1.0}, {"saliency_weight": float("nan")}, {"keep": 1.1}, {"keep": -0.1}, {"projections": 0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            JSigr(**settings)
