"""How a network predicts is part of its description: kept, counted, compressed, exported, attacked and judged."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.analysis.complexity import complexity, nonzero_parameters, parameters_of
from nas.attacks.autoattack import AutoAttack
from nas.attacks.fgsm import Fgsm
from nas.attacks.gradient import input_gradient
from nas.attacks.pgd import Pgd
from nas.compression.magnitude import MagnitudePruning
from nas.compression.masks import Mask
from nas.compression.plan import plan_for
from nas.defences.noise import ImageNoise, LayerNoise, NoiseEnsemble
from nas.defences.particles import Particles
from nas.errors import InputError
from nas.evaluation.expectation import Expectation, suited
from nas.evaluation.robustness import Trial, evaluate
from nas.evaluation.suspicion import suspicions
from nas.export.package import export_model
from nas.export.parity import check_exports
from nas.model_file import ModelSpec, load_model, save_model, weights_digest, with_plan
from nas.model_state import crafting
from nas.prediction import MeanOfParticles, MeanOverNoise, begin, networks_in, prediction_from_data
from nas.threat_model import ThreatModel
from search_spaces.dsara import SPACE
from search_spaces.genotype import StageGenotype

PREDICTIONS = [
    MeanOfParticles(3),
    MeanOverNoise(ImageNoise(0.1), draws=4),
    MeanOverNoise(LayerNoise(0.3, 0.1), draws=2, seed=9),
]
THREAT = ThreatModel("linf", 0.1)


def _spec(kind="cells", prediction=None):
    genotype = SPACE.random(torch.Generator().manual_seed(0)) if kind == "cells" else StageGenotype("plain", (1,), (4,))
    return ModelSpec(genotype, 2, 4, (1, 8, 8), ("a", "b", "c"), (0.5,), (0.25,), kind == "cells", (), prediction)


def _built(spec, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = spec.build()
        model.train()(torch.rand(8, 1, 8, 8))  # statistics of its own
    return model.eval()


def _images(n=6, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["cells", "plain"])
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
def test_a_predictor_comes_back_bit_for_bit_compressed_or_not(kind, prediction, tmp_path):
    spec = _spec(kind, prediction)
    model = _built(spec)
    if kind == "cells":
        plan = plan_for(MagnitudePruning(0.6), model)
        spec, model = with_plan(spec, plan), plan.apply(model)
    save_model(spec, model, tmp_path)
    again_spec, again = load_model(tmp_path)
    assert again_spec == spec and type(again) is type(model)
    assert weights_digest(again) == weights_digest(model)
    begin(model)
    with torch.no_grad():
        assert torch.equal(again(_images()), model(_images()))


def test_a_model_older_than_the_field_predicts_by_one_network(tmp_path):
    spec = _spec()
    save_model(spec, _built(spec), tmp_path)
    path = tmp_path / "model.json"
    data = json.loads(path.read_text())
    assert data.pop("prediction") is None
    path.write_text(json.dumps(data))
    assert load_model(tmp_path)[0] == spec


@pytest.mark.parametrize(
    "data",
    [
        7,
        {},
        {"kind": "particle", "count": 2},
        {"kind": "particles"},
        {"kind": "particles", "count": 2, "draws": 2},
        {"kind": "particles", "count": 2.0},
        {"kind": "particles", "count": True},
        {"kind": "particles", "count": 0},
        {"kind": "particles", "count": 10**9},
        {"kind": "image noise", "sigma": "0.1", "draws": 2, "seed": 0},
        {"kind": "image noise", "sigma": -0.1, "draws": 2, "seed": 0},
        {"kind": "layer noise", "first": 0.1, "inner": float("nan"), "draws": 2, "seed": 0},
        {"kind": "layer noise", "first": 0.1, "inner": 0.1, "draws": 0, "seed": 0},
        {"kind": "layer noise", "sigma": 0.1, "draws": 1, "seed": 0},
    ],
)
def test_a_wrong_prediction_is_refused(data):
    with pytest.raises(InputError):
        prediction_from_data(data)


def test_particles_average_probabilities_and_start_apart():
    model = _built(_spec("plain", MeanOfParticles(3)))
    x = _images()
    with torch.no_grad():
        expected = torch.stack([member(x).softmax(1) for member in model.members]).mean(0)
        torch.testing.assert_close(model(x).exp(), expected)
    first, second, third = (weights_digest(member) for member in model.members)
    assert len({first, second, third}) == 3
    alone = Particles([model.members[0]])
    with torch.no_grad():
        torch.testing.assert_close(alone(x), model.members[0](x).log_softmax(1))
    with pytest.raises(InputError):
        Particles([])


def test_an_attack_on_particles_follows_the_mean_prediction():
    model, x, y = _built(_spec("plain", MeanOfParticles(3))).double(), _images().double(), torch.arange(6) % 3
    with crafting(model):
        gradient, _, _ = input_gradient(model, x, y, "cross_entropy", None)
    x.requires_grad_()
    likely = torch.stack([member(x).softmax(1) for member in model.members])[:, torch.arange(6), y]
    # -grad log mean p = -sum of grad p over sum of p: each particle weighs as much as it believes in the label.
    (expected,) = torch.autograd.grad(-likely.sum(0).log().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["cells", "plain"])
def test_costs_are_those_of_all_networks_and_all_passes(kind):
    alone, particles, noisy = (complexity(_spec(kind, prediction)) for prediction in (None, *PREDICTIONS[:2]))
    assert (particles.parameters, particles.macs) == (3 * alone.parameters, 3 * alone.macs)
    assert (noisy.parameters, noisy.macs) == (alone.parameters, 4 * alone.macs)
    for cost in (particles, noisy):
        assert [section.name for section in cost.sections] == [section.name for section in alone.sections]
        assert sum(section.parameters for section in cost.sections) == cost.parameters
        assert sum(section.macs for section in cost.sections) == cost.macs
        assert [cell.macs * cost.macs // alone.macs for cell in alone.cells] == [cell.macs for cell in cost.cells]
    assert parameters_of(_spec(kind, PREDICTIONS[0])) == 3 * parameters_of(_spec(kind))


def test_each_network_of_an_ensemble_is_compressed_as_if_alone():
    spec = _spec("cells", MeanOfParticles(2))
    model, method = _built(spec), MagnitudePruning(0.4)
    before = copy.deepcopy(model.state_dict())
    compressed = plan_for(method, model).apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for member, ours in zip(model.members, compressed.members, strict=True):
        alone = method.plan(member).apply(member)
        assert weights_digest(ours) == weights_digest(alone)
        assert nonzero_parameters(ours) == nonzero_parameters(alone) < parameters_of(_spec())
    assert nonzero_parameters(compressed) == sum(nonzero_parameters(member) for member in compressed.members)
    masks = [name for name, module in compressed.named_modules() if isinstance(module, Mask)]
    assert {name.split(".")[1] for name in masks} == {"0", "1"}
    with pytest.raises(InputError, match="another network"):
        plan_for(method, model).apply(model.members[0])
    with pytest.raises(InputError, match="another network"):
        method.plan(model.members[0]).apply(model)


@pytest.mark.parametrize("prediction", PREDICTIONS[:2], ids=str)
def test_exports_that_hold_an_ensemble_are_reloaded_alike_and_source_that_would_draw_other_noise_is_refused(
    prediction, tmp_path
):
    spec = _spec("plain", prediction)
    model = _built(spec)
    model(_images())  # used before
    formats = ["json", "safetensors", "py"]
    if isinstance(prediction, MeanOverNoise):
        with pytest.raises(InputError, match="safetensors"):
            export_model(spec, model, tmp_path, formats)
        assert not [*tmp_path.iterdir()]
        formats.remove("py")
    export_model(spec, model, tmp_path, formats)
    checked = check_exports(tmp_path, spec, model, _images(), lambda model, x: 0.9 * x)
    files = {file.file: (file.difference, file.adversarial) for file in checked}
    assert files["model.safetensors"] == (0, 0)
    assert files.get("network.py", (0, 0)) <= (1e-5, 1e-5)


@pytest.mark.parametrize("noise", [ImageNoise(0.2), LayerNoise(0.2, 0.2)], ids=str)
def test_a_noise_ensemble_is_the_network_in_train_mode_and_the_same_ensemble_under_attack(noise):
    model, x = _built(_spec("cells", MeanOverNoise(noise, draws=3))), _images()
    (network,) = networks_in(model).values()
    with torch.no_grad():
        model.train()
        train_mode = copy.deepcopy(network)
        assert torch.equal(model(x), train_mode(x))
        model.eval()
        begin(model)
        expected = model(x)
        assert not torch.allclose(expected, network(x).log_softmax(1), atol=1e-3)
        with crafting(model):
            begin(model)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        begin(model, 1)
        assert not torch.allclose(model(x), expected, atol=1e-4), "another number, another stream"


class Killed(Exception):
    pass


def test_an_evaluation_at_random_is_the_same_when_it_is_resumed(tmp_path):
    model, x, y = _learned(draws=2)
    trials = {"pgd": Trial(Pgd(THREAT, steps=2, stop_when_broken=True), restarts=3), "fgsm": Trial(Fgsm(THREAT))}
    whole = evaluate(model, x, y, trials, seed=1)
    assert "stops when broken" not in whole.settings["pgd"], "luck must not end an attack"
    assert 0 < int(whole.worst_case.sum()) < 64
    file = tmp_path / "progress"

    def kill(progress):
        if progress > 0.6:
            raise Killed

    with pytest.raises(Killed):
        evaluate(model, x, y, trials, seed=1, progress_file=file, tick=kill)
    again = evaluate(model, x, y, trials, seed=1, progress_file=file)
    for name in trials:
        assert torch.equal(again.attacks[name], whole.attacks[name])


def test_attacks_are_suited_to_models_that_answer_at_random():
    alone, stops = _built(_spec("plain")), Pgd(THREAT, stop_when_broken=True)
    assert suited(stops, alone) is stops
    for random in (NoiseEnsemble(alone, ImageNoise(0.1)), Expectation(alone, 2), nn.Sequential(Expectation(alone, 2))):
        assert not suited(stops, random).stop_when_broken
        assert suited(AutoAttack(THREAT), random).version == "rand"
        assert suited(Fgsm(THREAT), random) == Fgsm(THREAT)
    assert suited(AutoAttack(THREAT), Particles([alone])).version == "standard"


def _learned(draws):
    """A small network that tells bright from dark halves, under noise."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2))
    y = torch.arange(64) % 2
    x = torch.full((64, 1, 8, 8), 0.4)
    x[y == 1, :, :4] += 0.25
    x = (x + 0.02 * torch.randn(x.shape)).clamp(0, 1)
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(network(x + 0.1 * torch.randn(x.shape)), y).backward()
        optimiser.step()
    return NoiseEnsemble(network.eval(), ImageNoise(0.15), draws), x, y


@pytest.mark.slow
def test_the_checks_accept_a_steady_mean_over_noise_and_no_other():
    trials = {"pgd": Trial(Pgd(THREAT, steps=20)), "margin": Trial(Pgd(THREAT, steps=40, loss="margin"))}
    model, x, y = _learned(draws=50)
    found = evaluate(model, x, y, trials, seed=0)
    checks = {check.name: check for check in suspicions(model, x, y, found, THREAT, seed=0)}
    assert [checks[name].verdict for name in ("deterministic model", "eval mode", "gradients are true")] == ["pass"] * 3
    assert "mean over the randomness" in checks["deterministic model"].detail
    assert not [check for check in checks.values() if check.verdict == "fail"]
    unsteady = Jumping(model, ImageNoise(2.0), draws=1).eval()
    checks = {check.name: check for check in suspicions(unsteady, x, y, found, THREAT, seed=0)}
    assert checks["deterministic model"].verdict == "fail", "a mean over too few draws"


class Jumping(NoiseEnsemble):
    """Noise so large, and draws so few, that answers change from one prediction to the next."""
