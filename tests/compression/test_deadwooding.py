"""Deadwooding: multipliers that draw all but the largest weights to zero, and robust distillation from the parent."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.compression.deadwooding import EPOCH, KEPT, MULTIPLIER, Deadwooding, RobustDistillation
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.masks import Selection, weights_of
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
from runs.compress_part import Makers, compress_from
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
    return {name: layer for name, layer in deployed_layers(model).items() if hasattr(layer, MULTIPLIER)}


def _noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 1, 8, 8), generator=generator).to(torch.uint8)
    return ImageData("noise", x, torch.arange(40) % 3, x[:4], torch.arange(4) % 3, ("a", "b", "c"))


def _train(network, objective, epochs=3, **more):
    data = _noise()
    parts = split(data.y_train, architecture=0.0, validation=0.2, seed=0)
    training = Training(epochs=epochs, batch_size=16, optimiser=Sgd(0.05, weight_decay=0.01), validate_every=epochs)
    return train(network, data, parts, objective, training, validation_attack=ATTACK, seed=0, **more)


# --- (a), (d), (f): the cut


@pytest.mark.parametrize(("keep", "score"), [(0.5, "magnitude"), (0.05, "magnitude"), (0.1, "lamp")])
def test_without_a_pull_steering_is_training_and_the_cut_global_magnitude(keep, score, kind, make):
    _, model = make(kind)
    method = Deadwooding(keep, rho=0.0, score=score)
    assert isinstance(method, Steers) and isinstance(method, Recovers)
    steered, plain = method.steered(model), copy.deepcopy(model)
    assert torch.equal(steered(_x()), model(_x()))
    _train(steered, method.steering(PgdAt(ATTACK)), 2)
    _train(plain, PgdAt(ATTACK), 2)
    released = method.released(steered)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in released.state_dict().items())
    assert released.state_dict().keys() == plain.state_dict().keys()
    plan = method.plan(steered)
    assert plan.layers == MagnitudePruning(keep, score=score, floor=0.005).plan(plain).layers
    assert plan == method.plan(plain) and plan.method == "deadwooding"


@pytest.mark.parametrize("keep", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("floor", [0.0, 0.005])
def test_exactly_as_many_weights_are_left_as_asked_with_ties(keep, floor, make):
    _, model = make("plain")
    with torch.no_grad():
        deployed_layers(model)["features.3"].weight.fill_(0.01)
    method = Deadwooding(keep, floor=floor)
    pruned = method.plan(model).apply(model)
    total = sum(weight.numel() for weight in weights_of(model).values())
    assert sum(int((weight != 0).sum()) for weight in weights_of(pruned).values()) == round(keep * total)
    assert method.plan(model) == method.plan(copy.deepcopy(model))
    if floor and keep > 0.01:
        assert all(bool(weight.any()) for weight in weights_of(pruned).values())


def test_keeping_everything_changes_neither_loss_nor_training(kind, make):
    _, model = make(kind)
    method = Deadwooding(1.0, rho=1.0)
    steered, plain = method.steered(model), copy.deepcopy(model)
    records = [
        _train(network, objective, 2)
        for network, objective in ((steered, method.steering(PgdAt(ATTACK))), (plain, PgdAt(ATTACK)))
    ]
    for found, expected in zip(*records, strict=True):
        assert found["loss"] == expected["loss"] and found["residual"] == 0
    pruned = method.plan(steered).apply(method.released(steered))
    assert torch.equal(pruned.eval()(_x()), plain.eval()(_x()))


# --- (b): multipliers


def _wander(method, model, epochs=6, seed=0):
    """Objective calls at each epoch, with weights that move at random between them; what each epoch began with."""
    steered, chance = method.steered(model), torch.Generator().manual_seed(seed)
    objective, seen = method.steering(Standard()), []
    for epoch in range(epochs):
        layers, natural = _carriers(steered), Standard()(steered, _batch(), _state(epoch))[0].detach()
        for _ in range(2):  # the second changes nothing
            known = {name: layer.get_buffer(MULTIPLIER).clone() for name, layer in layers.items()}
            loss, metrics = objective(steered, _batch(), _state(epoch))
        assert all(torch.equal(known[name], layer.get_buffer(MULTIPLIER)) for name, layer in layers.items())
        penalty = sum(
            (layer.get_buffer(MULTIPLIER) * layer.weight.abs())[~layer.get_buffer(KEPT)].sum()
            if layer.get_buffer(MULTIPLIER).dim() else
            layer.get_buffer(MULTIPLIER) * layer.weight.abs()[~layer.get_buffer(KEPT)].sum()
            for layer in layers.values()
        )  # fmt: skip
        torch.testing.assert_close(loss.detach(), natural + penalty.detach())
        outside = sum(layer.weight.abs()[~layer.get_buffer(KEPT)].sum() for layer in layers.values())
        whole = sum(layer.weight.abs().sum() for layer in layers.values())
        torch.testing.assert_close(metrics["residual"], (outside / whole).detach())
        seen.append(
            {
                "multipliers": known,
                "kept": {name: layer.get_buffer(KEPT).clone() for name, layer in layers.items()},
                "weights": {name: layer.weight.detach().clone() for name, layer in layers.items()},
            }
        )
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.add_(torch.randn(layer.weight.shape, generator=chance) * 0.05)
        seen[-1]["after"] = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    return steered, seen


@pytest.mark.parametrize("reset", [False, True])
def test_multipliers_grow_by_what_is_outside_and_there_alone(reset, kind, make):
    _, model = make(kind)
    steered, seen = _wander(Deadwooding(0.3, 6, rho=0.6, reset=reset), model)
    selection, left = Selection(0.3, floor=0.005), 0
    for before, after in itertools.pairwise(seen):
        kept = selection(before["after"])
        for name, old in before["multipliers"].items():
            expected = old + 0.6 * before["after"][name].abs() * ~before["kept"][name]
            assert torch.equal(after["kept"][name], kept[name]), "the largest of the network, anew"
            left += int((kept[name] & (old > 0)).sum())
            if reset:
                expected[kept[name]] = 0
            else:
                assert bool((after["multipliers"][name] >= old).all())
            torch.testing.assert_close(after["multipliers"][name], expected)
    assert left, "some weights came back, else there is nothing to see"
    for name, multiplier in seen[-1]["multipliers"].items():
        always = torch.stack([epoch["kept"][name] for epoch in seen[:-1]]).all(0)
        never = torch.stack([~epoch["kept"][name] for epoch in seen]).all(0)
        assert not bool(multiplier[always].any()) and bool((multiplier[never] > 0).all())
        assert bool(always.any()) or bool(never.any())
    assert int(steered.get_buffer(EPOCH)) == 5


@pytest.mark.parametrize("multipliers", ["layer", "global"])
def test_one_multiplier_for_many_weights_grows_by_their_mean(multipliers, make):
    _, model = make("cells")
    _, seen = _wander(Deadwooding(0.3, 6, rho=0.6, multipliers=multipliers), model)
    for before, after in itertools.pairwise(seen):
        outside = {name: weight.abs()[~before["kept"][name]] for name, weight in before["after"].items()}
        for name, old in before["multipliers"].items():
            assert old.shape == ()
            group = outside[name] if multipliers == "layer" else torch.cat([*outside.values()])
            torch.testing.assert_close(after["multipliers"][name], old + 0.6 * group.mean() if len(group) else old)
    values = {float(value) for value in seen[-1]["multipliers"].values()}
    assert (len(values) == 1) == (multipliers == "global") and min(values) > 0


# --- (c): convergence


@pytest.mark.parametrize("multipliers", ["weight", "layer", "global"])
def test_of_a_quadratic_the_largest_entries_stay_and_the_others_vanish(multipliers):
    """min |theta - c|^2 / 2 with k non-zeros: c cut off at its k largest entries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)).double()
    wanted = [torch.randn(8, 10, dtype=torch.float64), 2 * torch.randn(8, 8, dtype=torch.float64)]
    method = Deadwooding(0.25, 40, rho=0.3 if multipliers == "weight" else 1.0, multipliers=multipliers, floor=0.0)
    steered = method.steered(model)

    def objective(network, batch, state):
        return sum((network[i].weight - c).square().sum() / 2 for i, c in enumerate(wanted)), {}

    parameters = [*steered.parameters()]
    residuals = []
    for epoch in range(40):
        for step in range(20):
            state, batch = _state(epoch), SimpleNamespace()
            _, gradients, metrics = gradients_of(method.steering(objective), steered, batch, state, parameters)
            rate = 0.2 * (1 - (20 * epoch + step) / 800) ** 2
            with torch.no_grad():
                for parameter, gradient in zip(parameters[:2], gradients, strict=False):
                    parameter -= rate * gradient
        residuals.append(float(metrics["residual"]))
    assert residuals[-1] < 0.004 < 0.2 < residuals[0]
    flat = torch.cat([c.flatten() for c in wanted])
    threshold = flat.abs().sort(descending=True).values[round(0.25 * 144) - 1]
    for layer, c in zip(method.released(steered), wanted, strict=False):
        largest = c.abs() >= threshold
        torch.testing.assert_close(layer.weight.detach(), c * largest, rtol=0, atol=0.01)
    plan = method.plan(steered)
    pruned = plan.apply(method.released(steered))
    assert all(torch.equal(pruned[i].weight != 0, c.abs() >= threshold) for i, c in enumerate(wanted))


