"""Auto-PGD against a textbook version, sample by sample; its losses; jobs that share batches."""

import pytest
import torch
from torch import nn

from nas.attacks.apgd import Apgd
from nas.attacks.apgd_t import ApgdT
from nas.attacks.losses import LOSSES, dlr, likeliest_wrong, margin, right, targeted_dlr
from nas.attacks.worklist import Best, carry_out
from nas.errors import InputError
from nas.threat_model import ThreatModel


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _network(classes=5, inputs=18, seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes))
    return network.to(dtype).eval()


def _batch(network, n=12, shape=(2, 3, 3), seed=1):
    """Images with the labels that the network gives them."""
    x = torch.rand(n, *shape, generator=_seeded(seed), dtype=torch.float64)
    with torch.no_grad():
        return x, network(x).argmax(1)


def _linear(norm, epsilon, seed=0, n=40):
    """A linear model of two classes, interior images, and by how much the best attack breaks each sample."""
    generator = _seeded(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 20, generator=generator, dtype=torch.float64))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
    x = 0.45 + 0.1 * torch.rand(n, 1, 5, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        y = logits.argmax(1)
        w = model[1].weight[1 - y] - model[1].weight[y]
    return model, x, y, margin(logits, y, None) + epsilon * ThreatModel(norm).geometry.dual(w)


def test_dlr_by_hand():
    logits = 3 * torch.randn(30, 6, generator=_seeded(), dtype=torch.float64)
    y, target = torch.arange(30) % 6, (torch.arange(30) + 2) % 6
    for row in range(30):
        values = logits[row].tolist()
        first = sorted(values, reverse=True)
        wrong = max(value for place, value in enumerate(values) if place != int(y[row]))
        expected = -(values[y[row]] - wrong) / (first[0] - first[2])
        assert float(dlr(logits, y, None)[row]) == pytest.approx(expected)
        expected = -(values[y[row]] - values[target[row]]) / (first[0] - (first[2] + first[3]) / 2)
        assert float(targeted_dlr(logits, y, target)[row]) == pytest.approx(expected)
    for loss in (dlr(7 * logits - 3, y, None) - dlr(logits, y, None), targeted_dlr(7 * logits - 3, y, target)):
        assert bool(torch.isfinite(loss).all())
    torch.testing.assert_close(dlr(7 * logits - 3, y, None), dlr(logits, y, None))
    torch.testing.assert_close(targeted_dlr(7 * logits - 3, y, target), targeted_dlr(logits, y, target))


@pytest.mark.parametrize("classes", [2, 3])
def test_with_few_classes_the_losses_are_differences_of_logits(classes):
    logits = torch.randn(10, classes, generator=_seeded())
    y = torch.arange(10) % classes
    assert torch.equal(dlr(logits, y, None), margin(logits, y, None))
    target = (y + 1) % classes
    expected = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
    assert torch.equal(targeted_dlr(logits, y, target), expected[:, 0])


def test_the_likeliest_wrong_classes():
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.7], [5.0, 1.0, 3.0, 2.0]])
    assert likeliest_wrong(logits, torch.tensor([3, 0]), 2).tolist() == [[1, 2], [2, 3]]
    assert likeliest_wrong(logits, torch.tensor([1, 2]), 9).tolist() == [[3, 2, 0], [0, 3, 1]]


