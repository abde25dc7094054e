"""Noise layers: where the noise goes and how much there is, what it leaves alone, and the mean over its draws."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.attacks.pgd import Pgd
from nas.defences.noise import ImageNoise, LayerNoise, NoiseEnsemble
from nas.errors import InputError
from nas.objective import Batch, State
from nas.threat_model import ThreatModel
from nas.training.gaussian_augmentation import GaussianAugmentation
from nas.training.self_ensemble import SelfEnsemble
from nas.training.standard import Standard
from search_spaces.dsara import SPACE

NOISES = [ImageNoise(0.25), LayerNoise(0.4, 0.2)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(144, 3),
        ).eval()  # fmt: skip


def _cells():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"channels": 4, "cells": 4, "input_shape": (2, 8, 8), "classes": 3}
        return SPACE.build(SPACE.random(_generator()), **sizes, mean=(0.4, 0.6), std=(0.2, 0.3)).eval()


def _images(n=8, channels=1, seed=0):
    return torch.rand(n, channels, 8, 8, generator=_generator(seed))


def _inputs_of_convolutions(model, x):
    """What every convolution's arithmetic really sees, by replacing it."""
    seen, restore = [], []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            original = module._conv_forward
            restore.append(module)

            def watch(value, *rest, original=original):
                seen.append(value.detach().clone())
                return original(value, *rest)

            module._conv_forward = watch
    with torch.no_grad():
        model(x)
    for module in restore:
        del module._conv_forward
    return seen


def test_every_convolution_sees_noise_of_its_own_deviation():
    """Weights 0: behind each convolution all is constant, so what varies is the noise just before the next one."""
    model = _network()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
    x = torch.full((500, 1, 8, 8), 0.5)
    clean = _inputs_of_convolutions(model, x)
    with LayerNoise(0.4, 0.1).within(model, _generator()):
        noisy = _inputs_of_convolutions(model, x)
    added = [after - before for after, before in zip(noisy, clean, strict=True)]
    assert [round(float(noise.std()), 2) for noise in added] == [0.4, 0.1]
    for noise, deviation in zip(added, (0.4, 0.1), strict=True):
        standard = noise / deviation
        assert abs(float(standard.mean())) < 0.03
        assert abs(float(standard.pow(4).mean()) - 3) < 0.15, "Gaussian"
        assert abs(float((standard[:-1] * standard[1:]).mean())) < 0.03, "drawn for each image"


def test_noise_on_the_image_is_on_the_image_alone():
    model, x = _network(), torch.full((500, 1, 8, 8), 0.5)
    seen = []
    handle = model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with ImageNoise(0.25).within(model, _generator()), torch.no_grad():
        model(x)
    handle.remove()
    assert float((seen[0] - x).std()) == pytest.approx(0.25, rel=0.02)
    expected = x + 0.25 * torch.randn(x.shape, generator=_generator())
    torch.testing.assert_close(seen[0], expected)


def test_a_network_of_cells_is_noisy_at_every_convolution():
    """Cells on kernels of our own must not pass by the noise."""
    model, x = _cells(), _images(16, channels=2)
    count = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    fired = []
    original = torch.randn

    def counting(*args, **settings):
        fired.append(args[0])
        return original(*args, **settings)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "randn", counting)
        with LayerNoise(0.1, 0.1).within(model, _generator()):
            noisy = model(x)
    assert len(fired) >= count > 10
    with torch.no_grad():
        assert not torch.allclose(noisy, model(x), atol=1e-3)


@pytest.mark.parametrize("noise", NOISES, ids=str)
@pytest.mark.parametrize("make", [_network, _cells], ids=["plain", "cells"])
def test_the_network_is_left_as_it_was(noise, make):
    model = make()
    x = _images(4, channels=1 if make is _network else 2)
    with torch.no_grad():
        before = model(x)
        with noise.within(model, _generator()):
            assert not torch.allclose(model(x), before)
        with pytest.raises(RuntimeError), noise.within(model, _generator()):
            raise RuntimeError
        assert torch.equal(model(x), before)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("noise", [ImageNoise(0.0), LayerNoise(0.0, 0.0)], ids=str)