# --- the objective that is steered


def test_gradients_are_those_of_the_objective_and_of_the_pull(kind, make):
    """Also of an objective with gradients of its own."""
    _, model = make(kind)
    perturbed = WeightPerturbation(PgdAt(ATTACK), gamma=0.05)
    for inner in (Standard(), PgdAt(ATTACK), perturbed):
        method = Deadwooding(0.3)
        steered = method.steered(model).train()
        with torch.no_grad():
            for layer in _carriers(steered).values():
                layer.get_buffer(MULTIPLIER).uniform_(0, 1)
        dense = copy.deepcopy(model).train()
        _, expected, _ = gradients_of(inner, dense, _batch(), _state(), [*dense.parameters()])
        parameters = dict(steered.named_parameters())
        _, found, _ = gradients_of(method.steering(inner), steered, _batch(), _state(), [*parameters.values()])
        pulls = {
            name + ".weight": layer.get_buffer(MULTIPLIER) * layer.weight.detach().sign() * ~layer.get_buffer(KEPT)
            for name, layer in _carriers(steered).items()
        }
        for name, ours, theirs in zip(parameters, found, expected, strict=True):
            pull = pulls.get(name)
            if theirs is None and pull is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, (0 if theirs is None else theirs) + (0 if pull is None else pull))