def _textbook(network, x, y, threat_model, steps, loss):
    """Algorithm 1 of arXiv 2003.01690 for one sample with its whole history; the start from a generator of seed 0."""
    geometry = threat_model.geometry
    norm = (lambda d: d.abs().max()) if threat_model.norm == "linf" else (lambda d: d.norm())
    noise = torch.rand(x.shape, generator=_seeded(), dtype=x.dtype) * 2 - 1
    if threat_model.norm == "l2":
        noise = torch.randn(x.shape, generator=_seeded(), dtype=x.dtype)
    points = [(x + threat_model.epsilon * noise / norm(noise)).clamp(0, 1)]
    checkpoints, interval, least = [], max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
    while sum(checkpoints) + interval <= steps:
        checkpoints.append(interval)
        interval = max(interval - max(int(0.03 * steps), 1), least)
    checks = [sum(checkpoints[: number + 1]) for number in range(len(checkpoints))]

    def value_and_gradient(point):
        point = point.clone().requires_grad_(True)
        logits = network(point)
        value = LOSSES[loss](logits, y, None).sum()
        return float(value.detach()), torch.autograd.grad(value, point)[0], bool(right(logits, y))

    value, gradient, held = value_and_gradient(points[0])
    best, best_at, misclassified = (value, points[0], gradient), [value], [] if held else [(value, points[0])]
    # The reference compares the first value with 0.
    history, current, step, halved, last = [0.0], points[0], 2 * threat_model.epsilon, True, 0
    previous = current
    for k in range(steps):
        moved = threat_model.project(current + step * geometry.steepest(gradient), x)
        share = 1.0 if k == 0 else 0.75
        current, previous = (
            threat_model.project(current + share * (moved - current) + (1 - share) * (current - previous), x),
            current,
        )
        value, gradient, held = value_and_gradient(current)
        history.append(value)
        if not held:
            misclassified.append((value, current))
        if value > best[0]:
            best = (value, current, gradient)
        best_at.append(best[0])
        if k + 1 in checks:
            rises = sum(history[i + 1] > history[i] for i in range(last, k + 1))
            stuck = not halved and best_at[last] >= best_at[-1]
            halved = rises <= 0.75 * (k + 1 - last) or stuck
            if halved:
                step, current, gradient = step / 2, best[1], best[2]
            last = k + 1
    return max(misclassified, key=lambda pair: pair[0])[1] if misclassified else best[1], step


@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
@pytest.mark.parametrize("threat_model", [ThreatModel("linf", 0.04), ThreatModel("l2", 0.15)], ids=str)
def test_every_step_is_that_of_the_textbook(threat_model, loss):
    network = _network()
    x, y = _batch(network)
    steps_taken, broken = set(), 0
    for row in range(len(x)):
        image, label = x[row : row + 1], y[row : row + 1]
        expected, step = _textbook(network, image, label, threat_model, 50, loss)
        attack = Apgd(threat_model, loss, steps=50)
        found = attack(network, image, label, generator=_seeded())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        steps_taken.add(step)
        broken += int(network(found).argmax(1) != label)
    assert min(steps_taken) < threat_model.epsilon, "steps were reduced"
    assert 0 < broken < len(x)


@pytest.mark.parametrize("cls", [Apgd, ApgdT])
@pytest.mark.parametrize("settings", [{}, {"stop_when_broken": True, "batch_size": 7, "restarts": 2}], ids=str)
@pytest.mark.parametrize("norm, epsilon", [("linf", 0.006), ("l2", 0.025), ("l1", 0.06)])
def test_what_can_be_broken_is_broken_and_only_that(norm, epsilon, settings, cls):
    model, x, y, most = _linear(norm, epsilon)
    assert 5 < int((most > 0).sum()) < 35
    attack = cls(ThreatModel(norm, epsilon), steps=100, **settings)
    x_adv = attack(model, x, y, generator=_seeded())
    assert bool(attack.threat_model.contains(x_adv, x).all())
    broken = model(x_adv).argmax(1) != y
    assert bool((most[broken] > 0).all())
    # In so few dimensions the steps for l_1 settle on two or three pixels instead of the one that would do.
    assert bool((most[~broken] < (0.05 if norm == "l1" else 1e-6)).all())


def test_l1_widening_ends_inside_the_ball():
    model, x, y, most = _linear("l1", 0.06)
    for attack in (
        Apgd(ThreatModel("l1", 0.06), steps=100, widening=True),
        ApgdT(ThreatModel("l1", 0.06), steps=100, widening=True, stop_when_broken=True, batch_size=16),
    ):
        x_adv = attack(model, x, y, generator=_seeded())
        assert bool(attack.threat_model.contains(x_adv, x).all())
        broken = model(x_adv).argmax(1) != y
        assert bool((most[broken] > 0).all())
        assert bool((most[~broken] < 0.05).all())


