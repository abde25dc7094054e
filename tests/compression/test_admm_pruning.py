"""ADMM pruning: weights drawn to their projection on sparse tensors by multipliers."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nas.attacks.pgd import Pgd
from nas.compression.admm_pruning import DUAL, EPOCH, TARGET, AdmmPruning
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.masks import largest, weights_of
from nas.compression.plan import Plan, Recovers, Steers, plan_for
from nas.data.digits import Digits
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.model_file import ModelSpec, load_model, save_model, with_plan
from nas.objective import Batch, State, gradients_of
from nas.optimisation import Sgd
from nas.prediction import MeanOfParticles
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.weight_perturbation import WeightPerturbation
from search_spaces.genotype import StageGenotype

ATTACK = Pgd(ThreatModel("linf", 0.05), steps=1)


class Stopped(Exception):
    pass


def _x(n=6, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def _batch():
    return Batch(_x(), torch.arange(6) % 3, torch.arange(6))


def _state(epoch=0):
    streams = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    return State(epoch, epoch, 0.0, *streams)


def _carriers(model):
    return {name: layer for name, layer in deployed_layers(model).items() if hasattr(layer, TARGET)}


def _train(network, objective, epochs=3, **more):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 1, 8, 8), generator=generator).to(torch.uint8)
    data = ImageData("noise", x, torch.arange(40) % 3, x[:4], torch.arange(4) % 3, ("a", "b", "c"))
    parts = split(data.y_train, architecture=0.0, validation=0.2, seed=0)
    training = Training(epochs=epochs, batch_size=16, optimiser=Sgd(0.05, weight_decay=0.01), validate_every=epochs)
    return train(network, data, parts, objective, training, validation_attack=ATTACK, seed=0, **more)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_without_a_pull_it_is_training_and_magnitude(scope, kind, make):
    _, model = make(kind)
    method = AdmmPruning(0.3, scope, rho=0.0)
    assert isinstance(method, Steers) and not isinstance(method, Recovers)
    steered, plain = method.steered(model), copy.deepcopy(model)
    assert torch.equal(steered(_x()), model(_x()))
    _train(steered, method.steering(PgdAt(ATTACK)), 2)
    _train(plain, PgdAt(ATTACK), 2)
    released = method.released(steered)
    assert released.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in released.state_dict().items())
    plan = method.plan(steered)
    assert plan.method == "admm_pruning" and plan == method.plan(plain)
    assert plan.layers == MagnitudePruning(0.3, scope).plan(plain).layers


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_steps_of_projection_and_multipliers_are_those_of_the_method(interval, scope, make):
    """Spelt out: Z := P(W + U), U := U + W - Z every interval; rho grows, and U, scaled by it, shrinks."""
    _, model = make("plain")
    method = AdmmPruning(0.3, scope, 6, interval, rho=0.2, growth=1.5)
    steered, chance = method.steered(model), torch.Generator().manual_seed(0)
    layers, objective, rho = _carriers(steered), method.steering(Standard()), 0.2
    for name, layer in layers.items():
        assert torch.equal(layer.get_buffer(TARGET) != 0, _chosen(layers, 0.3, scope)[name])
        assert not bool(layer.get_buffer(DUAL).any())
    for epoch in range(6):
        known = {
            n: (la.weight.detach().clone(), la.get_buffer(TARGET).clone(), la.get_buffer(DUAL).clone())
            for n, la in layers.items()
        }
        due = epoch > 0 and epoch % interval == 0
        masks = _chosen(layers, 0.3, scope)
        rho *= 1.5 if due else 1.0
        for _ in range(2):  # the second changes nothing
            loss, metrics = objective(steered, _batch(), _state(epoch))
        for name, (w, z, u) in known.items():
            projected = (w + u) * masks[name] if due else z
            dual = (u + w - projected) / 1.5 if due else u
            torch.testing.assert_close(layers[name].get_buffer(TARGET), projected)
            torch.testing.assert_close(layers[name].get_buffer(DUAL), dual)
        pulled = sum((la.weight - la.get_buffer(TARGET) + la.get_buffer(DUAL)).square().sum() for la in layers.values())
        natural, _ = Standard()(steered, _batch(), _state(epoch))
        torch.testing.assert_close(loss, natural + rho / 2 * pulled)
        apart = torch.cat([(la.weight - la.get_buffer(TARGET)).flatten() for la in layers.values()]).norm()
        size = torch.cat([la.weight.flatten() for la in layers.values()]).norm()
        torch.testing.assert_close(metrics["sparsity_gap"], (apart / size).detach())
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.add_(torch.randn(layer.weight.shape, generator=chance) * 0.1)
    assert int(steered.get_buffer(EPOCH)) == 5


def _chosen(layers, keep, scope):
    """The largest entries of W + U."""
    wanted = {name: (la.weight.detach() + la.get_buffer(DUAL)).abs() for name, la in layers.items()}
    if scope == "layer":
        return {name: largest(size, -int(-keep * size.numel() // 1)) for name, size in wanted.items()}
    flat = torch.cat([size.flatten() for size in wanted.values()])
    threshold = flat.sort(descending=True).values[round(keep * len(flat)) - 1]
    return {name: size >= threshold for name, size in wanted.items()}


def test_gradients_are_those_of_the_objective_and_of_the_pull(kind, make):
    """Also of an objective with gradients of its own."""
    _, model = make(kind)
    for inner in (PgdAt(ATTACK), WeightPerturbation(PgdAt(ATTACK), gamma=0.05)):
        method = AdmmPruning(0.3, rho=2.0)
        steered, dense = method.steered(model).train(), copy.deepcopy(model).train()
        _, expected, _ = gradients_of(inner, dense, _batch(), _state(), [*dense.parameters()])
        parameters = dict(steered.named_parameters())
        loss, found, _ = gradients_of(method.steering(inner), steered, _batch(), _state(), [*parameters.values()])
        pulls = {
            name + ".weight": 2 * (layer.weight.detach() - layer.get_buffer(TARGET))
            for name, layer in _carriers(steered).items()
        }
        assert not loss.requires_grad and set(pulls) <= set(parameters)
        for name, ours, theirs in zip(parameters, found, expected, strict=True):
            if theirs is None and name not in pulls:
                assert ours is None
            else:
                torch.testing.assert_close(ours, (0 if theirs is None else theirs) + pulls.get(name, 0))


def test_multipliers_reach_the_nearest_sparse_matrix_of_a_quadratic():
    """min |W - A|^2 / 2 with k non-zeros: W and Z meet, in A cut off at its k largest entries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8, bias=False), nn.Linear(8, 2)).double()
    wanted = torch.randn(8, 10, dtype=torch.float64)
    method = AdmmPruning(0.25, epochs=40, rho=1.0, growth=1.0)
    steered = method.steered(model)

    def objective(network, batch, state):
        return (network[0].weight - wanted).square().sum() / 2, {}

    parameters, gaps = [*steered.parameters()], []
    for epoch in range(40):
        for _ in range(15):
            state = _state(epoch)
            _, gradients, metrics = gradients_of(
                method.steering(objective), steered, SimpleNamespace(), state, parameters
            )
            with torch.no_grad():
                parameters[0] -= 0.3 * gradients[0]
        gaps.append(float(metrics["sparsity_gap"]))
    assert gaps[-1] < 1e-4 < 0.1 < gaps[0]
    torch.testing.assert_close(
        method.released(steered)[0].weight.detach(), wanted * largest(wanted.abs(), 20), rtol=0, atol=1e-3
    )


