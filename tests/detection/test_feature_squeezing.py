"""The joint score, its threshold and the table; and an attack that knows the detector beats one that does not."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from nas.attacks.pgd import Pgd
from nas.detection.evasion import Evasion
from nas.detection.feature_squeezing import Detector, FeatureSqueezing, detection, joint_score, threshold_at
from nas.detection.squeezers import BitDepth, MedianFilter, NonLocalMeans
from nas.errors import InputError
from nas.threat_model import ThreatModel


class _Inverted:
    """A squeezer that no image survives."""

    def __call__(self, x):
        return 1 - x


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    """A network of two convolutions that has learnt the digits, images to calibrate with, and images to attack."""
    values, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(values / 16).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(250):
            rows = torch.randint(1000, (64,), generator=_generator(step))
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    right = (model(x).argmax(1) == y).nonzero().squeeze(1)
    attacked = right[right >= 1400][:60]
    return model, x[1000:1400], x[1400:], x[attacked], y[attacked]


def test_the_score_by_hand():
    views = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]]).double()
    p = math.exp(2) / (math.exp(2) + 1)
    q = 1 / (1 + math.e)
    assert joint_score(views).tolist() == pytest.approx([2 * (p - q)])
    assert joint_score(views[:2]).tolist() == [0.0]
    assert joint_score(torch.tensor([[[99.0, 0.0]], [[0.0, 99.0]]])).tolist() == pytest.approx([2.0])


def test_the_joint_score_is_the_largest_of_the_single_ones(digits):
    model, x, _, _, _ = digits
    squeezers = (BitDepth(2), MedianFilter(2, 2), NonLocalMeans(5, 3, 20.0))
    joint = FeatureSqueezing(squeezers).scores(model, x)
    single = torch.stack([FeatureSqueezing((squeezer,)).scores(model, x) for squeezer in squeezers])
    torch.testing.assert_close(joint, single.amax(0), rtol=0, atol=1e-5)
    assert (single.argmax(0).unique().numel()) > 1, "more than one of them matters"
    torch.testing.assert_close(joint, FeatureSqueezing(squeezers).scores(model, x, batch_size=7), rtol=0, atol=1e-5)
    with torch.no_grad():
        by_hand = [(model(x).softmax(1) - model(squeezer(x)).softmax(1)).abs().sum(1) for squeezer in squeezers]
    torch.testing.assert_close(joint, torch.stack(by_hand).amax(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 20, 100, 1000])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.29, 0.5])
def test_no_more_than_the_asked_share_of_the_calibration_images_is_flagged(n, rate):
    scores = torch.rand(n, generator=_generator(n), dtype=torch.float64)
    threshold = threshold_at(scores, rate)
    flagged = int((scores > threshold).sum())
    assert flagged == math.floor(n * rate + 1e-9), "and no fewer where scores differ"
    assert threshold in scores
    tied = scores.round(decimals=1)
    assert int((tied > threshold_at(tied, rate)).sum()) <= n * rate + 1e-9


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_an_impossible_rate_is_refused(rate):
    with pytest.raises(InputError):
        threshold_at(torch.rand(10), rate)


def test_a_threshold_needs_scores():
    for scores in (torch.empty(0), torch.tensor([0.1, math.nan])):
        with pytest.raises(InputError):
            threshold_at(scores, 0.05)


def test_squeezing_needs_a_squeezer():
    with pytest.raises(InputError):
        FeatureSqueezing(())


def test_an_image_without_a_score_is_flagged():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.constant_(model[1].weight, math.nan)
    assert Detector(FeatureSqueezing(), 1.0).flags(model, torch.rand(2, 1, 4, 4)).tolist() == [True, True]


def test_the_table_counts_successful_and_failed_attacks_apart():
    """Class 1 where the mean is above one half; inverting flips it, and the score is the confidence."""

    class Bright(nn.Module):
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return 20 * torch.stack([0.5 - mean, mean - 0.5], 1)

    clean = torch.tensor([0.52, 0.49, 0.51]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    attacked = torch.tensor([0.9, 0.51, 0.1, 0.48]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    y = torch.zeros(4, dtype=torch.int64)  # the first two are misclassified, the last two are not
    detector = Detector(FeatureSqueezing((_Inverted(),)), 1.0)
    table = detection(detector, Bright(), clean, attacked, y).to_data()
    assert table["n"] == 4
    assert table["successful"] == 2
    assert table["detected"] == 0.5
    assert table["undetected_success"] == 0.25
    assert table["failed_flagged"] == 0.5
    # Distances from 1/2: adversarial 0.4 and 0.01; clean 0.02, 0.01, 0.01 (ties count half): (3 + 0 + 1) / 6.
    assert table["auc"] == pytest.approx(4 / 6, abs=1e-3)


def test_an_attack_without_success_has_no_detection_rate():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x = torch.rand(5, 1, 4, 4, generator=_generator())
    table = detection(Detector(FeatureSqueezing(), 0.5), model, x, x, model(x).argmax(1)).to_data()
    assert table["successful"] == 0
    assert table["detected"] is None and table["auc"] is None and table["interval"] is None
    assert table["undetected_success"] == 0


def test_detection_and_the_attack_leave_the_model_as_found(digits):
    model, x, _, images, labels = digits
    model = copy.deepcopy(model).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    detector = Detector(FeatureSqueezing(), 0.3)
    before = images.clone()
    Evasion(detector, ThreatModel("linf", 0.1), steps=2)(model, images, labels, generator=_generator())
    detection(detector, model, x, images, labels)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(images, before)


def test_the_adaptive_attack_gets_past_a_detector_that_stops_the_naive_one(digits):
    model, calibration, clean, x, y = digits
    squeezing = FeatureSqueezing((BitDepth(2), BitDepth(3)))
    detector = Detector(squeezing, threshold_at(squeezing.scores(model, calibration), 0.05))
    assert float(detector.flags(model, clean).double().mean()) < 0.12
    threat_model = ThreatModel("linf", 0.15)
    naive = Pgd(threat_model, steps=40, stop_when_broken=True)(model, x, y, generator=_generator())
    adaptive = Evasion(detector, threat_model, steps=40, restarts=2)(model, x, y, generator=_generator())
    assert bool(threat_model.contains(adaptive, x).all())
    tables = [detection(detector, model, clean, images, y).to_data() for images in (naive, adaptive)]
    assert tables[0]["successful"] > 30
    assert tables[0]["detected"] > 0.8
    assert tables[1]["undetected_success"] > 0.35
    assert tables[1]["undetected_success"] > 4 * tables[0]["undetected_success"]


@pytest.mark.parametrize("norm,epsilon", [("linf", 0.1), ("l2", 0.8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_adaptive_attack_stays_in_its_threat_model_and_repeats(digits, norm, epsilon, dtype):
    model, _, _, x, y = digits
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)[:12]
    threat_model = ThreatModel(norm, epsilon)
    attack = Evasion(Detector(FeatureSqueezing((BitDepth(3),)), 0.1), threat_model, steps=5, restarts=2)
    streams = torch.get_rng_state()
    first = attack(model, x, y[:12], generator=_generator(1))
    assert torch.equal(torch.get_rng_state(), streams)
    assert first.dtype == dtype and not first.requires_grad
    assert bool(threat_model.contains(first, x).all())
    assert torch.equal(first, attack(model, x, y[:12], generator=_generator(1)))
    none = Evasion(attack.detector, ThreatModel(norm, 0.0), steps=2)(model, x, y[:12], generator=_generator())
    assert torch.equal(none, x)


def test_more_restarts_never_evade_less(digits):
    model, calibration, _, x, y = digits
    squeezing = FeatureSqueezing((BitDepth(2), MedianFilter(3, 3)))
    detector = Detector(squeezing, threshold_at(squeezing.scores(model, calibration), 0.05))
    threat_model = ThreatModel("linf", 0.1)

    def evaded(restarts):
        attack = Evasion(detector, threat_model, steps=10, restarts=restarts)
        images = attack(model, x, y, generator=_generator())
        with torch.no_grad():
            return (model(images).argmax(1) != y) & ~detector.flags(model, images)

    once, often = evaded(1), evaded(4)
    assert not bool((once & ~often).any())
    assert int(often.sum()) > int(once.sum())


def test_a_detector_that_flags_nothing_leaves_plain_misclassification(digits):
    """Threshold 2 is never exceeded: whatever is misclassified evades."""
    model, _, _, x, y = digits
    attack = Evasion(Detector(FeatureSqueezing(), 2.0), ThreatModel("linf", 0.3), steps=30)
    images = attack(model, x, y, generator=_generator())
    assert float((model(images).argmax(1) != y).double().mean()) > 0.95


def test_wrong_settings_of_the_attack_are_refused():
    detector = Detector(FeatureSqueezing(), 0.5)
    for wrong in ({"steps": 0}, {"restarts": 0}, {"step_size": -0.1}, {"score_weight": math.nan}):
        with pytest.raises(InputError):
            Evasion(detector, **wrong)
    assert "median 2x2" in str(Evasion(detector)) and "0.5" in str(Evasion(detector))
