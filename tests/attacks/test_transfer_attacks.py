"""I-FGSM and momentum: the same walk in the limit, and what diversity and smoothing do to a gradient."""

import pytest
import torch
from torch import nn

from nas.attacks.ifgsm import IterativeFgsm
from nas.attacks.momentum import Momentum, placed, smoothed
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.threat_model import ThreatModel

THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.7), ThreatModel("l1", 3.0)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(54, 4)
    ).eval()  # fmt: skip


def _images(n=12):
    return torch.rand(n, 1, 8, 8, generator=_generator(2)), torch.arange(n) % 4


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_ifgsm_is_pgd_from_the_clean_image_in_steps_of_epsilon_over_their_number(threat_model):
    model, (x, y) = _network(), _images()
    expected = Pgd(threat_model, 5, threat_model.epsilon / 5, random_start=False)(model, x, y, generator=_generator())
    assert torch.equal(IterativeFgsm(threat_model, 5)(model, x, y, generator=_generator()), expected)
    assert IterativeFgsm(threat_model, 5, 0.02).step == 0.02


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_without_memory_momentum_is_ifgsm(threat_model):
    model, (x, y) = _network(), _images()
    expected = IterativeFgsm(threat_model, 6)(model, x, y, generator=_generator())
    found = Momentum(threat_model, 6, decay=0.0)(model, x, y, generator=_generator())
    torch.testing.assert_close(found, expected)
    assert not torch.equal(Momentum(threat_model, 6)(model, x, y, generator=_generator()), expected)


class _Turns(nn.Module):
    """The slope of the margin at x_0 changes its sign once x_0 exceeds 0.52; that of x_1 does not."""

    def forward(self, x):
        a, b = x.flatten(1).unbind(1)
        rise = torch.where(a < 0.52, 3 * a, 3 * 0.52 - 1 * (a - 0.52)) + 1 * b
        return torch.stack([torch.zeros_like(rise), rise], 1)


def test_momentum_carries_over_a_turn_by_the_sum_of_normalised_gradients():
    """Gradients (3, 1), (-1, 1) have |.|_1 of 4 and 2: the sums of x_0 are 0.75, then decay 0.75 - 0.5."""
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    ball = ThreatModel("linf", 0.2)
    for decay, forward in ((1.0, True), (0.7, True), (0.6, False), (0.0, False)):
        attack = Momentum(ball, 2, 0.05, decay=decay, loss="margin")
        x_adv = attack(_Turns(), x, y, generator=_generator())
        expected = torch.tensor([0.6 if forward else 0.5, 0.6]).view(1, 1, 1, 2)
        torch.testing.assert_close(x_adv, expected)


def test_a_smoothed_gradient_is_the_correlation_with_a_gaussian():
    gradient = torch.zeros(1, 2, 9, 9)
    gradient[0, 0, 4, 4] = 1.0
    for size in (3, 7):
        out = smoothed(gradient, size)
        places = torch.linspace(-3, 3, size)
        kernel = torch.exp(-places.square()[:, None] / 2 - places.square()[None] / 2)
        kernel /= kernel.sum()
        half = size // 2
        torch.testing.assert_close(out[0, 0, 4 - half : 5 + half, 4 - half : 5 + half], kernel)
        assert float(out.sum()) == pytest.approx(1.0, abs=1e-5)
        assert not bool(out[0, 1].any()), "channels do not mix"
    assert torch.equal(smoothed(gradient, 1), gradient)


def test_a_placed_image_is_its_small_copy_among_zeros():
    x = torch.rand(2, 3, 8, 6, generator=_generator())
    assert placed(x, (8, 6), 0, 0) is x
    y = placed(x, (4, 3), 3, 2)
    assert y.shape == x.shape
    torch.testing.assert_close(y[:, :, 3:7, 2:5], nn.functional.avg_pool2d(x, 2))
    y[:, :, 3:7, 2:5] = 0
    assert not bool(y.any())


def test_diversity_is_drawn_as_asked():
    seen = []

    class _Looks(nn.Module):
        def forward(self, x):
            seen.append(x.detach()[0, 0] > 0)
            return torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)

    x, y = torch.ones(2, 1, 20, 30), torch.tensor([0, 1])
    Momentum(steps=60, diversity=0.5, smallest=0.6)(_Looks(), x, y, generator=_generator())
    areas = torch.tensor([float(mask.sum()) for mask in seen])
    assert 15 < int((areas == 600).sum()) < 45
    assert float(areas.min()) >= 0.6**2 * 600 * 0.9
    assert len(areas.unique()) > 5
    corners = {bool(mask[0, 0]) for mask, area in zip(seen, areas, strict=True) if area < 600}
    assert corners == {True, False}, "places differ"


@pytest.mark.parametrize("options", [{"diversity": 0.7, "smallest": 0.5}, {"smoothing": 3}], ids=str)
@pytest.mark.parametrize("threat_model", THREATS, ids=str)
def test_options_keep_the_contract(options, threat_model):
    model, (x, y) = _network(), _images()
    attack = Momentum(threat_model, 6, **options)
    x_adv = attack(model, x, y, generator=_generator())
    assert bool(threat_model.contains(x_adv, x).all())
    assert torch.equal(x_adv, attack(model, x, y, generator=_generator()))
    loss = nn.functional.cross_entropy
    with torch.no_grad():
        assert float(loss(model(x_adv), y)) > float(loss(model(x), y))
    assert next(iter(options)) in str(attack)


def test_wrong_settings_are_refused():
    for cls, settings in (
        (IterativeFgsm, {"steps": 0}),
        (IterativeFgsm, {"step_size": -1.0}),
        (IterativeFgsm, {"loss": "kl"}),
        (Momentum, {"steps": 0}),
        (Momentum, {"decay": -0.1}),
        (Momentum, {"diversity": 1.1}),
        (Momentum, {"smallest": 0.0}),
        (Momentum, {"smoothing": 4}),
        (Momentum, {"loss": "kl"}),
    ):
        with pytest.raises(InputError):
            cls(**settings)