def test_stopping_changes_no_verdict():
    """The same starts: what is ever misclassified is found by both."""
    network = _network()
    x, y = _batch(network, n=60)
    threat_model = ThreatModel("linf", 0.05)
    whole = Apgd(threat_model, steps=40).found(network, x, y, generator=_seeded())
    stopped = Apgd(threat_model, steps=40, stop_when_broken=True).found(network, x, y, generator=_seeded())
    assert 0 < int(whole.broken.sum()) < 60
    assert torch.equal(whole.broken, stopped.broken)
    for best in (whole, stopped):
        assert torch.equal(best.broken, network(best.images).argmax(1) != y)


def test_batches_are_kept_full():
    network = _network()
    x, y = _batch(network, n=64)
    sizes = []
    network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    attack = ApgdT(ThreatModel("linf", 0.02), 4, steps=20, stop_when_broken=True, batch_size=16)
    attack(network, x, y, generator=_seeded())
    del sizes[0]  # the clean images
    assert max(sizes) <= 16
    assert sum(sizes[:-40]) / len(sizes[:-40]) > 0.7 * 16


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("cls", [Apgd, ApgdT])
def test_few_classes_odd_shapes_single_samples(cls, classes):
    network = _network(classes, inputs=1 * 3 * 7)
    x, y = _batch(network, n=6, shape=(1, 3, 7))
    attack = cls(ThreatModel("linf", 0.3), steps=10, **({"loss": "dlr"} if cls is Apgd else {}))
    assert bool((network(attack(network, x, y, generator=_seeded())).argmax(1) != y).any())
    one = attack(network, x[:1], y[:1], generator=_seeded())
    assert one.shape == (1, 1, 3, 7)


def test_gradients_are_averaged_over_the_answers_of_a_random_model():
    """A model that answers with noise many times as large as its signal: one answer leads nowhere, many do."""

    class Noisy(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.generator = model, _seeded()

        def forward(self, x):
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            return self.model(x) + torch.stack([(5 * noise * x).flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    model, x, y, _ = _linear("l2", 0.1)
    reached = {}
    for eot in (1, 30):
        x_adv = Apgd(ThreatModel("l2", 0.1), "margin", steps=10, eot=eot)(Noisy(model), x, y, generator=_seeded())
        reached[eot] = float(margin(model(x_adv), y, None).detach().mean())
    assert reached[30] > reached[1] + 0.1


def test_the_best_image_of_a_sample_offered_several_times():
    x = torch.zeros(3, 1, 1, 1)
    best = Best(x)
    images = torch.arange(1.0, 6.0).view(5, 1, 1, 1)
    samples = torch.tensor([0, 0, 1, 1, 0])
    scores, broken = torch.tensor([1.0, 3.0, 9.0, 2.0, 3.0]), torch.tensor([False, False, False, True, False])
    best.offer(samples, images, scores, broken)
    assert best.images.flatten().tolist() == [2, 4, 0], "the first of the highest; the one that breaks; nothing"
    assert best.broken.tolist() == [False, True, False]
    best.offer(torch.tensor([0, 1, 2]), images[:3], torch.tensor([2.0, 99.0, torch.nan]), torch.tensor([False] * 3))
    assert best.images.flatten().tolist() == [2, 4, 0]


def test_jobs_run_in_order_and_those_of_settled_samples_are_dropped():
    samples = torch.tensor([0, 1, 2, 0, 1, 2])
    settled = torch.zeros(3, dtype=torch.bool)
    begun, together = [], []

    def begin(jobs):
        begun.extend(jobs.tolist())
        return {"job": jobs, "sample": samples[jobs], "age": torch.zeros_like(jobs)}

    def advance(rows):
        together.append(rows["job"].tolist())
        rows["age"] = rows["age"] + 1
        settled[rows["sample"][rows["sample"] == 1]] = True
        return rows["age"] == 2

    carry_out(samples, begin, advance, settled, 2)
    assert begun == [0, 1, 2, 3, 5]
    assert together == [[0, 1], [0, 2], [2, 3], [3, 5], [5]]


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"restarts": 0}, {"eot": 0}, {"widening": True}, {"eot": 2, "stop_when_broken": True}],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    for cls in (Apgd, ApgdT):
        with pytest.raises(InputError):
            cls(**settings)


def test_unknown_losses_and_no_targets_are_refused():
    with pytest.raises(InputError, match="dlr"):
        Apgd(loss="dlrr")
    with pytest.raises(InputError):
        ApgdT(targets=0)
