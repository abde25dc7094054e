"""AutoAttack: its verdicts where they are known, its parts, its table, and going on after a kill."""

import pytest
import torch
from torch import nn

from nas.attacks import autoattack
from nas.attacks.apgd import Apgd
from nas.attacks.autoattack import AutoAttack
from nas.attacks.fab import Fab
from nas.attacks.losses import margin
from nas.attacks.square import Square
from nas.errors import InputError
from nas.evaluation.robustness import Trial, evaluate
from nas.threat_model import ThreatModel


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _linear(norm, epsilon, n=24, shape=(1, 5, 4), seed=0):
    """A linear model of two classes, images and labels, and by how much the best attack breaks each sample."""
    generator = _seeded(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 20, generator=generator))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
        x = 0.45 + 0.1 * torch.rand(n, *shape, generator=generator)
        y = model(x).argmax(1)
        y[:2] = 1 - y[:2]
        w = model[1].weight[1 - y] - model[1].weight[y]
        return model, x, y, margin(model(x), y, None) + epsilon * ThreatModel(norm).geometry.dual(w)


def _network(classes=4, inputs=24):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes)).eval()


def _batch(network, n=24, shape=(2, 3, 4)):
    x = torch.rand(n, *shape, generator=_seeded(1))
    with torch.no_grad():
        return x, network(x).argmax(1)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    "version, norm, epsilon",
    [
        ("standard", "linf", 0.006),
        ("standard", "l2", 0.025),
        ("standard", "l1", 0.06),
        ("plus", "linf", 0.006),
    ],
)
def test_a_linear_model_gets_the_right_verdicts(norm, epsilon, version, mode):
    model, x, y, most = _linear(norm, epsilon)
    attack = AutoAttack(ThreatModel(norm, epsilon), version, mode, steps=40, queries=20, batch_size=7)
    verdicts = attack.run(model, x, y, seed=0)
    assert torch.equal(verdicts.robust, most <= 0)
    assert verdicts.natural.tolist() == [False] * 2 + [True] * 22
    assert 3 < int(verdicts.robust.sum()) < 20
    assert torch.equal(model(verdicts.x_adv).argmax(1) == y, verdicts.robust)
    assert torch.equal(verdicts.x_adv[:2], x[:2])
    assert bool(attack.threat_model.contains(verdicts.x_adv, x).all())


def test_the_versions_are_those_of_the_reference():
    standard = AutoAttack(ThreatModel("linf", 0.1), mode="exact").attacks
    assert list(standard) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert standard["apgd-ce"] == Apgd(ThreatModel("linf", 0.1), "cross_entropy", 100, 1)
    assert standard["fab-t"] == Fab(ThreatModel("linf", 0.1), 9, 100, 1)
    assert standard["square"] == Square(ThreatModel("linf", 0.1), 5002, rescaled=False, shared=True)
    plus = AutoAttack(version="plus").attacks
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [plus[name].restarts for name in ("apgd-ce", "apgd-dlr", "fab", "apgd-t", "fab-t")] == [5, 5, 5, 1, 1]
    rand = AutoAttack(version="rand").attacks
    assert [(name, attack.eot, attack.stop_when_broken) for name, attack in rand.items()] == [
        ("apgd-ce", 20, False),
        ("apgd-dlr", 20, False),
    ]
    sparse = AutoAttack(ThreatModel("l1", 12.0)).attacks
    assert (sparse["apgd-ce"].restarts, sparse["apgd-ce"].widening) == (5, True)
    assert (sparse["apgd-t"].targets, sparse["apgd-t"].widening, sparse["fab-t"].targets) == (5, True, 9)


