"""The oracle counts every image it is shown and remembers the first that broke its sample inside the ball."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nas import plugins
from nas.attacks.queries import IMAGES_AT_ONCE, START_TRIES, DecisionBased, Oracle, portions, to_boundary
from nas.errors import InputError
from nas.threat_model import ThreatModel


class _Bright(nn.Module):
    """Class 1 where the mean is above one half."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_the_first_misclassified_query_inside_the_ball_is_the_result():
    x = torch.tensor([0.4, 0.3, 0.6]).view(3, 1, 1, 1).expand(3, 1, 2, 2).contiguous()
    y = torch.zeros(3, dtype=torch.int64)
    oracle = Oracle(_Bright(), x, y, ThreatModel("linf", 0.2), budget=9)
    everyone = torch.arange(3)
    assert torch.allclose(oracle.margins(x, everyone), torch.tensor([-0.2, -0.4, 0.2]))
    assert oracle.unbroken.tolist() == [0, 1]
    oracle.margins(x[:2] + 0.3, oracle.unbroken)  # misclassified, but outside the ball
    assert oracle.unbroken.tolist() == [0, 1]
    oracle.margins(x[:1] + 0.15, torch.tensor([0]))
    oracle.margins(x[:1] + 0.2, torch.tensor([0]))  # later ones do not count
    attempt = oracle.attempt(x + 0.5)
    assert attempt.queries.tolist() == [4, 2, 1]
    assert attempt.broken_at.tolist() == [3, -1, 1]
    expected = torch.stack([x[0] + 0.15, x[1] + 0.2, x[2]])
    assert torch.allclose(attempt.x_adv, expected)


def test_no_answer_is_misclassified():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(model[1].weight, torch.nan)
    x = torch.rand(2, 1, 2, 2)
    oracle = Oracle(model, x, torch.tensor([0, 1]), ThreatModel(), budget=9)
    oracle.logits(x, torch.arange(2))
    assert oracle.broken_at.tolist() == [1, 1]


