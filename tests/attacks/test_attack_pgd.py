"""FGSM and PGD against each other, and what PGD keeps and starts from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.attacks.fgsm import Fgsm
from nas.attacks.fixed import Fixed
from nas.attacks.losses import LOSSES
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.threat_model import ThreatModel
from search_spaces.dsara import SPACE

THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.7)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _network(dtype=torch.float32):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 2), nn.SiLU(), nn.Flatten(),
        nn.Linear(54, 4),
    )  # fmt: skip
    model(torch.rand(16, 1, 8, 8))
    return model.to(dtype).eval()


def _cells():
    torch.manual_seed(1)
    sizes = {"channels": 2, "cells": 4, "input_shape": (1, 8, 8), "classes": 4, "mean": (0.5,), "std": (0.3,)}
    model = SPACE.build(SPACE.random(_generator(4)), **sizes)
    model(torch.rand(16, 1, 8, 8))
    return model.eval()


def _images(n=12, dtype=torch.float32):
    return torch.rand(n, 1, 8, 8, generator=_generator(2), dtype=dtype), torch.arange(n) % 4


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("make", [_network, _cells])
def test_fgsm_is_one_pgd_step_bit_for_bit(threat_model, statistics, loss, make):
    model, (x, y) = make(), _images()
    fgsm = Fgsm(threat_model, loss, statistics)
    pgd = Pgd(threat_model, 1, threat_model.epsilon, loss, random_start=False, statistics=statistics)
    ours = fgsm(model, x, y, generator=_generator())
    assert not torch.equal(ours, x)
    assert torch.equal(ours, pgd(model, x, y, generator=_generator()))


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_best_iterate_is_never_weaker_than_any_iterate(threat_model, loss):
    """The model is asked for every iterate; steps far too long make the last one a poor choice."""
    model, (x, y) = _network(torch.float64), _images(dtype=torch.float64)
    seen = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    settings = {"steps": 8, "step_size": 1.5 * threat_model.epsilon, "loss": loss}
    best = Pgd(threat_model, keep="best", **settings)(model, x, y, generator=_generator())
    handle.remove()
    iterates = seen[1:] if loss == "kl" else seen  # the first pass of KL is the clean one
    assert len(iterates) == 9
    last = Pgd(threat_model, keep="last", **settings)(model, x, y, generator=_generator())
    assert torch.equal(last, iterates[8]), "both walk the same way"
    with torch.no_grad():
        clean = model(x)
        losses = torch.stack([LOSSES[loss](model(iterate), y, clean) for iterate in iterates])
        kept = LOSSES[loss](model(best), y, clean)
    torch.testing.assert_close(kept, losses.amax(0), rtol=0, atol=1e-12)
    assert bool((losses[-1] < losses.amax(0) - 1e-6).any()), "otherwise the choice of iterate was not put to the test"


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_more_steps_do_not_make_the_best_iterate_weaker(threat_model):
    model, (x, y) = _network(torch.float64), _images(dtype=torch.float64)
    losses = []
    for steps in (1, 3, 9):
        attack = Pgd(threat_model, steps, threat_model.epsilon / 3, keep="best")
        x_adv = attack(model, x, y, generator=_generator())
        losses.append(LOSSES["cross_entropy"](model(x_adv), y, None).detach())
    assert bool((losses[1] >= losses[0] - 1e-12).all())
    assert bool((losses[2] >= losses[1] - 1e-12).all())
    assert float(losses[2].mean()) > float(losses[0].mean())


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_pgd_starts_where_the_threat_model_draws(threat_model):
    model, (x, y) = _network(), _images()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    Pgd(threat_model)(model, x, y, generator=_generator(7))
    assert torch.equal(seen[0], threat_model.random_start(x, _generator(7)))
    seen.clear()
    Pgd(threat_model, random_start=False)(model, x, y, generator=_generator(7))
    assert torch.equal(seen[0], x)


def _robust(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) == y


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_sample_that_stops_when_broken_stays_at_its_first_misclassified_iterate(threat_model, keep, loss):
    """Labels are what the network says, but for a few: those are broken from the start."""
    model, (x, _) = _network(torch.float64), _images(40, torch.float64)
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    settings = {"steps": 12, "step_size": 0.4 * threat_model.epsilon, "loss": loss, "keep": keep}
    seen = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    full = Pgd(threat_model, **settings)(model, x, y, generator=_generator())
    handle.remove()
    iterates = seen[1:] if loss == "kl" else list(seen)
    if keep == "last":
        iterates = [*iterates, full]
    broken = torch.stack([~_robust(model, iterate, y) for iterate in iterates])
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    seen.clear()
    stopped = Pgd(threat_model, stop_when_broken=True, **settings)(model, x, y, generator=_generator())
    handle.remove()
    for row in range(len(x)):
        if bool(broken[:, row].any()):
            first = int(broken[:, row].int().argmax())
            torch.testing.assert_close(stopped[row], iterates[first][row], rtol=0, atol=1e-9)
        else:
            torch.testing.assert_close(stopped[row], full[row], rtol=0, atol=1e-9)
    assert 3 < int(broken.any(0).sum()) < len(x), "some must break on the way and some never"
    assert not bool((_robust(model, stopped, y) & ~_robust(model, full, y)).any()), "never weaker"
    sizes = [len(images) for images in (seen[1:] if loss == "kl" else seen)]
    survivors = [int((~broken[:step].any(0)).sum()) for step in range(len(sizes))]
    assert sizes == survivors, "broken samples cost nothing"


def test_a_batch_that_is_broken_throughout_is_returned_at_once():
    model, (x, _) = _network(), _images()
    y = (model(x).argmax(1) + 1) % 4
    attack = Pgd(random_start=False, stop_when_broken=True)
    assert torch.equal(attack(model, x, y, generator=_generator()), x)


def test_every_iterate_is_in_the_ball():
    model, (x, y) = _network(), _images()
    for threat_model in THREATS:
        seen = []
        handle = model.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].detach()))
        Pgd(threat_model, 5, 3 * threat_model.epsilon, keep="best")(model, x, y, generator=_generator())
        handle.remove()
        assert len(seen) == 6
        for iterate in seen:
            assert float(threat_model.distance(iterate, x).max()) <= threat_model.epsilon + 1e-6
            assert float(iterate.min()) >= 0
            assert float(iterate.max()) <= 1


def test_the_automatic_step_is_the_documented_one():
    threat_model = ThreatModel("linf", 0.1)
    for steps in (1, 2, 3, 10, 100):
        assert Pgd(threat_model, steps).step == pytest.approx(min(2.5 * 0.1 / steps, 0.1))
    assert Pgd(threat_model, 10, 0.03).step == 0.03


def test_batch_statistics_are_used_where_asked_for():
    """Running statistics far from those of the batch: the two settings must see different networks."""
    model, (x, y) = _network(), _images()
    model[1].running_mean += 5
    images = {
        statistics: Pgd(statistics=statistics)(model, x, y, generator=_generator())
        for statistics in ("running", "batch")
    }
    assert not torch.equal(images["running"], images["batch"])
    model[1].running_mean -= 50
    assert torch.equal(Pgd(statistics="batch")(model, x, y, generator=_generator()), images["batch"])


def test_wrong_settings_are_refused():
    for attack, settings in (
        (Pgd, {"steps": 0}),
        (Pgd, {"step_size": -0.1}),
        (Pgd, {"step_size": float("nan")}),
        (Pgd, {"loss": "cross-entropy"}),
        (Pgd, {"statistics": "batch", "stop_when_broken": True}),
        (Fgsm, {"loss": "margins"}),
    ):
        with pytest.raises(InputError):
            attack(**settings)


@pytest.mark.parametrize("refused", [lambda: Fgsm(loss="kl"), lambda: Pgd(loss="kl", random_start=False)])
def test_a_loss_that_is_flat_at_the_start_is_refused(refused):
    """KL(p(x) || p(x_adv)) has its minimum at x_adv = x: a gradient there is rounding noise, and its sign a coin."""
    with pytest.raises(InputError):
        refused()


def test_fixed_returns_the_stored_images_and_checks_the_shape():
    x, y = _images()
    stored = torch.rand_like(x)
    assert Fixed(stored)(_network(), x, y, generator=_generator()) is stored
    with pytest.raises(ValueError):
        Fixed(stored)(_network(), x[:3], y[:3], generator=_generator())


def test_attacks_are_values():
    assert Pgd(ThreatModel("l2", 1.0)) == Pgd(ThreatModel("l2", 1.0))
    assert hash(Fgsm()) == hash(Fgsm())
    assert Pgd(steps=3) != Pgd(steps=4)


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_fgsm_with_random_start_is_one_long_pgd_step_bit_for_bit(threat_model, loss):
    """FGSM-RS: from a uniform start, 1.25 epsilon, projected."""
    model, (x, y) = _network(), _images()
    fgsm = Fgsm(threat_model, loss, random_start=True)
    pgd = Pgd(threat_model, 1, 1.25 * threat_model.epsilon, loss)
    assert torch.equal(fgsm(model, x, y, generator=_generator()), pgd(model, x, y, generator=_generator()))
    assert "RS" in str(fgsm) and "RS" not in str(Fgsm(threat_model))


def test_fgsm_with_random_start_on_a_linear_model():
    """The input gradient of a linear model is w everywhere: delta = clip(start + 1.25 eps sign(w), -eps, eps)."""
    threat_model = ThreatModel("linf", 0.1)
    w = torch.randn(2, 64, generator=_generator(3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        model[1].weight.copy_(w)
    x = 0.3 + 0.4 * _images(8)[0]
    y = torch.arange(8) % 2
    start = threat_model.random_start(x, _generator(5)) - x
    rising = (w[1 - y] - w[y]).sign().view_as(x)
    expected = x + (start + 0.125 * rising).clamp(-0.1, 0.1)
    found = Fgsm(threat_model, random_start=True)(model, x, y, generator=_generator(5))
    torch.testing.assert_close(found, expected)
    assert float((found - x - 0.1 * rising).abs().max()) > 0.01, "not every pixel reaches the far side"
    assert float(((found - x) * rising).min()) >= 0.025 - 1e-6, "a quarter of epsilon is the least"


@pytest.mark.parametrize("attack", [Fgsm(THREATS[0]), Fgsm(THREATS[0], random_start=True), Pgd(THREATS[0], 2)], ids=str)
def test_a_given_start_takes_the_place_of_the_attacks_own(attack):
    """Nothing is drawn, and from the random start itself the result is that of the attack with a random start."""
    model, (x, y) = _network(), _images()
    generator = _generator(7)
    start = THREATS[0].random_start(x, _generator(1))
    found = attack(model, x, y, generator=generator, start=start)
    assert torch.equal(generator.get_state(), _generator(7).get_state())
    if attack.random_start:
        assert torch.equal(found, attack(model, x, y, generator=_generator(1)))
    else:
        assert not torch.equal(found, attack(model, x, y, generator=_generator(1)))


def test_a_step_size_of_fgsm_is_checked_and_used():
    model, x, y = _network(), 0.3 + 0.4 * _images()[0], _images()[1]
    found = Fgsm(THREATS[0], step_size=0.03)(model, x, y, generator=_generator())
    assert float((found - x).abs().max()) == pytest.approx(0.03, abs=1e-6)
    with pytest.raises(InputError, match="step_size"):
        Fgsm(step_size=-1.0)


@pytest.mark.parametrize("attack", [Pgd(ThreatModel("linf", 0.1), steps=5), Fgsm(ThreatModel("linf", 0.1))])
def test_an_objective_of_the_caller_is_climbed_like_the_loss(attack):
    """The same images where the objective is the loss; the steepest corner of a linear one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = 0.5 + 0 * torch.rand(4, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def stream():
        return torch.Generator().manual_seed(1)

    same = attack.maximise(
        model, lambda images: F.cross_entropy(model(images), y, reduction="none"), x, generator=stream()
    )
    assert torch.equal(same, attack(model, x, y, generator=stream()))
    slope = torch.randn(16, dtype=torch.float64)
    corner = attack.maximise(model, lambda images: images.flatten(1) @ slope, x, generator=stream())
    torch.testing.assert_close(corner, x + 0.1 * slope.sign().view(1, 1, 4, 4))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