def test_steering_by_clean_images_is_asked_for():
    found = Deadwooding(0.3, natural=True).steering(PgdAt(ATTACK)).objective
    assert found == Standard() and Deadwooding(0.3).steering(PgdAt(ATTACK)).objective == PgdAt(ATTACK)


@pytest.mark.parametrize("multipliers", ["weight", "global"])
def test_steering_that_was_stopped_goes_on_to_the_same_network(multipliers, make, tmp_path):
    _, model = make("plain")
    method = Deadwooding(0.3, 4, multipliers=multipliers)
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


def test_a_pruned_network_is_pruned_further(kind, make):
    _, model = make(kind)
    pruned = MagnitudePruning(0.5).plan(model).apply(model)
    method = Deadwooding(0.2)
    steered = method.steered(pruned)
    _train(steered, method.steering(PgdAt(ATTACK)))
    for layer in _carriers(steered).values():
        mask = layer.parametrizations.weight[0].mask
        assert not bool(layer.get_buffer(MULTIPLIER)[mask == 0].any()), "nothing to draw to zero there"
        assert not bool((layer.get_buffer(KEPT) & (mask == 0)).any())
    released = method.released(steered)
    assert released.state_dict().keys() == pruned.state_dict().keys()
    again = method.plan(steered).apply(released)
    total = sum(weight.numel() for weight in weights_of(model).values())
    assert sum(int((weight != 0).sum()) for weight in weights_of(again).values()) == round(0.2 * total)


# --- recovery: (e), (i)


def test_the_recovery_is_its_formula(make):
    _, model = make("plain")
    _, parent = make("plain", weights_seed=4)
    method = Deadwooding(0.3, alpha=0.3, temperature=3.0, attack=ATTACK)
    objective = method.recovery(PgdAt(ATTACK), parent)
    assert objective.attack == Fgsm(ATTACK.threat_model, random_start=True)
    assert objective.attack.step == pytest.approx(1.25 * 0.05)
    model.train()
    batch = _batch()
    x_adv = objective.attack(model, batch.x, batch.y, generator=_state().attack_generator)
    assert float((x_adv - batch.x).abs().max()) <= 0.05 + 1e-6
    loss, metrics = objective(model, batch, _state())
    student, teacher = F.log_softmax(model(x_adv) / 3, 1), F.softmax(parent(batch.x) / 3, 1)
    divergence = (teacher * (teacher.log() - student)).sum(1).mean()
    labels = F.cross_entropy(model(x_adv), batch.y)
    torch.testing.assert_close(loss, 0.3 * labels + 0.7 * 9 * divergence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["divergence"], (9 * divergence).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["cross_entropy"], labels.detach())
    still = Deadwooding(0.3, alpha=0.0, attack=Pgd(ThreatModel("linf", 0.0))).recovery(PgdAt(ATTACK), parent)
    assert float(still(parent, batch, _state())[0].detach()) == pytest.approx(0, abs=1e-6), "nothing to learn of itself"
    assert Deadwooding(0.3, distil=False).recovery(PgdAt(ATTACK), parent) == PgdAt(ATTACK)
    assert Deadwooding(0.3, attack=ATTACK, fgsm=False).recovery(PgdAt(ATTACK), parent).attack == ATTACK
    with pytest.raises(InputError, match="fgsm = false"):
        Deadwooding(0.3, attack=lambda *_, **__: None).recovery(PgdAt(ATTACK), parent)