def _network(classes=3, seed=0, shape=(1, 6, 4)):
    """A smooth classifier of one-channel images that are not square, in float64."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[0] * shape[1] * shape[2]
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 12), nn.Tanh(), nn.Linear(12, classes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return model


def _batch(model, n=5, seed=1, shape=(1, 6, 4)):
    """Images and labels, the second label wrong and the others right."""
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = model(x).argmax(1)
    y[1] = (y[1] + 1) % model[-1].out_features
    return x, y


def _seen(model):
    counts = [0]
    model.register_forward_pre_hook(lambda module, inputs: counts.__setitem__(0, counts[0] + len(inputs[0])))
    return counts


def _attacks(**settings):
    """Every attack by queries, in each norm it takes."""
    found = []
    for name, cls in plugins.available("attacks").items():
        for threat_model in (ThreatModel("linf", 0.03), ThreatModel("l2", 0.1)):
            if hasattr(cls, "attempt"):
                with contextlib.suppress(InputError):
                    attack = cls(threat_model=threat_model, **settings)
                    found.append(pytest.param(attack, id=f"{name}-{threat_model.norm}"))
    return found


DECISIONS = [case for case in _attacks(queries=400) if isinstance(case.values[0], DecisionBased)]


def test_several_queries_of_a_sample_are_as_many_calls():
    model = _network()
    x, y = _batch(model)
    rows = torch.tensor([0, 2, 3])
    images = torch.rand(3, 7, 1, 6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    together, apart = (Oracle(model, x, y, ThreatModel("l2", 2.0), budget=9) for _ in range(2))
    logits = together.logits(images, rows)
    torch.testing.assert_close(logits, torch.stack([apart.logits(images[:, k], rows) for k in range(7)], 1))
    assert bool((together.broken_at >= 0).any())
    assert bool((together.broken_at[rows] != 1).any())
    for part in ("queries", "broken_at", "nearest", "distance"):
        assert torch.equal(getattr(together, part), getattr(apart, part)), part
    margins = Oracle(model, x, y, ThreatModel(), budget=9).margins(images, rows)
    assert torch.equal(margins > 0, logits.argmax(2) != y[rows].unsqueeze(1))


def test_more_than_the_budget_is_refused_or_not_shown():
    model = _network()
    x, y = _batch(model)
    rows, images = torch.tensor([1, 2]), _batch(model, 8, seed=3)[0].view(2, 4, 1, 6, 4)
    oracle = Oracle(model, x, y, ThreatModel(), budget=3)
    with pytest.raises(RuntimeError, match="3 queries"):
        oracle.logits(images, rows)
    assert oracle.queries.tolist() == [0] * 5
    counts = _seen(model)
    asked = torch.tensor([[True, False, True, False], [True, True, True, True]])
    answers = oracle.misclassified(images, rows, asked)
    assert counts[0] == 5
    assert oracle.queries.tolist() == [0, 2, 3, 0, 0]
    shown = asked & torch.tensor([[True] * 4, [True] * 3 + [False]])
    assert torch.equal(answers, shown & (model(images.flatten(0, 1)).argmax(1).view(2, 4) != y[rows].unsqueeze(1)))


def test_images_beyond_the_pixel_bounds_are_no_find():
    x = torch.full((1, 1, 2, 2), 0.4)
    oracle = Oracle(_Bright(), x, torch.tensor([0]), ThreatModel("linf", 5.0), budget=9)
    assert bool(oracle.misclassified(x + 0.7, torch.tensor([0])))
    assert oracle.broken_at.tolist() == [-1]
    assert torch.equal(oracle.nearest, x)
    assert bool(oracle.misclassified(x + 0.6, torch.tensor([0])))
    assert oracle.broken_at.tolist() == [2]


@pytest.mark.parametrize("budget", [1, 2, 3, 8, 61])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("attack", _attacks())
def test_the_budget_is_never_exceeded_and_every_image_counts(attack, classes, budget):
    model = _network(classes)
    x, y = _batch(model)
    try:
        attack, counts = replace(attack, queries=budget), _seen(model)
    except InputError:
        pytest.skip("refuses so small a budget")
    attempt = attack.attempt(model, x, y, generator=torch.Generator().manual_seed(0))
    assert int(attempt.queries.sum()) == counts[0]
    assert int(attempt.queries.max()) <= budget == attempt.budget
    assert bool((attempt.broken_at <= attempt.queries).all())
    assert attempt.queries[1] == attempt.broken_at[1] == 1, "the clean image suffices"
    assert torch.equal(attempt.x_adv[1], x[1])
    assert bool(attack.threat_model.contains(attempt.x_adv, x).all())
    assert torch.equal(attempt.broken_at >= 0, model(attempt.x_adv).argmax(1) != y)
    if hasattr(attack, "nearest"):
        counts[0] = 0
        nearest = attack.nearest(model, x, y, generator=torch.Generator().manual_seed(0))
        assert counts[0] <= 1 + 4 * budget
        assert torch.equal(nearest[1], x[1])
        changed = (nearest != x).flatten(1).any(1)
        assert torch.equal(changed, (model(nearest).argmax(1) != y) & (torch.arange(5) != 1))


@pytest.mark.parametrize("attack", _attacks(queries=50))
def test_a_batch_that_is_broken_already_costs_one_query_a_sample(attack):
    model = _network()
    x, _ = _batch(model)
    wrong = (model(x).argmax(1) + 1) % 3
    attempt = attack.attempt(model, x, wrong, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attempt.x_adv, x)
    assert attempt.queries.tolist() == attempt.broken_at.tolist() == [1] * 5


class _Hard(nn.Module):
    """Only the label a network gives, as logits that say nothing else."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        logits = self.network(x)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)


@pytest.mark.parametrize("attack", DECISIONS)
def test_decision_based_attacks_see_decisions_only(attack):
    model = _network()
    x, y = _batch(model)
    images = [attack.nearest(m, x, y, generator=torch.Generator().manual_seed(0)) for m in (model, _Hard(model))]
    assert torch.equal(*images)
    assert int((images[0] != x).flatten(1).any(1).sum()) == 4


