"""Averages of weights: by hand, over steps and over epochs, statistics included; after a crash as without one."""

import copy

import pytest
import torch
from torch import nn

from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training import loop
from nas.training.loop import Training, Validation, train
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.weight_average import EpochAverage, MovingAverage

ATTACK = Pgd(ThreatModel("linf", 0.08), steps=1)


def _training(**settings):
    defaults = {"epochs": 4, "batch_size": 12, "augmentation": Augmentation(crop=1)}
    return Training(**{**defaults, "optimiser": Sgd(0.05, schedule="constant"), **settings})


def _train(model, data, parts, training, objective=None, **more):
    return train(model, data, parts, objective or Standard(), training, validation_attack=ATTACK, seed=3, **more)


def _same(first, second):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_decay_grows_after_the_copies(warmup):
    average = MovingAverage(nn.Linear(2, 2), 0.9, warmup)
    decays = [average.decay_at(step) for step in range(200)]
    if not warmup:
        assert decays == [0.9] * 200
        return
    assert decays[:3] == [0, 0, 0]
    assert decays[3:6] == [1 / 10, 2 / 11, 3 / 12]
    assert decays == sorted(decays) and decays[3 + 80 : 3 + 83] == [81 / 90, 0.9, 0.9]


def test_a_moving_average_by_hand(network):
    """A copy at first; then w <- t w + (1 - t) w', buffers likewise; constant weights stay as they are."""
    model = network()
    average, expected = MovingAverage(model, 0.8, warmup=2), {}
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            model.features[1].running_mean.add_(1.0)
        average.after_step(model)
        decay = average.decay_at(step)
        for name, value in model.state_dict().items():
            expected[name] = decay * expected.get(name, 0) + (1 - decay) * value
        if step < 2:
            assert _same(average.network, model)
    for name, value in average.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not _same(average.network, model)
    still, last = MovingAverage(model, 0.8), {}
    for _ in range(5):
        still.after_step(model)
        last = dict(still.network.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(last[name], parameter)


@pytest.mark.parametrize("swa", [0.5, 0.75, 0.01])
def test_the_mean_of_the_last_epochs_with_statistics_of_its_own(swa, data, parts, network, monkeypatch):
    """By hand: mean of the weights, mean over the clean training images of the statistics of their batches."""
    ends, judged, model = [], [], network()
    monkeypatch.setattr(
        loop, "validate", lambda *arguments: judged.append(copy.deepcopy(arguments[0])) or Validation(0.5, 0.5)
    )
    _train(model, data, parts, _training(swa=swa), log=lambda record: ends.append(copy.deepcopy(model)))
    first = {0.5: 2, 0.75: 3, 0.01: 1}[swa]
    assert _same(judged[0], ends[0]), "before the average begins the network is judged"
    mean = {
        name: torch.stack([dict(e.named_parameters())[name] for e in ends[first:]]).mean(0)
        for name, _ in ends[0].named_parameters()
    }
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, mean[name], rtol=1e-5, atol=1e-7)
    assert _same(judged[-1], model)
    images = data.x_train[parts.training].float() / 255
    whole = images[: len(images) // 12 * 12].split(12)
    maps = [model.features[0](model.normalise(batch)) for batch in whole]
    norm = model.features[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0))
    assert norm.momentum == 0.1 and int(norm.num_batches_tracked) == len(whole)


def test_the_average_does_not_disturb_the_training(data, parts, network):
    """Weights and statistics of the network itself are those of a training without it."""
    found = []
    for settings in ({}, {"swa": 0.3}, {"ema": 0.9, "ema_warmup": 0.1}):
        model, states = network(), []
        _train(model, data, parts, _training(**settings), log=lambda r, m=model, s=states: s.append(copy.deepcopy(m)))
        found.append(states[-1])
    assert _same(found[0], found[1]) and _same(found[0], found[2])


@pytest.mark.parametrize("settings", [{"swa": 0.4}, {"ema": 0.9, "ema_warmup": 0.3}], ids=["swa", "ema"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_training_that_was_cut_off_ends_with_the_same_average(settings, epoch, data, parts, network, tmp_path):
    training, whole, again = _training(**settings), network(), network()
    records = _train(whole, data, parts, training, PgdAt(ATTACK))

    def stop(record):
        if record["epoch"] == epoch:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        _train(again, data, parts, training, PgdAt(ATTACK), checkpoint=checkpoint, log=stop)
    again = network(seed=5)
    assert _train(again, data, parts, training, PgdAt(ATTACK), checkpoint=checkpoint) == records
    assert _same(whole, again)


def test_a_network_without_statistics_is_averaged_too(data, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    average = EpochAverage(model, 0.5)
    assert average.network is None
    for step in range(4):
        with torch.no_grad():
            model[1].weight.fill_(step)
        average.after_epoch(model, step / 4, iter(()))
    assert bool((average.network[1].weight == 2.5).all())
    _train(model, data, parts, _training(swa=0.5))


def test_wrong_settings_are_refused():
    for settings in ({"ema_warmup": 1.0}, {"ema_warmup": 0.1}, {"swa": -0.1}, {"swa": 1.0}, {"swa": 0.5, "ema": 0.9}):
        with pytest.raises(InputError):
            Training(**settings)
