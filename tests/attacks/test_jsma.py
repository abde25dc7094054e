"""JSMA: the most salient pair by brute force, its budget, and its ball."""

import itertools

import pytest
import torch
from torch import nn

from nas.attacks import jsma
from nas.attacks.jsma import Jsma
from nas.errors import InputError
from nas.threat_model import ThreatModel

FREE = ThreatModel("linf", 1.0)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _network(seed=0, size=16, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 12), nn.Tanh(), nn.Linear(12, classes)).double().eval()


def _images(n=6):
    x = torch.rand(n, 1, 4, 4, generator=_generator(1), dtype=torch.float64)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = 0.0, 1.0
    return x


@pytest.mark.parametrize("entries", [1, 40, 1 << 24])
def test_the_pair_is_the_most_salient_of_all(entries, monkeypatch):
    """Against a loop over all pairs and both directions, in chunks of any size."""
    monkeypatch.setattr(jsma, "ENTRIES", entries)
    x = _images().flatten(1)
    a = torch.randn(6, 16, generator=_generator(2), dtype=torch.float64)
    b = torch.randn(6, 16, generator=_generator(3), dtype=torch.float64)
    free = torch.rand(6, 16, generator=_generator(4)) < 0.8
    pairs, signs = Jsma(FREE)._pair(x, a, b, free)
    for row in range(6):
        best = (0.0, None, 0)
        for direction, (p, q) in itertools.product((1, -1), itertools.combinations(range(16), 2)):
            up, down = direction * float(a[row, p] + a[row, q]), -direction * float(b[row, p] + b[row, q])
            movable = all(bool(free[row, i]) and float(x[row, i]) != (1.0 if direction > 0 else 0.0) for i in (p, q))
            if movable and up > 0 and down > 0 and up * down > best[0]:
                best = (up * down, {p, q}, direction)
        assert set(pairs[row].tolist()) == best[1]
        assert int(signs[row]) == best[2]


def test_where_no_pair_has_the_wanted_effect_nothing_is_changed():
    _, signs = Jsma(FREE)._pair(_images(2).flatten(1), torch.zeros(2, 16), torch.ones(2, 16), torch.ones(2, 16) > 0)
    assert signs.tolist() == [0, 0]


@pytest.mark.parametrize("values", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("threat_model", [FREE, ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)], ids=str)
def test_the_budget_and_the_ball_are_kept(values, threat_model):
    model, x = _network(), _images()
    y = model(x).argmax(1)
    x_adv = Jsma(threat_model, values)(model, x, y, generator=_generator())
    changed = (x_adv != x).flatten(1).sum(1)
    assert int(changed.max()) <= max(2, int(values * 16))
    assert int(changed.max()) > 0
    assert bool(threat_model.contains(x_adv, x).all())


def test_few_values_are_enough_where_they_decide():
    """A linear model of which two values hold nearly all the weight: these two, each to its bound, and no more."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    w = torch.full((16,), 0.01, dtype=torch.float64)
    w[5], w[9] = 2.0, 1.5
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([w, -w]))
        model[1].bias.copy_(torch.tensor([-1.0, 1.0]))
    x = torch.full((1, 1, 4, 4), 0.6, dtype=torch.float64)
    assert int(model(x).argmax(1)) == 0
    x_adv = Jsma(FREE)(model, x, torch.tensor([0]), generator=_generator())
    assert int(model(x_adv).argmax(1)) == 1
    expected = x.clone().flatten()
    expected[5] = expected[9] = 0.0
    assert torch.equal(x_adv.flatten(), expected)
    small = Jsma(FREE, move=0.05, values=0.15)(model, x, torch.tensor([0]), generator=_generator())
    torch.testing.assert_close(small.flatten()[5], torch.tensor(0.55, dtype=torch.float64))


def test_it_misleads_and_leaves_alone_what_is_misled():
    model, x = _network(3), _images(20)
    y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 3
    x_adv = Jsma(FREE, 1.0)(model, x, y, generator=_generator())
    assert torch.equal(x_adv[:5], x[:5])
    assert float((model(x_adv[5:]).argmax(1) != y[5:]).double().mean()) > 0.8
    assert torch.equal(Jsma(FREE)(model, x[:5], y[:5], generator=_generator()), x[:5])


def test_wrong_settings_are_refused():
    for settings in ({"values": 0.0}, {"values": 1.5}, {"move": 0.0}):
        with pytest.raises(InputError):
            Jsma(**settings)
