"""HYDRA: scores that train in place of weights, and a mask of the best of them."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from nas.attacks.pgd import Pgd
from nas.compression.hydra import FROZEN, Hydra, Scored
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.masks import weights_of
from nas.compression.plan import Plan, Recovers, Steers, plan_for
from nas.data.digits import Digits
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.model_file import ModelSpec, load_model, save_model, with_plan
from nas.optimisation import Sgd
from nas.prediction import MeanOfParticles
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from search_spaces.genotype import StageGenotype

ATTACK = Pgd(ThreatModel("linf", 0.05), steps=1)


class Stopped(Exception):
    pass


def _x(n=6, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def _scores(model):
    return {
        name: layer.parametrizations.weight[-1]
        for name, layer in deployed_layers(model).items()
        if parametrize.is_parametrized(layer) and isinstance(layer.parametrizations.weight[-1], Scored)
    }


def _noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 1, 8, 8), generator=generator).to(torch.uint8)
    return ImageData("noise", x, torch.arange(40) % 3, x[:4], torch.arange(4) % 3, ("a", "b", "c"))


def _steer(steered, epochs=3, rate=0.1, **more):
    data = _noise()
    parts = split(data.y_train, architecture=0.0, validation=0.2, seed=0)
    training = Training(epochs=epochs, batch_size=16, optimiser=Sgd(rate, weight_decay=0.01), validate_every=epochs)
    objective = Hydra(0.3).steering(PgdAt(ATTACK))
    return train(steered, data, parts, objective, training, validation_attack=ATTACK, seed=0, **more)


@pytest.mark.parametrize("keep", [0.9, 0.35, 0.1, 0.05, 0.01])
def test_each_layer_has_exactly_as_many_zeros_as_asked(keep, kind, make):
    _, model = make(kind)
    method = Hydra(keep)
    steered = method.steered(model)
    for network in (steered, method.plan(steered).apply(method.released(steered))):
        for name in _scores(steered):
            weight = deployed_layers(network)[name].weight
            zeros = min(int(round((1 - keep) * weight.numel(), 6)), weight.numel() - 1)
            assert int((weight == 0).sum()) == zeros, name


def test_scores_begin_as_weights_of_the_size_of_fresh_ones(kind, make):
    _, model = make(kind)
    for name, scored in _scores(Hydra().steered(model)).items():
        weight = deployed_layers(model)[name].weight
        expected = math.sqrt(6 / weight[0].numel()) * weight / weight.abs().max()
        torch.testing.assert_close(scored.scores, expected)
    zero = Scored(torch.zeros(3, 4), 2)
    assert bool(zero.scores.isfinite().all()) and int(zero.chosen().sum()) == 2


@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_without_training_it_is_magnitude_by_layer(keep, kind, make):
    _, model = make(kind)
    method, expected = Hydra(keep, epochs=0), MagnitudePruning(keep, "layer").plan(model)
    for plan in (method.plan(model), method.plan(method.steered(model))):
        assert plan.method == "hydra" and plan.layers == expected.layers


def test_keeping_everything_is_the_dense_network(kind, make):
    _, model = make(kind)
    method = Hydra(1.0)
    steered = method.steered(model)
    assert torch.equal(steered(_x()), model(_x()))
    assert torch.equal(method.plan(steered).apply(method.released(steered))(_x()), model(_x()))


def test_gradients_pass_the_choice_straight_through():
    """As the product rule has them for w s with s in place of the mask, that of |score| with its sign."""
    torch.manual_seed(0)
    weight, scored = torch.randn(4, 5, dtype=torch.float64), Scored(torch.randn(4, 5, dtype=torch.float64), 6)
    used = scored(weight)
    assert torch.equal(used, weight * scored.chosen()) and int((used != 0).sum()) == 6
    (found,) = torch.autograd.grad((used * torch.arange(20.0).view(4, 5)).sum(), scored.scores)
    torch.testing.assert_close(found, torch.arange(20.0).view(4, 5) * weight * scored.scores.detach().sign())
    with torch.no_grad():
        scored.scores[scored.chosen()] = 0.0
    assert torch.equal(scored(weight) != 0, scored.chosen())


def test_only_scores_and_normalisation_train(kind, make):
    _, model = make(kind)
    model.classifier.weight.requires_grad_(False)
    method = Hydra(0.3)
    steered = method.steered(model)
    assert isinstance(method, Steers) and not isinstance(method, Recovers)
    before = copy.deepcopy(steered.state_dict())
    _steer(steered, rate=1.0)
    norms = [name for name, module in steered.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name, value in steered.state_dict().items():
        if name.startswith("auxiliary"):
            continue
        moved = not torch.equal(value, before[name])
        trains = name.endswith(".scores") or name.rpartition(".")[0] in norms
        assert moved == trains, name
    chosen = {name: scored.chosen() for name, scored in _scores(steered).items()}
    planned = {name: weight != 0 for name, weight in weights_of(method.plan(steered).apply(model)).items()}
    assert all(torch.equal(mask, planned[name]) for name, mask in chosen.items())
    magnitude = {name: scored.chosen() for name, scored in _scores(method.steered(model)).items()}
    assert any(not torch.equal(mask, magnitude[name]) for name, mask in chosen.items()), "other weights are found"
    released = method.released(steered)
    assert released.state_dict().keys() == model.state_dict().keys() and not hasattr(released, FROZEN)
    for name, layer in deployed_layers(released).items():
        assert torch.equal(layer.weight, deployed_layers(model)[name].weight)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in released.named_parameters()} == wanted
    assert not wanted["classifier.weight"]
    assert torch.equal(steered.eval()(_x()), method.plan(steered).apply(released).eval()(_x())), "what was trained"


def test_attacks_see_through_the_scores(kind, make):
    """Outputs and input gradients are those of zeroed dense weights; native kernels included."""
    _, model = make(kind)
    method = Hydra(0.3)
    steered = method.steered(model)
    dense = method.released(steered)
    with torch.no_grad():
        for name in _scores(steered):
            deployed_layers(dense)[name].weight.copy_(deployed_layers(steered)[name].weight)
    pruned, y = method.plan(steered).apply(method.released(steered)), torch.arange(6) % 3
    for mode in (False, True):
        found = []
        for network in (steered, pruned, dense):
            x = _x().requires_grad_(True)
            logits = network.train(mode)(x)
            found.append((logits, torch.autograd.grad(F.cross_entropy(logits, y), x)[0]))
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-6)
    images = [ATTACK(net.eval(), _x(), y, generator=torch.Generator().manual_seed(0)) for net in (steered, dense)]
    torch.testing.assert_close(*images)


def test_steering_that_was_stopped_goes_on_to_the_same_network(make, tmp_path):
    _, model = make("plain")
    method = Hydra(0.3)
    through, interrupted = method.steered(model), method.steered(model)
    _steer(through)

    def stop(record):
        if record["epoch"] == 1:
            raise Stopped

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        _steer(interrupted, checkpoint=path, log=stop)
    again = method.steered(model)
    _steer(again, checkpoint=path)
    assert method.plan(again) == method.plan(through)
    assert all(torch.equal(value, through.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_pruned_network_keeps_its_masks(kind, make, tmp_path):
    spec, model = make(kind)
    first = MagnitudePruning(0.5).plan(model)
    pruned = first.apply(model)
    method = Hydra(0.3)
    steered = method.steered(pruned)
    _steer(steered)
    released, plan = method.released(steered), method.plan(steered)
    assert released.state_dict().keys() == pruned.state_dict().keys()
    network = plan.apply(released).eval()
    for name in _scores(steered):
        assert not bool(deployed_layers(network)[name].weight[deployed_layers(pruned)[name].weight == 0].any())
    save_model(with_plan(with_plan(spec, first), plan), network, tmp_path)
    assert torch.equal(load_model(tmp_path)[1](_x()), network(_x()))


def test_plans_survive_files_and_give_the_same_network(kind, make, tmp_path):
    spec, model = make(kind)
    method = Hydra(0.3)
    steered = method.steered(model)
    _steer(steered)
    plan = method.plan(steered)
    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))
    assert again == plan
    released = method.released(steered)
    network = again.apply(released).eval()
    save_model(with_plan(spec, plan), network, tmp_path)
    loaded = load_model(tmp_path)[1]
    assert torch.equal(loaded(_x()), network(_x()))
    with pytest.raises(InputError, match="another network"):
        plan.apply(make("cells" if kind == "plain" else "plain")[1])


def test_ensembles_are_planned_network_by_network(make):
    spec, _ = make("plain")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ensemble = MeanOfParticles(2).predictor(spec.build).eval()
    plan = plan_for(Hydra(0.3, epochs=0), ensemble)
    pruned = plan.apply(ensemble)
    assert {layer.name.split(".")[1] for layer in plan.layers} == {"0", "1"}
    assert pruned(_x()).shape == (6, 3) and not torch.allclose(pruned(_x()), ensemble(_x()))


def test_wrong_settings_are_refused():
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"keep": float("nan")}, {"epochs": -1}):
        with pytest.raises(InputError):
            Hydra(**wrong)
    for ask in (Hydra().plan, Hydra().steered):
        with pytest.raises(InputError, match="no layer"):
            ask(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_learnt_masks_are_far_better_than_those_of_magnitude():
    """Before fine-tuning, with the weights as they were: natural and robust accuracy of a tenth of the weights."""
    data = Digits()()
    parts = split(data.y_train, architecture=0.0, validation=0.15, seed=0)
    spec = ModelSpec(StageGenotype("plain", (1, 2), (12, 16)), 1, 1, data.input_shape, data.classes, (0.3,), (0.35,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build()
    more = {"validation_attack": ATTACK, "seed": 0}
    settings = Training(epochs=6, batch_size=64, optimiser=Sgd(0.1), validate_every=6)
    train(model, data, parts, PgdAt(ATTACK), settings, **more)
    images = data.x_test.float() / 255

    def accuracies(network):
        x_adv = ATTACK(network.eval(), images, data.y_test, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return [float((network(x).argmax(1) == data.y_test).float().mean()) for x in (images, x_adv)]

    method = Hydra(0.1)
    steered = method.steered(model)
    train(steered, data, parts, method.steering(PgdAt(ATTACK)), settings, **more)
    learnt = accuracies(method.plan(steered).apply(method.released(steered)))
    magnitude = accuracies(method.plan(model).apply(model))
    assert learnt[0] > 0.85 and learnt[1] > 0.6
    assert all(a > b + 0.3 for a, b in zip(learnt, magnitude, strict=True))
