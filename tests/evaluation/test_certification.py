"""Certificates against what is known exactly: a linear model, simulated votes, the formulae of the theorem."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from nas.errors import InputError
from nas.evaluation.certification import ABSTAINED, Certificates, Smoothing, lower_bound, votes


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _linear(n=12, seed=0):
    """A two-class linear model, images, their classes and exact l_2 distances to its boundary."""
    weight = torch.randn(16, generator=_generator(seed))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weight, weight]) / 2)
        model[1].bias.zero_()
    x = torch.randn(n, 1, 4, 4, generator=_generator(seed + 1)) * 0.15
    signed = (x.flatten(1) @ weight / weight.norm()).double()
    return model, x, (signed > 0).long(), signed.abs()


def test_a_certified_radius_is_below_the_exact_distance_and_comes_near_it():
    """Smoothing a linear model changes nothing: P(class) = Phi(distance / sigma), the exact radius is the distance."""
    model, x, y, distance = _linear()
    gaps = []
    for n in (100, 1000, 20_000):
        found = Smoothing(0.25, n=n).certify(model, x, generator=_generator(n))
        certified = found.prediction != ABSTAINED
        assert torch.equal(found.prediction[certified], y[certified])
        assert bool((found.radius <= distance).all())
        assert bool((found.radius[~certified] == 0).all())
        # What n draws can at most certify is sigma Phi^-1(alpha^(1/n)).
        most = 0.25 * stats.norm.ppf(0.001 ** (1 / n))
        assert float(found.radius.max()) <= most + 1e-9
        gaps.append(float((distance.clamp_max(most) - found.radius).mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.012


def test_an_image_on_the_boundary_is_abstained_on():
    model, x, _, _ = _linear()
    on = torch.zeros_like(x[:3])
    found = Smoothing(0.25, n=1000).certify(model, on, generator=_generator())
    assert found.prediction.tolist() == [ABSTAINED] * 3
    assert found.radius.tolist() == [0.0] * 3
    assert Smoothing(0.25, n=1000).predict(model, on, generator=_generator()).tolist() == [ABSTAINED] * 3


@pytest.mark.parametrize("p,n,alpha", [(0.6, 100, 0.05), (0.9, 50, 0.01), (0.99, 500, 0.05), (0.5, 1000, 0.1)])
def test_the_bound_is_wrong_as_seldom_as_promised(p, n, alpha):
    """Of 40,000 simulated votes, the share with a bound above the true probability is at most alpha, not far below."""
    counts = torch.from_numpy(np.random.default_rng(0).binomial(n, p, 40_000))
    wrong = float((lower_bound(counts, n, alpha) > p).double().mean())
    exact = sum(stats.binom.pmf(k, n, p) for k in range(n + 1) if float(lower_bound(torch.tensor([k]), n, alpha)) > p)
    assert exact <= alpha
    assert wrong == pytest.approx(exact, abs=5 * math.sqrt(alpha / 40_000))
    assert exact > 0.2 * alpha


def test_the_bound_is_the_one_of_clopper_and_pearson():
    """It is the p at which seeing at least so many successes has probability alpha; 0 without a success."""
    counts = torch.tensor([1, 37, 99, 100])
    bounds = lower_bound(counts, 100, 0.01)
    for count, bound in zip(counts.tolist(), bounds.tolist(), strict=True):
        assert stats.binom.sf(count - 1, 100, bound) == pytest.approx(0.01, rel=1e-6)
    assert lower_bound(torch.tensor([0]), 100, 0.01).item() == 0.0
    assert bounds[3].item() == pytest.approx(0.01 ** (1 / 100))


def test_votes_are_those_of_the_noisy_copies():
    model, x, _, distance = _linear(5)
    counts = votes(model, x, 0.2, 3000, generator=_generator(), batch_size=700)
    assert counts.sum(1).tolist() == [3000] * 5
    expected = torch.special.ndtr(distance / 0.2)
    share = counts.amax(1) / 3000
    assert float(((share - expected).abs() / (expected * (1 - expected) / 3000).sqrt()).max()) < 4
    assert torch.equal(counts, votes(model, x, 0.2, 3000, generator=_generator(), batch_size=700))
    single = votes(model, x, 0.0, 10, generator=_generator())
    assert torch.equal(single.argmax(1), model(x).argmax(1)) and int(single.amax(1).min()) == 10


def test_predictions_are_seldom_wrong_and_abstain_where_votes_are_close():
    model, x, y, distance = _linear(60, seed=3)
    smoothing = Smoothing(0.25, n=200, alpha=0.05)
    predicted = smoothing.predict(model, x, generator=_generator())
    answered = predicted != ABSTAINED
    assert torch.equal(predicted[answered], y[answered]), "at this seed; at most one in twenty may be wrong"
    assert 0 < int(answered.sum()) < 60
    assert float(distance[~answered].max()) < float(distance[answered].max())
    counts = votes(model, x, 0.25, 200, generator=_generator())
    for row in range(60):
        certain = stats.binomtest(int(counts[row].max()), 200).pvalue <= 0.05
        assert certain == bool(answered[row])


def test_passes_without_a_number_vote_for_nothing():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), math.nan)

    x = torch.rand(2, 1, 4, 4)
    assert int(votes(Broken(), x, 0.1, 10, generator=_generator()).sum()) == 0
    assert Smoothing(n=50).certify(Broken(), x, generator=_generator()).prediction.tolist() == [ABSTAINED] * 2
    assert Smoothing(n=50).predict(Broken(), x, generator=_generator()).tolist() == [ABSTAINED] * 2


def test_the_curve_counts_right_certificates_of_at_least_the_radius():
    radius = torch.tensor([0.5, 0.2, 0.0, 0.9], dtype=torch.float64)
    certificates = Certificates(Smoothing(), torch.tensor([1, 2, ABSTAINED, 0]), radius)
    y, radii = torch.tensor([1, 2, 0, 3]), torch.tensor([0.0, 0.2, 0.3, 0.6], dtype=torch.float64)
    assert certificates.accuracy(y, radii).tolist() == [0.5, 0.5, 0.25, 0.0]
    data = certificates.to_data(y, radii)
    assert data["certified_accuracy"] == [0.5, 0.5, 0.25, 0.0]
    assert data["abstained"] == 1
    assert data["n"] == 4
    assert "sigma 0.25" in data["settings"] and "n 100000" in data["settings"]
    assert all(
        low <= share <= high for share, (low, high) in zip(data["certified_accuracy"], data["intervals"], strict=True)
    )


def test_the_model_and_the_random_state_are_left_as_found():
    model, x, _, _ = _linear()
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), model).train()
    state, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Smoothing(n=50).certify(model, x, generator=_generator())
    assert model.training and model[1].training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize(
    "wrong", [{"sigma": 0.0}, {"sigma": math.nan}, {"n0": 0}, {"n": 0}, {"alpha": 0.0}, {"alpha": 1.0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError):
        Smoothing(**wrong)


def test_no_images_is_refused():
    with pytest.raises(InputError):
        votes(nn.Flatten(), torch.empty(0, 1, 4, 4), 0.1, 5, generator=_generator())
