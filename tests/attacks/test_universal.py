"""Universal perturbations: one for all, found on some images and used on others."""

import pytest
import torch
from torch import nn

from nas.attacks.universal import Universal
from nas.errors import InputError
from nas.threat_model import ThreatModel

THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.7)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _linear():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 64, generator=_generator(1), dtype=torch.float64))
    return model


def _images(n, seed=2):
    return 0.3 + 0.4 * torch.rand(n, 1, 8, 8, generator=_generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_for_one_class_of_a_linear_model_it_is_the_worst_case_of_every_image(threat_model):
    model, x, y = _linear(), _images(10), torch.zeros(10, dtype=torch.int64)
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 1, 8, 8)
    # A fall of the step to nothing, and no cap to stop at.
    attack = Universal(threat_model, passes=200, step_size=threat_model.epsilon, cap=1e9, loss="margin")
    perturbation = attack.fit(model, x, y, generator=_generator())
    expected = threat_model.epsilon * threat_model.geometry.steepest(w)
    reached = (perturbation.delta * w).sum() / (expected * w).sum()
    # The best of all passes is the first that misleads the most: from there on nothing is gained.
    x_adv = perturbation(model, x, y, generator=_generator())
    misled = (model(x_adv).argmax(1) != y).sum()
    best = (model(x + expected).argmax(1) != y).sum()
    assert int(misled) == int(best)
    assert float(reached) > 0.3


def test_the_same_perturbation_misleads_images_it_has_not_seen():
    """Two clusters of images: fitted on some of them, it does to the others what random perturbations do not."""
    torch.manual_seed(0)
    centres = torch.rand(3, 1, 8, 8, generator=_generator(9))
    y = torch.arange(240) % 3
    x = (centres[y] + 0.1 * torch.randn(240, 1, 8, 8, generator=_generator(3))).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    model.zero_grad()
    threat_model = ThreatModel("linf", 0.25)
    attack = Universal(threat_model, batch_size=50).fit(model, x[:120], y[:120], generator=_generator())
    unseen, labels = x[120:], y[120:]

    def wrong(images):
        return float((model(images).argmax(1) != labels).double().mean())

    x_adv = attack(model, unseen, labels, generator=_generator())
    noise = threat_model.project(unseen + threat_model.epsilon * torch.randn(1, 1, 8, 8).sign(), unseen)
    assert wrong(unseen) < 0.02
    assert wrong(x_adv) > 0.3 > 0.1 > wrong(noise)
    assert bool(threat_model.contains(x_adv, unseen).all())
    inside = (unseen + attack.delta >= 0) & (unseen + attack.delta <= 1)
    torch.testing.assert_close((x_adv - unseen)[inside], attack.delta.expand_as(unseen)[inside], rtol=0, atol=1e-6)


def test_called_as_an_attack_it_fits_its_batch():
    model, x, y = _linear(), _images(10), torch.arange(10) % 2
    attack = Universal(THREATS[0], passes=3)
    expected = attack.fit(model, x, y, generator=_generator())(model, x, y, generator=_generator())
    assert torch.equal(attack(model, x, y, generator=_generator()), expected)
    assert not torch.equal(attack(model, x, y, generator=_generator(1)), expected)


def test_images_of_another_shape_are_refused():
    model, x, y = _linear(), _images(4), torch.arange(4) % 2
    perturbation = Universal(THREATS[0], passes=1).fit(model, x, y, generator=_generator())
    with pytest.raises(InputError, match="shape"):
        perturbation(model, torch.rand(2, 1, 4, 4), y[:2], generator=_generator())


def test_wrong_settings_are_refused():
    for settings in ({"passes": 0}, {"batch_size": 0}, {"step_size": -1.0}, {"cap": 0.0}, {"loss": "kl"}):
        with pytest.raises(InputError):
            Universal(**settings)