def test_an_ensemble_without_noise_is_the_network(noise):
    model, x = _network(), _images()
    with torch.no_grad():
        torch.testing.assert_close(NoiseEnsemble(model, noise, draws=3)(x), model(x).log_softmax(1))


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_an_ensemble_averages_the_probabilities_of_its_draws(noise):
    model, x = _network(), _images()
    ensemble = NoiseEnsemble(model, noise, draws=6, seed=4)
    with torch.no_grad():
        found = ensemble(x)
        single = NoiseEnsemble(model, noise, draws=1, seed=4)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(len(x)))
        many = torch.stack([single(x).exp() for _ in range(800)])
        again = NoiseEnsemble(model, noise, draws=800, seed=5)(x).exp()
    deviation = many.std(0) * math.sqrt(2 / 800)
    assert float(((many.mean(0) - again).abs() / (deviation + 1e-9)).max()) < 5


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_calls_differ_but_ensembles_of_one_seed_repeat_each_other(noise):
    model, x = _network(), _images()
    stream = torch.get_rng_state()
    with torch.no_grad():
        ensemble = NoiseEnsemble(model, noise, draws=2, seed=1)
        first, second = ensemble(x), ensemble(x)
        other = copy.deepcopy(NoiseEnsemble(model, noise, draws=2, seed=1))
        assert torch.equal(first, other(x)) and torch.equal(second, other(x))
        assert not torch.allclose(first, second)
        assert not torch.allclose(first, NoiseEnsemble(model, noise, draws=2, seed=2)(x))
        ensemble.calls = 0
        assert torch.equal(first, ensemble(x))
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_gradients_are_those_of_the_mean_and_attacks_get_through(noise):
    """More draws, steadier gradient: the mean cosine between two independent ones rises."""
    model, x = _network(), _images(16).requires_grad_()

    def gradient(draws, seed):
        loss = F.nll_loss(NoiseEnsemble(model, noise, draws, seed)(x), torch.arange(16) % 3)
        return torch.autograd.grad(loss, x)[0].flatten(1)

    few, many = (float(F.cosine_similarity(gradient(n, 1), gradient(n, 2)).mean()) for n in (1, 30))
    assert many > 0.7
    assert many > few
    ensemble = NoiseEnsemble(model, noise, draws=10)
    with torch.no_grad():
        y = ensemble(x).argmax(1)
        threat_model = ThreatModel("linf", 0.2)
        x_adv = Pgd(threat_model, steps=10)(ensemble, x.detach(), y, generator=_generator())
        judge = NoiseEnsemble(model, noise, draws=300)
        likely = [
            judge(images).gather(1, y[:, None]) for images in (x, x_adv, threat_model.random_start(x, _generator()))
        ]
    attacked, by_chance = likely[0] - likely[1], likely[0] - likely[2]
    assert float(attacked.min()) > 0
    assert float(attacked.mean()) > 5 * float(by_chance.abs().mean())


@pytest.mark.parametrize("method", [GaussianAugmentation(ImageNoise(0.0)), SelfEnsemble(LayerNoise(0.0, 0.0))], ids=str)
def test_training_without_noise_is_standard_training(method):
    loss, found = _loss_and_gradients(method, _network())
    expected, gradients = _loss_and_gradients(Standard(), _network())
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    for ours, theirs in zip(found, gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_training_with_noise_is_the_loss_under_that_noise():
    model, batch = _network(), _batch()
    loss, _ = GaussianAugmentation(ImageNoise(0.3))(model, batch, _state(7))
    noisy = batch.x + 0.3 * torch.randn(batch.x.shape, generator=_generator(7))
    torch.testing.assert_close(loss, F.cross_entropy(model(noisy), batch.y))
    loss, _ = SelfEnsemble(LayerNoise(0.3, 0.2))(model, batch, _state(7))
    stream = _generator(7)
    maps = batch.x + 0.3 * torch.randn(batch.x.shape, generator=stream)
    maps = model[:3](maps)
    maps = maps + 0.2 * torch.randn(maps.shape, generator=stream)
    torch.testing.assert_close(loss, F.cross_entropy(model[3:](maps), batch.y))


def _batch(n=12):
    return Batch(_images(n), torch.arange(n) % 3, torch.arange(n))


def _state(seed=0):
    return State(0, 0, 0.0, _generator(seed + 50), _generator(seed))


def _loss_and_gradients(objective, model):
    loss, _ = objective(model.train(), _batch(), _state())
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ImageNoise(-0.1),
        lambda: ImageNoise(math.nan),
        lambda: LayerNoise(0.1, math.inf),
        lambda: LayerNoise(-0.1),
        lambda: NoiseEnsemble(_network(), ImageNoise(), draws=0),
        lambda: LayerNoise().within(nn.Linear(2, 2), _generator()).__enter__(),
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError):
        wrong()
