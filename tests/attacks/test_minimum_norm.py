"""C&W, DeepFool, EAD and FMN against exact distances of linear models, and against each other."""

import pytest
import torch
from torch import nn

from nas.attacks.carlini_wagner import CarliniWagner
from nas.attacks.deepfool import DeepFool
from nas.attacks.ead import ElasticNet
from nas.attacks.fmn import FastMinimumNorm
from nas.attacks.penalty import Adam, Found
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.threat_model import ThreatModel

ATTACKS = [CarliniWagner, DeepFool, ElasticNet, FastMinimumNorm]
L2 = ThreatModel("l2", 0.3)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _linear(classes, size=16, seed=0):
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, size, generator=_generator(seed), dtype=torch.float64))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))  # the middle of the pixels is on every boundary
    return model


def _middle(model, n=12, size=4):
    """Images far from the pixel bounds, labelled as the model does."""
    x = 0.45 + 0.1 * torch.rand(n, 1, size, size, generator=_generator(1), dtype=torch.float64)
    return x, model(x).argmax(1)


def _distances(model, x, y, dual):
    """The exact distance [N] to the nearest boundary of a linear model; dual: norm of the weights."""
    w, logits = model[1].weight, model(x)
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = torch.linalg.vector_norm(w[y][:, None] - w[None], ord=dual, dim=2)
    return (gaps / slopes).scatter(1, y[:, None], torch.inf).amin(1).detach()


def _curved(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    with torch.no_grad():
        model[1].weight *= 4
        model[3].weight *= 4
    return model.eval()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf)])
def test_deepfool_meets_the_boundary_of_a_linear_model_in_one_step(norm, dual):
    model = _linear(5)
    x, y = _middle(model)
    attack = DeepFool(ThreatModel(norm, 0.3), steps=1, overshoot=1e-3)
    nearest = attack.nearest(model, x, y, generator=_generator())
    assert bool((model(nearest).argmax(1) != y).all())
    found = attack.threat_model.distance(nearest, x) / _distances(model, x, y, dual)
    torch.testing.assert_close(found, torch.full_like(found, 1.001), rtol=0, atol=2e-3)


def test_deepfool_looks_at_the_classes_it_is_told_to():
    model = _linear(5)
    x, y = _middle(model)
    few = DeepFool(L2, classes=2).nearest(model, x, y, generator=_generator())
    runner_up = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    w = model[1].weight.detach()
    direction = torch.nn.functional.normalize((few - x).flatten(1), dim=1)
    expected = torch.nn.functional.normalize(w[runner_up] - w[y], dim=1)
    torch.testing.assert_close(direction, expected, rtol=0, atol=1e-6)
    every = DeepFool(L2, classes=0).nearest(model, x, y, generator=_generator())
    assert float((L2.distance(every, x) - L2.distance(few, x)).max()) <= 1e-9


