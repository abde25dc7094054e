"""IG-BNN: Stein descent against targets whose answer is known, information gain by definition, and limiting cases."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.defences.particles import Particles
from nas.errors import InputError
from nas.evaluation.robustness import Trial, evaluate
from nas.objective import Batch, State, gradients_of
from nas.optimisation import Sgd
from nas.prediction import MeanOfParticles
from nas.threat_model import ThreatModel
from nas.training.information_gain import InformationGain, information_gain, stein_directions
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from runs.recipe import build, read_table
from search_spaces.dsara import SPACE
from search_spaces.layers import Normalise

ATTACK = Pgd(ThreatModel("linf", 0.08), steps=2)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _batch(n=12, channels=1, size=8, dtype=torch.float64):
    x = torch.rand(n, channels, size, size, generator=_generator(), dtype=dtype)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def _state(seed=0):
    return State(0, 0, 0.0, _generator(seed), _generator(seed + 100))


def _step(method, model, batch=None, seed=0):
    return gradients_of(method, model, batch or _batch(), _state(seed), [*model.parameters()])


def _particles(network, seeds=(0, 1, 2)):
    return Particles([network(seed).double() for seed in seeds]).train()


# Information gain


def _random(n, count, classes, scale=2.0, seed=0):
    return (scale * torch.randn(n, count, classes, generator=_generator(seed), dtype=torch.float64)).log_softmax(2)


def test_information_gain_is_the_mutual_information_of_label_and_particle():
    log_p = _random(4, 50, 5)
    joint = log_p.exp() / 4  # p(particle, label) of particles equally likely
    product = joint.sum(0, keepdim=True) * joint.sum(2, keepdim=True)
    expected = (joint * (joint / product).log()).sum((0, 2))
    torch.testing.assert_close(information_gain(log_p), expected, rtol=1e-10, atol=1e-12)


def test_information_gain_lies_between_nothing_and_all_there_is():
    for n, classes in itertools.product((1, 2, 5), (2, 4)):
        gain = information_gain(_random(n, 2000, classes, scale=6.0))
        assert float(gain.min()) >= -1e-12
        assert float(gain.max()) <= math.log(min(n, classes)) + 1e-9
    same = _random(1, 20, 4).expand(6, -1, -1)
    torch.testing.assert_close(information_gain(same), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-12)
    certain = torch.tensor([[[0.0, -900.0]], [[-900.0, 0.0]]])
    torch.testing.assert_close(information_gain(certain), torch.tensor([math.log(2)]))


def test_a_mean_of_logits_would_not_be_an_information_gain():
    """Why probabilities are averaged: with the mean of logits, as in the released code, it can be negative."""
    logits = 2 * torch.randn(4, 5000, 3, generator=_generator(), dtype=torch.float64)
    mean = logits.mean(0).softmax(1)
    entropies = -(logits.softmax(2) * logits.log_softmax(2)).sum(2).mean(0)
    assert float((-(mean * mean.log()).sum(1) - entropies).min()) < -0.01
    assert float(information_gain(logits.log_softmax(2)).min()) >= 0


# Stein descent


def _descend(slope, weights, steps, rate, repulsion):
    for _ in range(steps):
        weights = weights - rate * stein_directions(weights, slope(weights), repulsion=repulsion)[1]
    return weights


def test_directions_are_those_of_the_definition():
    """Against sums written out, with the gradient of the kernel by autograd."""
    weights, slopes = (torch.randn(5, 3, generator=_generator(s), dtype=torch.float64) for s in (0, 1))
    distances = [float((a - b).norm()) for a, b in itertools.combinations(weights, 2)]
    h = (sorted(distances)[4] + sorted(distances)[5]) / 2
    kernel, directions = stein_directions(weights, slopes, repulsion=0.7)
    for i in range(5):
        total, mass = torch.zeros(3, dtype=torch.float64), 0.0
        for j in range(5):
            other = weights[j].clone().requires_grad_()
            k = (-(other - weights[i]).square().sum() / (2 * h * h)).exp()
            (slope_of_kernel,) = torch.autograd.grad(k, other)
            assert float(kernel[j, i]) == pytest.approx(float(k.detach()), rel=1e-10)
            total += k.detach() * slopes[j] - 0.7 / 5 * slope_of_kernel
            mass += float(k.detach())
        torch.testing.assert_close(directions[i], total / mass, rtol=1e-9, atol=1e-12)


def test_a_normal_target_is_met_in_mean_and_covariance():
    covariance = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=torch.float64)
    mean, precision = torch.tensor([1.0, -2.0], dtype=torch.float64), covariance.inverse()
    start = 0.3 * torch.randn(80, 2, generator=_generator(), dtype=torch.float64)
    found = _descend(lambda w: (w - mean) @ precision, start, steps=600, rate=0.3, repulsion=80.0)
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0, atol=0.1)


def _two_modes(w):
    """Slopes of minus the log density of two equal normal modes at -2 and 2."""
    centres = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
    share = (-(w[:, None] - centres).square().sum(2) / 2).softmax(1)
    return w - share @ centres


def test_both_modes_are_kept_and_without_repulsion_none_is_filled():
    # All start left of the middle: descent alone would end in one mode.
    start = torch.linspace(-1.5, -0.1, 40, dtype=torch.float64)[:, None]
    found = _descend(_two_modes, start, steps=1500, rate=0.3, repulsion=40.0)
    assert 17 <= int((found > 0).sum()) <= 23
    for mode in (found[found > 0], -found[found < 0]):
        assert float(mode.mean()) == pytest.approx(2, abs=0.15) and float(mode.std()) == pytest.approx(1, abs=0.15)
    alone = _descend(_two_modes, start, steps=1500, rate=0.3, repulsion=0.0)
    assert int((alone > 0).sum()) == 0 and float(alone.std()) < 0.05


def test_bandwidth_decides_how_much_particles_share():
    weights, slopes = (torch.randn(4, 6, generator=_generator(s), dtype=torch.float64) for s in (0, 1))
    torch.testing.assert_close(stein_directions(weights, slopes, bandwidth=1e-3, repulsion=0)[1], slopes)
    far = stein_directions(weights, slopes, bandwidth=1e6)[1]
    torch.testing.assert_close(far, slopes.mean(0).expand(4, -1), rtol=1e-6, atol=1e-9)
    order = torch.tensor([2, 0, 3, 1])
    kernel, directions = stein_directions(weights, slopes)
    again, permuted = stein_directions(weights[order], slopes[order])
    torch.testing.assert_close(permuted, directions[order], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(again, kernel[order][:, order], rtol=1e-12, atol=0)


def test_particles_in_one_place_do_not_repel_each_other():
    weights = torch.randn(1, 1000, generator=_generator()).expand(3, -1)
    slopes = torch.randn(3, 1000, generator=_generator(1))
    kernel, directions = stein_directions(weights, slopes)
    assert torch.equal(kernel, torch.ones(3, 3))
    torch.testing.assert_close(directions, slopes.mean(0).expand(3, -1))


# The method


def test_one_particle_is_pgd_adversarial_training(network):
    """Loss, gradients, running statistics: as a network, and as an ensemble of one."""
    reference = network().double().train()
    loss, gradients, _ = _step(PgdAt(ATTACK), reference)
    for model in (network().double().train(), _particles(network, (0,))):
        ours, found, _ = _step(InformationGain(ATTACK), model)
        assert torch.equal(ours, loss)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))


def test_without_gain_and_mixing_particles_train_alone(network):
    """Each as PGD adversarial training on the images of the particle that was drawn."""
    model = _particles(network)
    method = InformationGain(ATTACK, weight=0.0, mixing=0.0)
    loss, found, _ = _step(method, model)
    drawn = int(torch.randint(3, (), generator=_generator(100)))
    batch = _batch()
    x_adv = ATTACK(_particles(network).members[drawn], batch.x, batch.y, generator=_generator())
    position, losses = 0, []
    for member in _particles(network).members:
        own = F.cross_entropy(member(x_adv), batch.y)
        losses.append(own.detach())
        for gradient in torch.autograd.grad(own, [*member.parameters()]):
            torch.testing.assert_close(found[position], gradient, rtol=1e-10, atol=1e-13)
            position += 1
    assert position == len(found)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)


def test_mixed_gradients_are_the_stein_directions_of_the_particles(network):
    model, method = _particles(network), InformationGain(ATTACK, repulsion=2.0)
    apart = _step(InformationGain(ATTACK, mixing=0.0), copy.deepcopy(model))[1]
    mixed, metrics = _step(method, model)[1:]
    size = len(mixed) // 3
    flat = [torch.cat([g.flatten() for g in apart[i : i + size]]) for i in range(0, 3 * size, size)]
    weights = torch.stack([nn.utils.parameters_to_vector(member.parameters()).detach() for member in model.members])
    kernel, expected = stein_directions(weights, torch.stack(flat), repulsion=2.0)
    ours = [torch.cat([g.flatten() for g in mixed[i : i + size]]) for i in range(0, 3 * size, size)]
    torch.testing.assert_close(torch.stack(ours), expected, rtol=1e-9, atol=1e-12)
    assert float(metrics["kernel"]) == pytest.approx(float(kernel[~torch.eye(3, dtype=torch.bool)].mean()))
    assert not torch.allclose(torch.stack(ours), torch.stack(flat), atol=1e-4)


def test_the_loss_holds_the_gain_apart_on_clean_and_adversarial_images(network):
    model, batch = _particles(network), _batch()
    emphasised, _ = InformationGain(ATTACK, weight=0.0, emphasis=1.0)(copy.deepcopy(model), batch, _state())
    base, _ = InformationGain(ATTACK, weight=0.0)(copy.deepcopy(model), batch, _state())
    loss, metrics = InformationGain(ATTACK, weight=4.0)(copy.deepcopy(model), batch, _state())
    drawn = int(torch.randint(3, (), generator=_generator(100)))
    x_adv = ATTACK(model.members[drawn], batch.x, batch.y, generator=_generator())
    clean, moved = (torch.stack([m(x) for m in model.members]).log_softmax(2) for x in (batch.x, x_adv))
    difference = (information_gain(clean) - information_gain(moved)).abs().mean()
    assert float(difference.detach()) > 1e-4
    torch.testing.assert_close(loss - base, 4.0 * difference, rtol=1e-3, atol=0)
    torch.testing.assert_close(metrics["gain_difference"], (loss - base).detach() / 4, rtol=1e-9, atol=0)
    own = F.cross_entropy(copy.deepcopy(model).members[drawn](x_adv), batch.y)
    torch.testing.assert_close(emphasised - base, own, rtol=1e-9, atol=0)


def test_minimising_the_loss_brings_the_gains_together(network):
    """Fails with the wrong sign, and without the term."""
    differences = {}
    for weight in (0.0, 20.0):
        model, batch = _particles(network), _batch(30)
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        for step in range(25):
            method = InformationGain(ATTACK, weight=weight, mixing=0.0)
            for parameter, gradient in zip(model.parameters(), _step(method, model, batch, step)[1], strict=True):
                parameter.grad = gradient
            optimiser.step()
            optimiser.zero_grad()
        differences[weight] = float(InformationGain(ATTACK)(model, batch, _state(9))[1]["gain_difference"])
    assert differences[20.0] < 0.6 * differences[0.0]


def test_without_room_to_move_the_gain_term_and_its_gradient_are_nothing(network):
    still = Pgd(ThreatModel("linf", 0.0), steps=1)
    runs = [_step(InformationGain(still, weight=weight, mixing=0.0), _particles(network)) for weight in (0.0, 50.0)]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-10, atol=0)
    for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_running_statistics_are_those_of_the_adversarial_images_alone(network):
    with_gain, without = _particles(network), _particles(network)
    _step(InformationGain(ATTACK, weight=5.0), with_gain)
    _step(InformationGain(ATTACK, weight=0.0), without)
    assert all(torch.equal(a, b) for a, b in zip(with_gain.buffers(), without.buffers(), strict=True))


def test_the_ensemble_may_be_attacked_instead_of_a_particle(network):
    model, batch, seen = _particles(network), _batch(), []

    class Watched:
        def __call__(self, model, x, y, *, generator):
            seen.append(model)
            return ATTACK(model, x, y, generator=generator)

    for attacked in ("particle", "ensemble"):
        for seed in range(12):
            InformationGain(Watched(), attacked=attacked)(model, batch, _state(seed))
    assert {id(one) for one in seen[:12]} == {id(member) for member in model.members}, "drawn anew for each batch"
    assert all(one is model for one in seen[12:])


def test_mixing_is_a_share_of_the_steps(network):
    model = _particles(network)
    mixed = ["kernel" in _step(InformationGain(ATTACK, mixing=0.5), model, _batch(6), seed)[2] for seed in range(40)]
    assert 10 < sum(mixed) < 30


def _cells():
    sizes = {"channels": 2, "cells": 4, "input_shape": (1, 8, 8), "classes": 3}
    return SPACE.build(SPACE.random(_generator()), **sizes, mean=(0.5,), std=(0.25,)), (1, 8)


def _resnet():
    return nn.Sequential(Normalise((0.5,) * 3, (0.25,) * 3), torchvision.models.resnet18(num_classes=3)), (3, 32)


def _vit():
    vit = torchvision.models.vision_transformer.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=3
    )
    return nn.Sequential(Normalise((0.5,) * 3, (0.25,) * 3), vit), (3, 32)


@pytest.mark.parametrize("make", [_cells, _resnet, _vit])
def test_it_trains_any_network(make):
    _, (channels, size) = make()
    model = MeanOfParticles(2).predictor(lambda: make()[0]).train()
    batch = _batch(6, channels, size, torch.float32)
    loss, found, metrics = _step(InformationGain(Pgd(ThreatModel("linf", 0.03), steps=1)), model, batch)
    assert math.isfinite(float(loss)) and all(math.isfinite(float(value)) for value in metrics.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(bool(gradient.isfinite().all()) for gradient in found if gradient is not None)


TRAINING = Training(epochs=6, batch_size=12, optimiser=Sgd(0.05), augmentation=Augmentation())


class Stopped(Exception):
    pass


def _stop(record):
    if record["epoch"] == 2:
        raise Stopped


def test_it_resumes_and_its_ensemble_falls_more_often_than_one_particle_seems_to(data, parts, network, tmp_path):
    """The paper's own weaker attack, on one particle, is no measure of the ensemble: gradients have to be averaged."""
    model, common = Particles([network(seed) for seed in range(4)]), {"validation_attack": ATTACK, "seed": 4}
    method = InformationGain(ATTACK, particles=4)
    records = train(model, data, parts, method, TRAINING, **common)
    assert records[-1]["accuracy"] > 0.6 and records[-1]["loss"] < records[0]["loss"]
    resumed, file = Particles([network(seed) for seed in range(4)]), tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        train(resumed, data, parts, method, TRAINING, **common, checkpoint=file, log=_stop)
    assert train(resumed, data, parts, method, TRAINING, **common, checkpoint=file) == records
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )

    class OnOne:
        def __call__(self, model, x, y, *, generator):
            return strong(model.members[0], x, y, generator=generator)

    strong = Pgd(ThreatModel("linf", 0.12), steps=20)
    x, y = data.x_train.float() / 255, data.y_train
    trials = {"averaged": Trial(strong), "one particle": Trial(OnOne())}
    found = {name: float(mask.float().mean()) for name, mask in evaluate(model, x, y, trials, seed=0).attacks.items()}
    assert 0 < found["averaged"] < found["one particle"] < 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"particles": 0},
        {"particles": 10**6},
        {"weight": -1.0},
        {"weight": math.nan},
        {"repulsion": math.inf},
        {"emphasis": -0.1},
        {"mixing": 1.1},
        {"attacked": "both"},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError):
        InformationGain(**wrong)


def test_an_auxiliary_head_is_refused_where_gradients_would_lose_their_mixing():
    changes = ["train.method={name='information_gain'}", "train.auxiliary_weight=0.4"]
    with pytest.raises(InputError, match="auxiliary_weight"):
        build(read_table("digits", changes))
    assert build(read_table("digits", [*changes, "train.auxiliary_weight=0"])).train.objective.particles == 10
