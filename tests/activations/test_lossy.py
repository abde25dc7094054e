"""Lossy activations: what they lose, how they begin, and that lost gradients are told from robustness."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.activations.annealing import anneal
from nas.activations.lossy import BACKWARDS, Lossy, LossyMap, backward, lossy_maps, stable_share
from nas.attacks.bpda import Bpda
from nas.attacks.pgd import Pgd
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.evaluation.robustness import Trial, evaluate
from nas.evaluation.suspicion import suspicions
from nas.model_file import load_model, save_model
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training import loop
from nas.training.standard import Standard

KINDS = ["clip-quant", "dead-zone", "binary", "sigmoid-steep", "topk"]


def _map(level=1.0, dtype=torch.float64, **settings):
    module = LossyMap(Lossy(**settings)).to(dtype).eval()
    module.level.fill_(level)
    return module


def _values(n=4000, seed=0):
    return 2 * torch.randn(n // 40, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_five_functions():
    z = _values()
    u, n = 2.0, 5
    assert torch.allclose(_map(bound=u, levels=n)(z), u / n * torch.round(z.clamp(0, u) / (u / n)))
    dead = _map(kind="dead-zone", bound=u, threshold=0.25)(z)
    assert torch.allclose(dead, (z.abs() - 0.5).clamp(0, u) * (z > 0))
    assert torch.equal(_map(kind="binary", bound=u, threshold=0.25)(z), (z > 0.5).double())
    on_the_border = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    assert _map(kind="binary", bound=u, threshold=0.25)(on_the_border).tolist() == [[0.0, 1.0]]
    steep = _map(kind="sigmoid-steep", bound=u, threshold=0.25, steepness=50.0)(z)
    assert torch.allclose(steep, u / (1 + torch.exp(-50 * (z - 0.5))))
    winners = _map(kind="topk", keep=0.1)(z)
    for row, values in zip(winners, z, strict=True):
        assert torch.equal(row, torch.where(values >= values.topk(4).values[-1], values.clamp_min(0), 0))


@pytest.mark.parametrize("levels", [1, 3, 4, 16])
def test_there_are_so_many_distinct_outputs_and_no_more(levels):
    z = torch.linspace(-3, 9, 10_001)
    for bound in (0.7, 2.33, 6.0):
        found = _map(dtype=torch.float32, bound=bound, levels=levels)(z).unique()
        assert len(found) == levels + 1
        assert found[0] == 0 and float(found[-1]) == pytest.approx(bound)
    assert len(_map(kind="binary", bound=2.0)(z).unique()) == 2


@pytest.mark.parametrize("kind", ["clip-quant", "dead-zone", "topk"])
def test_without_loss_it_is_relu(kind):
    z = _values()
    lossless = {"clip-quant": {}, "dead-zone": {"threshold": 0.5}, "topk": {}}[kind]
    assert torch.equal(_map(0.0, kind=kind, bound=1e5, **lossless)(z), F.relu(z))
    none = {"clip-quant": {"levels": 65536, "bound": 20.0}, "dead-zone": {}, "topk": {"keep": 1.0}}[kind]
    assert torch.allclose(_map(1.0, kind=kind, **{"bound": 1e5, **none})(z), F.relu(z), atol=2e-4)


def test_a_lossless_network_has_the_logits_of_its_parent(spec_of, build):
    x = torch.rand(6, 1, 8, 8)
    for kind in ("plain", "cells"):
        parent, child = build(spec_of(kind)), build(spec_of(kind, Lossy(bound=1e6)))
        assert torch.allclose(child(x), parent(x), atol=1e-4)  # at level 0
        anneal(child, 0, 1)
        assert not torch.allclose(child(x), parent(x), atol=1e-2)


def _derivative(module, z):
    point = z.clone().requires_grad_(True)
    return torch.autograd.grad(module(point).sum(), point)[0]


def test_the_gradient_goes_straight_through_inside_and_nowhere_else():
    z = torch.linspace(-3, 5, 800, dtype=torch.float64).view(1, -1)  # not on a border, where torch takes the mean
    inside = ((z > 0) & (z < 2)).double()
    assert torch.equal(_derivative(_map(bound=2.0), z), inside)
    assert torch.allclose(_derivative(_map(kind="binary", bound=2.0, threshold=0.25), z), inside / 2)
    for kind in ("clip-quant", "binary"):
        module = _map(kind=kind, bound=2.0)
        module.gradient = "true"
        assert float(_derivative(module, z).abs().max()) == 0
        module.gradient = "identity"
        assert float(_derivative(module, z).min()) > 0
        module.gradient = "sigmoid"
        slope = _derivative(module, z)
        assert bool((slope[(z > 0) & (z < 2)] > 0).all())


@pytest.mark.parametrize("gradient", [name for name in BACKWARDS if name != "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_way_back_changes(kind, gradient):
    z, module = _values(), _map(kind=kind, bound=2.0, threshold=0.1)
    reference = module(z)
    module.gradient = gradient
    assert torch.equal(module(z.clone().requires_grad_(True)), reference)


def test_the_sigmoid_follows_the_stairs_closely():
    """Steepest where the output jumps."""
    module = _map(bound=2.0, levels=4)
    module.gradient = "sigmoid"
    z = torch.linspace(0.01, 1.99, 199, dtype=torch.float64).view(1, -1)
    slope = _derivative(module, z)
    jumps, flat = torch.tensor([[0.25, 0.75, 1.25, 1.75]]).double(), torch.tensor([[0.01, 0.5, 1.0, 1.5]]).double()
    assert float(_derivative(module, jumps).min()) >= float(slope.max()) - 1e-9
    assert float(_derivative(module, flat).max()) < 0.6 * float(slope.max())


def test_a_learnt_bound_has_the_gradient_of_what_it_clips():
    module = _map(bound=2.0, learned=True)
    z = torch.tensor([[-1.0, 1.0, 2.5, 3.0]], dtype=torch.float64)
    assert torch.autograd.grad(module(z).sum(), module.bound)[0] == 2.0
    assert isinstance(module.bound, nn.Parameter)


def test_the_bound_follows_the_percentile_until_it_has_hardened():
    module = _map(0.5)
    batches = [torch.rand(64, 100, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(60)]
    before = float(module.bound)
    module(batches[0])
    assert float(module.bound) == before  # eval mode
    module.train()
    for batch in batches:
        module(5 * batch)
    assert float(module.bound) == pytest.approx(4.95, abs=0.05)
    anneal(module, 0, 1)
    module(100 * batches[0])
    assert float(module.bound) == pytest.approx(4.95, abs=0.05)


@pytest.mark.parametrize("epochs", [1, 2, 3, 10])
def test_it_hardens_over_the_first_half(epochs):
    module = LossyMap(Lossy())
    levels = []
    for epoch in range(epochs):
        finished = anneal(module, epoch, epochs)
        levels.append(float(module.level))
        assert finished == (levels[-1] == 1.0)
    assert levels == sorted(levels) and levels[-1] == 1.0
    if epochs > 1:
        assert levels[0] == 0.0
        assert all(level == 1.0 for level in levels[epochs // 2 :])
    anneal(module, 0, epochs)  # fine-tuned afterwards
    assert float(module.level) == 1.0
    assert anneal(nn.ReLU(), 0, 5)


@pytest.mark.parametrize("settings", [{}, {"ema": 0.99}, {"swa": 0.25}], ids=str)
def test_only_hardened_epochs_can_be_the_best(settings, spec_of, build, monkeypatch):
    """Not even where the first ones, with a rectifier in place, are judged better."""
    judged = []

    def worse_and_worse(model, *arguments):
        judged.append({float(module.level) for module in lossy_maps(model)})
        share = 1 - len(judged) / 10
        return loop.Validation(share, share)

    monkeypatch.setattr(loop, "validate", worse_and_worse)
    model = build(spec_of("plain", Lossy(bound=2.0)))
    y = torch.arange(64) % 3
    x = torch.randint(0, 256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ImageData("made up", x, y, x[:8], y[:8], ("a", "b", "c"))
    parts = split(y, architecture=0.5, validation=0.25, seed=0)
    training = loop.Training(5, 8, optimiser=Sgd(schedule="constant"), **settings)
    loop.train(model, data, parts, Standard(), training, validation_attack=Pgd(), seed=0)
    assert judged == [{0.0}, {0.5}, {1.0}, {1.0}, {1.0}]
    assert all(float(module.level) == 1.0 for module in lossy_maps(model))


@pytest.mark.parametrize("kind", ["clip-quant", "binary"])
def test_the_stability_lemma_on_random_networks(kind):
    """Units further than m from a jump: perturbations up to m / Lip leave the layer's output the same to the bit."""
    checked = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        layer = nn.Linear(6, 4).double()
        with torch.no_grad():
            layer.weight.normal_(generator=generator)
            layer.bias.normal_(generator=generator)
        module = _map(kind=kind, bound=3.0, levels=4, threshold=0.2)
        gain = float(layer.weight.detach().abs().sum(1).max())  # l_inf -> l_inf
        x = torch.rand(50, 6, generator=generator, dtype=torch.float64)
        margin = module.margin(layer(x)).amin(1)  # of each image
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
        radius = 0.999 * margin / gain
        moved = x[:, None] + radius[:, None, None] * signs
        assert torch.equal(module(layer(moved)), module(layer(x))[:, None].expand(-1, 64, -1))
        checked += int((margin > 0.01).sum())
        # Beyond the margin, in the worst direction of the unit next to its border, the output does change.
        z = layer(x)
        unit = module.margin(z).argmin(1)
        least = module.margin(z).gather(1, unit[:, None])[:, 0]
        changed = torch.zeros(50, dtype=torch.bool)
        for step in (1.001, -1.001):
            there = z.clone()
            there[torch.arange(50), unit] += step * least
            changed |= (module(there) != module(z)).any(1)
        assert bool(changed.all())
    assert checked > 100