def test_deepfool_goes_round_pixels_that_cannot_move():
    """The steepest pixel is at its bound already: in l_1 the step has to go to another."""
    model = _linear(2, size=4)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-2.0, -1.0, 0.5, 0.1], [2.0, 1.0, -0.5, -0.1]], dtype=torch.float64))
    x = torch.tensor([1.0, 0.2, 0.9, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([2.5, -2.5], dtype=torch.float64))  # margin (f_0 - f_1) 2 (2.5 - 1.8)
    y = torch.tensor([0])
    assert model(x).argmax(1) == y
    attack = DeepFool(ThreatModel("l1", 0.1))
    nearest = attack.nearest(model, x, y, generator=_generator())
    assert model(nearest).argmax(1) != y
    assert nearest[0, 0, 0, 0] == 1.0
    assert float((nearest - x)[0, 0, 0, 1]) > 0.5


@pytest.mark.parametrize("attack", [CarliniWagner(L2), ElasticNet(L2, beta=0.0), FastMinimumNorm(L2)], ids=str)
def test_the_l2_boundary_of_many_classes_is_reached(attack):
    model = _linear(5)
    x, y = _middle(model)
    nearest = attack.nearest(model, x, y, generator=_generator())
    found = L2.distance(nearest, x) / _distances(model, x, y, 2)
    assert float(found.min()) >= 1
    assert float(found.max()) < 1.05


def test_the_elastic_net_becomes_sparser_with_beta_and_its_rules_differ():
    model = _linear(3)
    x, y = _middle(model)
    sizes = {}
    for beta in (0.0, 0.01, 0.05):
        nearest = ElasticNet(L2, beta=beta, rule="l1").nearest(model, x, y, generator=_generator())
        assert bool((model(nearest).argmax(1) != y).all())
        delta = (nearest - x).flatten(1)
        sizes[beta] = float(delta.abs().sum(1).mean()), float((delta != 0).double().mean())
    assert sizes[0.05][0] < sizes[0.01][0] < sizes[0.0][0]
    assert sizes[0.05][1] < sizes[0.0][1]
    exact = _distances(model, x, y, torch.inf)
    assert sizes[0.05][0] < 1.5 * float(exact.mean())
    model, (x, y) = _curved(), _middle(_curved(), size=6)
    by_rule = {
        rule: ElasticNet(L2, beta=0.02, rule=rule).nearest(model, x, y, generator=_generator()) for rule in ("en", "l1")
    }
    l1 = {rule: (nearest - x).flatten(1).abs().sum(1) for rule, nearest in by_rule.items()}
    assert float((l1["l1"] - l1["en"]).max()) <= 1e-9
    assert not torch.equal(by_rule["l1"], by_rule["en"])


def test_soft_thresholding_minimises_its_objective():
    """argmin_z |z - v|^2 / 2 + beta |z - x|_1, by brute force."""
    attack = ElasticNet(beta=0.05)
    x = torch.tensor([0.3, 0.3, 0.3, 0.3], dtype=torch.float64)
    v = torch.tensor([0.2, 0.32, 0.5, 0.34], dtype=torch.float64)
    grid = torch.linspace(0, 1, 100001, dtype=torch.float64)[:, None]
    cost = (grid - v).square() / 2 + 0.05 * (grid - x).abs()
    torch.testing.assert_close(attack._thresholded(v, x), grid[cost.argmin(0), 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_breaks_in_the_ball_found_and_hardly_in_a_much_smaller_one(norm):
    """On a curved network the nearest images are what PGD with many starts says they are."""
    model = _curved()
    x, y = _middle(model, 20, 6)
    nearest = FastMinimumNorm(ThreatModel(norm, 0.3)).nearest(model, x, y, generator=_generator())
    distance = ThreatModel(norm, 0.3).distance(nearest, x)
    agrees = 0
    for row in range(len(x)):
        image, label = x[row : row + 1], y[row : row + 1]
        for share in (1.02, 0.9):
            attack = Pgd(ThreatModel(norm, share * float(distance[row])), 60, loss="margin", keep="best")
            broken = any(
                int(model(attack(model, image, label, generator=_generator(seed))).argmax(1)) != int(label)
                for seed in range(3)
            )
            agrees += broken == (share > 1)
    assert agrees >= 36, "of 40"


def test_careful_searches_come_nearer_than_deepfool():
    model = _curved(3)
    x, y = _middle(model, 30, 6)
    for norm in ("linf", "l2"):
        threat_model = ThreatModel(norm, 0.3)
        median = {}
        for cls in (DeepFool, CarliniWagner, FastMinimumNorm):
            nearest = cls(threat_model).nearest(model, x, y, generator=_generator())
            assert bool((model(nearest).argmax(1) != y).all()), cls
            median[cls] = float(threat_model.distance(nearest, x).median())
        assert median[FastMinimumNorm] <= 1.001 * median[CarliniWagner] <= 1.02 * median[DeepFool]


def test_confidence_is_the_lead_that_is_asked_for():
    model = _linear(4)
    x, y = _middle(model)
    for cls in (CarliniWagner, ElasticNet):
        nearest = cls(L2, confidence=0.5).nearest(model, x, y, generator=_generator())
        logits = model(nearest).detach()
        lead = logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]
        assert float(lead.min()) >= 0.5


@pytest.mark.parametrize("cls", ATTACKS)
def test_misclassified_samples_and_constant_models_come_back_as_they_were(cls):
    model = _linear(3)
    x, y = _middle(model)
    y[:4] = (y[:4] + 1) % 3
    nearest = cls(L2).nearest(model, x, y, generator=_generator())
    assert torch.equal(nearest[:4], x[:4])
    assert bool((nearest[4:] != x[4:]).flatten(1).any(1).all())
    assert torch.equal(cls(L2).nearest(model, x[:4], y[:4], generator=_generator()), x[:4])
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    zeros = torch.zeros_like(y)
    settings = {} if cls is DeepFool else {"steps": 20}
    assert torch.equal(cls(L2, **settings).nearest(model, x, zeros, generator=_generator()), x)


@pytest.mark.parametrize("cls", ATTACKS)
def test_a_call_is_the_nearest_image_projected(cls):
    model = _curved()
    x, y = _middle(model, 6, 6)
    attack = cls(ThreatModel("l2", 0.05))
    nearest = attack.nearest(model, x, y, generator=_generator())
    expected = attack.threat_model.project(nearest, x)
    assert torch.equal(attack(model, x, y, generator=_generator()), expected)


def test_adam_is_that_of_torch_and_forgets_those_left_behind():
    weights = torch.randn(3, 5, generator=_generator(), dtype=torch.float64)
    reference, ours = weights.clone().requires_grad_(True), weights.clone()
    optimiser, adam = torch.optim.Adam([reference], lr=0.1), Adam(ours, 0.1)
    kept = torch.tensor([True, False, True])
    for step in range(6):
        optimiser.zero_grad()
        (reference**4).sum().backward()
        optimiser.step()
        if step == 3:
            adam.keep(kept)
            ours = ours[kept]
        ours = ours + adam.step(4 * ours**3)
    torch.testing.assert_close(ours, reference.detach()[kept])


def test_the_nearest_of_what_was_shown_is_kept():
    x, y = torch.zeros(2, 1, 1, 2), torch.tensor([0, 0])
    found = Found(x, y, lambda a, b: (a - b).flatten(1).abs().sum(1), 0.0)
    rows = torch.arange(2)
    wrong, right = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert found.see(x + 0.5, torch.cat([wrong, right]), rows).tolist() == [True, False]
    assert found.see(x + 0.7, torch.cat([wrong, wrong]), rows).tolist() == [True, True]
    assert found.see(x + 0.1, torch.cat([right, torch.zeros(1, 2)]), rows).tolist() == [False, False]
    torch.testing.assert_close(found.images[:, 0, 0, 0], torch.tensor([0.5, 0.7]))
    torch.testing.assert_close(found.sizes, torch.tensor([1.0, 1.4]))


def test_wrong_settings_are_refused():
    for cls, settings in (
        (CarliniWagner, {"threat_model": ThreatModel("l1", 1.0)}),
        (CarliniWagner, {"steps": 0}),
        (CarliniWagner, {"searches": 0}),
        (CarliniWagner, {"learning_rate": 0.0}),
        (CarliniWagner, {"confidence": -1.0}),
        (DeepFool, {"steps": 0}),
        (DeepFool, {"overshoot": 0.0}),
        (DeepFool, {"classes": 1}),
        (ElasticNet, {"beta": -0.1}),
        (ElasticNet, {"rule": "l2"}),
        (FastMinimumNorm, {"steps": 0}),
        (FastMinimumNorm, {"gamma": 1.0}),
        (FastMinimumNorm, {"final_step_size": 2.0}),
    ):
        with pytest.raises(InputError):
            cls(**settings)