def test_the_table_adds_up():
    network = _network()
    x, y = _batch(network)
    verdicts = AutoAttack(ThreatModel("linf", 0.06), steps=20, queries=50, batch_size=9).run(network, x, y, seed=0)
    data = verdicts.to_data()
    shares = list(data["accuracy_after"].values())
    assert list(data["accuracy_after"]) == ["natural", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 1
    assert shares[-1] == pytest.approx(float(verdicts.robust.double().mean()))
    assert sum(data["broke"].values()) + int(verdicts.robust.sum()) == data["n"] == 24
    for place in range(4):
        assert data["broke"][verdicts.attacks[place]] == round(24 * (shares[place] - shares[place + 1]))
    assert min(data["seconds"].values()) >= 0


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_few_classes_one_channel_not_square(version, classes, mode):
    network = _network(classes, 30)
    x, y = _batch(network, 6, (1, 3, 10))
    for epsilon, robust in ((0.0, 6), (0.9, 0)):  # nothing can be broken; the first attack breaks everything
        attack = AutoAttack(ThreatModel("linf", epsilon), version, mode, steps=10, queries=10)
        verdicts = attack.run(network, x, y, seed=0)
        assert int(verdicts.robust.sum()) == robust
    one = attack(network, x[:1], y[:1], generator=_seeded())
    assert int(network(one).argmax(1)) != int(y[0])
    wrong = attack.run(network, x, (y + 1) % classes, seed=0)
    assert wrong.broken_by.tolist() == [-1] * 6
    assert torch.equal(wrong.x_adv, x)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_it_is_an_attack_like_any_other(mode):
    """Through the evaluation: the same verdicts as its own."""
    model, x, y, most = _linear("linf", 0.006)
    attack = AutoAttack(ThreatModel("linf", 0.006), mode=mode, queries=20)
    evaluation = evaluate(model, x, y, {"autoattack": Trial(attack)}, seed=0)
    assert torch.equal(evaluation.worst_case, most <= 0)
    assert "AutoAttack standard" in evaluation.settings["autoattack"]


class _Killed(Exception):
    pass


class _Mortal(nn.Module):
    """Answers a number of calls, then dies."""

    def __init__(self, model):
        super().__init__()
        self.model, self.left, self.calls = model, None, 0

    def forward(self, x):
        self.calls += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise _Killed
        return self.model(x)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_killed_at_any_moment_it_ends_with_the_same_result(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(autoattack, "SECONDS_BETWEEN_WRITES", 0.0)
    model = _Mortal(_network())
    x, y = _batch(model.model)
    attack = AutoAttack(ThreatModel("linf", 0.06), mode=mode, steps=4, queries=8, batch_size=2)
    expected = attack.run(model, x, y, seed=3)
    whole, file, deaths = model.calls, tmp_path / "progress.safetensors", 0
    model.calls = 0
    while deaths < 20:
        model.left = whole // 6 + 5 * deaths  # dies again and again, at another place each time
        try:
            found = attack.run(model, x, y, seed=3, progress_file=file)
            break
        except _Killed:
            deaths += 1
    assert deaths > 2
    assert model.calls < 3 * whole
    assert torch.equal(found.x_adv, expected.x_adv)
    assert torch.equal(found.broken_by, expected.broken_by)
    assert torch.equal(found.natural, expected.natural)
    model.left, calls = None, model.calls
    again = attack.run(model, x, y, seed=3, progress_file=file)
    assert model.calls == calls, "what is done is only read"
    assert torch.equal(again.x_adv, expected.x_adv)


def test_the_file_of_another_run_is_refused(tmp_path):
    network = _network()
    x, y = _batch(network, 6)
    file = tmp_path / "progress.safetensors"
    attack = AutoAttack(ThreatModel("linf", 0.06), steps=2, queries=4)
    attack.run(network, x, y, seed=0, progress_file=file)
    with torch.no_grad():
        other = _network()
        other[1].bias += 0.1
    for model, images, seed in ((network, x, 1), (network, x * 0.9, 0), (other, x, 0)):
        with pytest.raises(InputError, match="another AutoAttack"):
            attack.run(model, images, y, seed=seed, progress_file=file)


def test_a_lucky_answer_of_a_random_model_breaks_nothing():
    """The answer flips by chance alone, one time in five: fast asks 20 times, the reference once."""

    class Flips(nn.Module):
        generator = _seeded()

        def forward(self, x):
            flipped = torch.rand(len(x), generator=self.generator) < 0.2
            return torch.where(flipped[:, None], torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, -1.0]])) + 0 * x.sum()

    x = torch.rand(40, 1, 3, 3, generator=_seeded())
    y = torch.zeros(40, dtype=torch.int64)
    robust = {}
    for mode in ("exact", "fast"):
        verdicts = AutoAttack(version="rand", mode=mode, steps=3).run(Flips(), x, y, seed=0)
        robust[mode] = int((verdicts.natural & verdicts.robust).sum()) / int(verdicts.natural.sum())
    assert robust["fast"] == 1
    assert robust["exact"] < 0.9


def test_settings_are_checked():
    for settings, word in (
        ({"version": "standart"}, "standard"),
        ({"mode": "quick"}, "fast"),
        ({"batch_size": 0}, "1"),
    ):
        with pytest.raises(InputError, match=word):
            AutoAttack(**settings)
    with pytest.raises(InputError, match="steps"):
        AutoAttack(steps=0)
