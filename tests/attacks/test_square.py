"""The square attack: its windows, bumps and schedule by hand; what it breaks; what it counts."""

import pytest
import torch
from torch import nn

from nas.attacks.losses import margin
from nas.attacks.square import SEARCHES, Draws, Square, bump
from nas.errors import InputError
from nas.threat_model import NORMS, ThreatModel


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class _Brightness(nn.Module):
    """Class 1 where the mean of the image is above one half."""

    def forward(self, x):
        gap = 20 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-gap, gap], 1)


def _grey(values, shape=(2, 6, 9)):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, *shape).contiguous()


def test_the_schedule_of_sides():
    x = torch.zeros(1, 1, 32, 32)
    attack = Square(queries=10002, rescaled=False)
    sides = attack._sides(x, SEARCHES["linf"])
    areas = [0.8 / 2**k for k in range(10)]
    for place, halvings in ((0, 0), (10, 0), (11, 1), (50, 1), (51, 2), (1000, 4), (1001, 5), (8001, 9), (9999, 9)):
        assert int(sides[place]) == max(round((areas[halvings] * 1024) ** 0.5), 1)
    scaled = Square(queries=102)._sides(x, SEARCHES["linf"])
    assert torch.equal(scaled, sides[::100])
    odd = Square(ThreatModel("l2", 1.0), 10002, rescaled=False)._sides(x, SEARCHES["l2"])
    assert set(odd.tolist()) <= {3, 5, 7, 9, 11, 13, 15, 21, 29}
    assert Square(queries=10)._sides(torch.zeros(1, 1, 3, 40), SEARCHES["linf"]).tolist()[0] == 3


@pytest.mark.parametrize("fall, exponent", [(2, 2), (4, 1)])
def test_bumps_by_hand(fall, exponent):
    """The rings of two pyramids, added up one by one."""
    side = 5
    expected = torch.zeros(side, side)
    for top, height, sign in ((0, 2, 1), (2, 3, -1)):
        part = torch.zeros(height, side)
        for ring in range(3):
            rows = slice(max(height // 2 - ring, 0), height // 2 + ring + 1)
            part[rows, max(2 - ring, 0) : 2 + ring + 1] += 1 / (ring + 1) ** fall
        expected[top : top + height] = sign * part / (part**exponent).sum() ** (1 / exponent)
    expected /= (expected.abs() ** exponent).sum() ** (1 / exponent)
    torch.testing.assert_close(bump(side, fall, exponent), expected)


def test_windows_reach_every_place_unless_shared():
    sides = torch.full((4000,), 3)
    places = Draws(_seeded(), shared=False).places(sides, 5)
    assert set(places.tolist()) == {0, 1, 2}
    shared = {int(Draws(_seeded(seed), shared=True).places(sides[:1], 5)) for seed in range(50)}
    assert shared == {0, 1}
    assert Draws(_seeded(), shared=False).places(torch.tensor([5, 5]), 5).tolist() == [0, 0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("norm, epsilon", [("linf", 0.06), ("l2", 0.5), ("l1", 3.0)])
def test_proposals_stay_in_the_ball_and_change_only_windows(norm, epsilon, shared):
    threat_model, search = ThreatModel(norm, epsilon), SEARCHES[norm]
    x = torch.rand(6, 2, 11, 13, generator=_seeded(), dtype=torch.float64)
    draws = Draws(_seeded(), shared)
    rows = {"x": x, **search.begin(x, threat_model, draws)}
    sides = torch.tensor([3] if shared else [3, 3, 5, 5, 7, 3])
    for _ in range(30):
        assert bool(threat_model.contains(rows["best"], x).all())
        images = search.propose(rows, sides, threat_model, draws)
        if norm == "linf":
            changed = (images != rows["best"]).any(1).flatten(1).sum(1)
            assert bool((changed <= sides**2).all())
            ends = (images == (x + epsilon).clamp(max=1)) | (images == (x - epsilon).clamp(min=0))
            assert bool(ends.all())
        rows["best"] = images
    if norm != "linf":
        assert float((threat_model.distance(images, x) / epsilon).min()) > 0.5


@pytest.mark.parametrize("settings", [{}, {"batch_size": 3}, {"shared": True}], ids=str)
@pytest.mark.parametrize("norm, epsilon", [("linf", 0.05), ("l2", 0.05 * 108**0.5), ("l1", 0.05 * 108)])
def test_what_can_be_broken_easily_is_broken_and_nothing_else(norm, epsilon, settings):
    """The mean can be raised by 0.05 in each norm."""
    x = _grey([0.51, 0.495, 0.49, 0.48, 0.46, 0.44, 0.3])
    y = torch.zeros(7, dtype=torch.int64)
    attack = Square(ThreatModel(norm, epsilon), 400, **settings)
    attempt = attack.attempt(_Brightness(), x, y, generator=_seeded())
    assert attempt.broken_at.tolist()[0] == 1
    assert bool((attempt.broken_at[1:3] > 1).all())
    assert attempt.broken_at.tolist()[5:] == [-1, -1]
    assert bool(attack.threat_model.contains(attempt.x_adv, x).all())
    broken = _Brightness()(attempt.x_adv).argmax(1) != y
    assert torch.equal(broken, attempt.broken_at >= 0)
    assert attempt.queries[5:].tolist() == [400, 400]
    assert torch.equal(attempt.queries[broken], attempt.broken_at[broken])
    before = margin(_Brightness()(x), y, None)
    assert bool((margin(_Brightness()(attempt.x_adv), y, None)[5:] > before[5:]).all())


@pytest.mark.parametrize("norm", NORMS)
def test_odd_shapes(norm):
    for shape in ((1, 4, 4), (1, 3, 20), (3, 20, 3), (1, 12, 12)):
        x = torch.rand(2, *shape, generator=_seeded())
        y = (x.flatten(1).mean(1) > 0.5).long()
        for shared in (False, True):
            attack = Square(ThreatModel(norm, 0.3), 20, shared=shared)
            x_adv = attack(_Brightness(), x, y, generator=_seeded())
            assert bool(attack.threat_model.contains(x_adv, x).all())


def test_settings_are_checked():
    for settings in ({"queries": 2}, {"area": 0.0}, {"area": 1.5}, {"shared": True, "batch_size": 4}):
        with pytest.raises(InputError):
            Square(**settings)