def test_the_share_of_stable_values_is_reported(spec_of, build):
    model = build(spec_of("plain", Lossy(bound=2.0, levels=4)))
    x = torch.rand(6, 1, 8, 8)
    with pytest.raises(InputError, match="level 0"):
        stable_share(model, x, 0.1)
    anneal(model, 0, 1)
    assert stable_share(model, x, 0.0) == pytest.approx(1.0, abs=1e-3)
    shares = [stable_share(model, x, margin) for margin in (0.05, 0.15, 0.24)]
    assert shares == sorted(shares, reverse=True) and 0 < shares[0] < 1
    with pytest.raises(InputError, match="piecewise constant"):
        stable_share(build(spec_of("plain")), x, 0.1)


# Attacks: what a lossy network hides is found by going round it


def _task():
    """Two noisy prototypes that differ little: within reach of an attack, out of reach of noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(160) % 2
    pattern = torch.randn(1, 1, 8, 8, generator=generator).sign()
    x = 0.5 + (2 * y - 1).view(-1, 1, 1, 1) * 0.07 * pattern + 0.06 * torch.randn(160, 1, 8, 8, generator=generator)
    return x.clamp(0, 1), y


X, Y = _task()
THREAT = ThreatModel(epsilon=0.08)


@pytest.fixture(scope="module")
def trained():
    """Networks that learnt the task by natural training with hardening activations, by kind."""
    networks = {}
    for kind in ("clip-quant", "binary"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), LossyMap(Lossy(kind=kind, levels=4)),
            nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), LossyMap(Lossy(kind=kind, levels=4)),
            nn.Flatten(), nn.Linear(128, 2),
        )  # fmt: skip
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        for epoch in range(40):
            anneal(model, epoch, 40)
            loss = F.cross_entropy(model.train()(X), Y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        networks[kind] = model.eval()
    return networks


@pytest.mark.parametrize("kind", ["clip-quant", "binary"])
def test_bpda_finds_what_true_gradients_cannot(kind, trained):
    model = trained[kind]

    def robust(attack):
        return float(evaluate(model, X, Y, {"a": Trial(attack)}, seed=0).worst_case.double().mean())

    natural = float((model(X).argmax(1) == Y).double().mean())
    blind = robust(Bpda(THREAT, steps=20, through="true"))
    assert natural > 0.95 and blind > natural - 0.1, "the true gradient is 0: it finds next to nothing"
    found = {through: robust(Bpda(THREAT, steps=20, through=through)) for through in BACKWARDS if through != "true"}
    assert found["straight-through"] < blind and min(found.values()) < 0.3, found
    # The default derivative is the straight-through one: plain PGD is no worse than the attack that knows.
    assert min(found.values()) <= robust(Pgd(THREAT, steps=20, loss="margin")) <= blind


@pytest.mark.parametrize("through", BACKWARDS)
def test_bpda_keeps_to_its_budget_and_restores_the_network(through, trained):
    model = copy.deepcopy(trained["clip-quant"])
    before = copy.deepcopy(model.state_dict())
    x_adv = Bpda(THREAT, steps=5, through=through)(model, X, Y, generator=torch.Generator().manual_seed(0))
    assert float((x_adv - X).abs().max()) <= THREAT.epsilon + 1e-6
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    assert all(module.gradient == "straight-through" for module in lossy_maps(model))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(X), trained["clip-quant"](X))


def test_without_lossy_layers_bpda_is_pgd(spec_of, build):
    model, x, y = build(spec_of("plain")), torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    given = [torch.Generator().manual_seed(0) for _ in range(2)]
    pgd = Pgd(THREAT, steps=5, loss="margin")(model, x, y, generator=given[0])
    for through in BACKWARDS:
        again = Bpda(THREAT, steps=5, through=through)(model, x, y, generator=torch.Generator().manual_seed(0))
        assert torch.equal(again, pgd)


def _checks(model, attack):
    evaluation = evaluate(model, X, Y, {"a": Trial(attack)}, seed=0)
    return {check.name: check for check in suspicions(model, X, Y, evaluation, THREAT, seed=0, samples=160)}


@pytest.mark.parametrize("kind", ["clip-quant", "binary"])
def test_the_evaluator_suspects_a_network_whose_gradient_is_truly_zero(kind, trained):
    """What claims robustness because PGD had no gradient to go by."""
    model = trained[kind]
    with backward(model, "true"):
        checks = _checks(model, Pgd(THREAT, steps=20))
        failing = {name for name, check in checks.items() if check.verdict == "fail"}
        assert {"zero gradients", "gradients are true", "lossy activations"} <= failing, checks


def test_a_lossy_network_is_never_declared_clean(trained):
    """Even where all attacks that are known found all there is to find."""
    wider = ThreatModel(epsilon=0.3)
    checks = _checks(trained["clip-quant"], Bpda(wider, steps=20, through="sigmoid"))
    assert checks["lossy activations"].verdict == "warn"
    assert "lossy activations" not in _checks(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), Pgd(THREAT))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_deterministic_and_survives_its_file(kind, spec_of, build, tmp_path):
    spec = spec_of("cells", Lossy(kind=kind, first=3))
    model = build(spec)
    assert len(lossy_maps(model)) == 3
    anneal(model, 0, 1)
    x = torch.rand(6, 1, 8, 8)
    assert torch.equal(model(x), model(x))
    save_model(spec, model, tmp_path)
    assert torch.equal(load_model(tmp_path)[1](x), model(x))