class _Near(nn.Module):
    """Class 1 within an l_2 distance of one place that no noise comes near."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, x):
        distance = (x - self.place).flatten(1).norm(dim=1)
        return torch.stack([distance - 0.5, 0.5 - distance], 1)


@pytest.mark.parametrize("attack", [case for case in DECISIONS if "rays" not in case.id])
def test_a_sample_without_a_start_is_given_up_unless_one_is_given(attack):
    place = torch.zeros(1, 8, 8, dtype=torch.float64)
    place[0, ::3, ::2] = 0.9
    model, x, y = _Near(place), torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64), torch.tensor([0])
    counts = _seen(model)
    assert torch.equal(attack.nearest(model, x, y, generator=torch.Generator().manual_seed(0)), x)
    assert counts[0] == 1 + START_TRIES
    start = place.unsqueeze(0)
    found = attack.nearest(model, x, y, generator=torch.Generator().manual_seed(0), start=start)
    size, far = attack.threat_model.distance(found, x), attack.threat_model.distance(start, x)
    assert 0 < float(size) < float(far)
    assert bool(model(found).argmax(1) == 1)
    with pytest.raises(InputError, match="start images"):
        attack.attempt(model, x, y, generator=torch.Generator(), start=start.expand(2, -1, -1, -1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bisection_ends_within_its_tolerance_of_the_boundary(norm):
    """On a linear model: the way is a line in l_2; in l_inf a clipping, whose margin is known at every radius."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([w, -w]))
        model[1].bias.copy_(torch.stack([-w.sum() / 2, w.sum() / 2]))  # the boundary goes through grey
    x = 0.4 + 0.2 * torch.rand(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    images = torch.rand(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    kept = model(images).argmax(1) != y
    x, images, y = x[kept], images[kept], y[kept]
    assert len(x) >= 2
    threat_model = ThreatModel(norm, 0.01)
    for tolerance in (0.3, 1e-3, 1e-7):
        oracle = Oracle(model, x, y, threat_model, budget=99, until_broken=False)
        rows = torch.arange(len(x))
        assert bool(oracle.misclassified(images, rows).all())
        found = to_boundary(oracle, rows, images, tolerance)
        size, far = threat_model.distance(found, x), threat_model.distance(images, x)
        below = (size - tolerance * far).clamp_min(0) / size if norm == "l2" else (size - tolerance * far).clamp_min(0)
        if norm == "l2":
            inner = x + below.view(-1, 1, 1, 1) * (found - x)
        else:
            inner = x + (images - x).clamp(-below.view(-1, 1, 1, 1), below.view(-1, 1, 1, 1))
        assert bool((model(found).argmax(1) != y).all())
        assert bool((model(inner).argmax(1) == y).all())
        assert oracle.queries.tolist() == [1 + math.ceil(math.log2(1 / tolerance))] * len(x)


def test_portions_are_all_there_is_and_never_more_than_asked_for():
    assert list(portions(10, 2)) == [10]
    assert list(portions(1000, IMAGES_AT_ONCE // 4)) == [4] * 250
    assert list(portions(3, 10 * IMAGES_AT_ONCE)) == [1, 1, 1]
    assert list(portions(0, 1)) == []


def test_settings_are_checked():
    for name, cls in plugins.available("attacks").items():
        if hasattr(cls, "attempt"):
            with pytest.raises(InputError, match="queries"):
                cls(queries=0)
            assert f"{cls().queries} queries" in str(cls()), name


@pytest.mark.parametrize("attack", _attacks(queries=30))
def test_an_image_that_is_misclassified_is_counted_as_broken(attack):
    """Also where only the projection of what was found outside the ball is: class 1 is a shell around the image."""

    class Shells(nn.Module):
        def forward(self, x):
            size = attack.threat_model.distance(x, torch.full_like(x, 0.5)) / attack.threat_model.epsilon
            value = torch.cos(2 * math.pi * size) * -1  # misclassified from 1/4 to 3/4, right at 1, and so on
            return torch.stack([-value, value], 1)

    x = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64)
    x += 0.01 * attack.threat_model.epsilon * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y, model = torch.zeros(4, dtype=torch.int64), Shells()
    attempt = attack.attempt(model, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attempt.broken_at >= 0, model(attempt.x_adv).argmax(1) == 1)