def test_another_method_of_fine_tuning_is_not_silently_left_out():
    table = {"name": "deadwooding", "fine_tune": {"method": {"name": "pgd_at"}}}
    makers = Makers(lambda: ATTACK, lambda *_: PgdAt(ATTACK))
    with pytest.raises(InputError, match="distil = false"):
        compress_from(table, Training(), "compress", makers)
    (step,) = compress_from({**table, "distil": False}, Training(), "compress", makers).steps
    assert step.objective == PgdAt(ATTACK) and step.method.attack == ATTACK
    assert step.method.recovery(step.objective, nn.Identity()) == step.objective


def test_the_parent_is_frozen_in_eval_mode_and_left_as_it_is(kind, make):
    _, model = make(kind)
    parent = copy.deepcopy(model)
    before = copy.deepcopy(parent.state_dict())
    method = Deadwooding(0.3, attack=ATTACK)
    pruned = method.plan(model).apply(model)
    objective = method.recovery(PgdAt(ATTACK), parent)
    assert isinstance(objective, RobustDistillation)
    loss, _ = objective(pruned.train(), _batch(), _state())
    loss.backward()
    assert any(parameter.grad is not None for parameter in pruned.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in parent.parameters())
    assert not any(module.training for module in parent.modules())
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())


def test_masks_survive_recovery_with_momentum_and_decay_and_files(kind, make, tmp_path):
    spec, model = make(kind)
    method = Deadwooding(0.2, attack=ATTACK)
    steered = method.steered(model)
    _train(steered, method.steering(PgdAt(ATTACK)))
    released, plan = method.released(steered), method.plan(steered)
    network = plan.apply(released)
    zeros = {name: weight == 0 for name, weight in weights_of(network).items()}
    originals = {name: layer.parametrizations.weight.original.detach().clone()
                 for name, layer in deployed_layers(network).items() if parametrize.is_parametrized(layer)}  # fmt: skip
    _train(network, method.recovery(PgdAt(ATTACK), copy.deepcopy(model)))
    for name, zero in zeros.items():
        layer = deployed_layers(network)[name]
        assert torch.equal(layer.weight == 0, zero)
        assert not torch.equal(layer.parametrizations.weight.original, originals[name]), "what is masked decays unseen"
    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))
    assert again == plan
    save_model(with_plan(spec, again), network.eval(), tmp_path)
    assert torch.equal(load_model(tmp_path)[1](_x()), network(_x()))
    with pytest.raises(InputError, match="another network"):
        plan.apply(make("cells" if kind == "plain" else "plain")[1])


def test_ensembles_are_planned_network_by_network(make):
    spec, _ = make("plain")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ensemble = MeanOfParticles(2).predictor(spec.build).eval()
    plan = plan_for(Deadwooding(0.3, epochs=0), ensemble)
    assert {layer.name.split(".")[1] for layer in plan.layers} == {"0", "1"}
    assert not torch.allclose(plan.apply(ensemble)(_x()), ensemble(_x()))


def test_wrong_settings_are_refused():
    for wrong in (
        {"keep": 0.0}, {"keep": 1.5}, {"epochs": -1}, {"rho": -1.0}, {"rho": float("inf")}, {"rho": float("nan")},
        {"multipliers": "channel"}, {"reset": True, "multipliers": "layer"}, {"score": "l2"}, {"floor": 0.5},
        {"alpha": 1.1}, {"temperature": 0.0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Deadwooding(**wrong)
    for ask in (Deadwooding().plan, Deadwooding().steered):
        with pytest.raises(InputError, match="no layer"):
            ask(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


# --- (h): on a real network


def test_the_residual_falls_and_the_cut_costs_little():
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

    method = Deadwooding(0.15, 6)
    steered = method.steered(model)
    records = train(steered, data, parts, method.steering(PgdAt(ATTACK)), settings, **more)
    residuals = [record["residual"] for record in records]
    assert all(later < earlier for earlier, later in itertools.pairwise(residuals))
    assert residuals[-1] < 0.15 < 0.5 < residuals[0]
    cut = accuracies(method.plan(steered).apply(method.released(steered)))
    unsteered = accuracies(method.plan(model).apply(model))
    assert cut[0] > 0.8 and all(a > b + 0.2 for a, b in zip(cut, unsteered, strict=True))