def test_steering_that_was_stopped_goes_on_to_the_same_network(make, tmp_path):
    _, model = make("plain")
    method = AdmmPruning(0.3, epochs=4)
    objective = method.steering(PgdAt(ATTACK))
    through, interrupted = method.steered(model), method.steered(model)
    _train(through, objective, 4)

    def stop(record):
        if record["epoch"] == 2:
            raise Stopped

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        _train(interrupted, objective, 4, checkpoint=path, log=stop)
    interrupted = method.steered(model)
    _train(interrupted, objective, 4, checkpoint=path)
    for name, value in interrupted.state_dict().items():
        assert torch.equal(value, through.state_dict()[name]), name


def test_plans_survive_files_also_on_a_pruned_network(kind, make, tmp_path):
    spec, model = make(kind)
    first = MagnitudePruning(0.5).plan(model)
    pruned = first.apply(model)
    method = AdmmPruning(0.2)
    steered = method.steered(pruned)
    _train(steered, method.steering(PgdAt(ATTACK)))
    released, plan = method.released(steered), method.plan(steered)
    assert released.state_dict().keys() == pruned.state_dict().keys()
    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))
    assert again == plan
    network = again.apply(released)
    zeros = {name: weight == 0 for name, weight in weights_of(network).items()}
    assert all(bool(zeros[name][weight == 0].all()) for name, weight in weights_of(pruned).items())
    _train(network, PgdAt(ATTACK))
    assert all(torch.equal(weight == 0, zeros[name]) for name, weight in weights_of(network).items())
    save_model(with_plan(with_plan(spec, first), plan), network.eval(), tmp_path)
    assert torch.equal(load_model(tmp_path)[1](_x()), network(_x()))
    with pytest.raises(InputError, match="another network"):
        plan.apply(make("cells" if kind == "plain" else "plain")[1])


def test_keeping_everything_changes_nothing(kind, make):
    _, model = make(kind)
    method = AdmmPruning(1.0, rho=1.0)
    steered = method.steered(model)
    loss, metrics = method.steering(Standard())(steered, _batch(), _state())
    assert torch.equal(loss, Standard()(steered, _batch(), _state())[0]) and float(metrics["sparsity_gap"]) == 0
    assert torch.equal(method.plan(steered).apply(method.released(steered))(_x()), model(_x()))


def test_ensembles_are_planned_network_by_network(make):
    spec, _ = make("plain")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ensemble = MeanOfParticles(2).predictor(spec.build).eval()
    plan = plan_for(AdmmPruning(0.3, epochs=0), ensemble)
    assert {layer.name.split(".")[1] for layer in plan.layers} == {"0", "1"}
    assert not torch.allclose(plan.apply(ensemble)(_x()), ensemble(_x()))


def test_wrong_settings_are_refused():
    for wrong in (
        {"keep": 0.0}, {"keep": 1.5}, {"scope": "network"}, {"epochs": -1}, {"interval": 0}, {"rho": -1.0},
        {"rho": float("nan")}, {"growth": 0.9}, {"growth": float("inf")},
    ):  # fmt: skip
        with pytest.raises(InputError):
            AdmmPruning(**wrong)
    for ask in (AdmmPruning().plan, AdmmPruning().steered):
        with pytest.raises(InputError, match="no layer"):
            ask(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_the_gap_falls_and_the_cut_costs_little():
    """Without steering the cut leaves nothing; with it most, before any fine-tuning."""
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

    method = AdmmPruning(0.15, epochs=6)
    steered = method.steered(model)
    records = train(steered, data, parts, method.steering(PgdAt(ATTACK)), settings, **more)
    gaps = [record["sparsity_gap"] for record in records]
    assert gaps[-1] < 0.15 < 0.3 < gaps[0]
    cut = accuracies(method.plan(steered).apply(method.released(steered)))
    unsteered = accuracies(method.plan(model).apply(model))
    assert cut[0] > 0.8 and all(a > b + 0.2 for a, b in zip(cut, unsteered, strict=True))
