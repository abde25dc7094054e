"""CSTAR: a budget met, the function of projected weights, and training that ends where projection loses little."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.pgd import Pgd
from nas.compression.cstar import DUAL, EPOCH, RANKS, TARGET, Cstar
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.plan import LayerPlan, Plan, Recovers, Steers, plan_for
from nas.compression.tucker import low_rank, parameters_of
from nas.data.digits import Digits
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.defences.noise import ImageNoise
from nas.errors import InputError
from nas.model_file import ModelSpec, load_model, save_model, with_plan
from nas.objective import Batch, State, gradients_of
from nas.optimisation import Sgd
from nas.prediction import MeanOfParticles, MeanOverNoise
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.weight_perturbation import WeightPerturbation
from search_spaces.genotype import StageGenotype


class Stopped(Exception):
    pass


def _x(n=6, seed=0, channels=1, size=8):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def _replaced(plan):
    return {layer.name: tuple(layer.data["ranks"]) for layer in plan.layers if layer.action == "replaced"}


def _projected(model, plan):
    """A dense copy of ``model`` whose weights have the ranks of the plan: what its factors mean."""
    dense = copy.deepcopy(model)
    layers = deployed_layers(dense)
    with torch.no_grad():
        for name, ranks in _replaced(plan).items():
            layers[name].weight.copy_(low_rank(layers[name].weight, ranks))
    return dense


def _skipped(plan):
    return {layer.name: layer.reason for layer in plan.layers if layer.action == "skipped"}


def _state(epoch=0, epochs=10, step=0):
    return State(epoch, step, epoch / epochs, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))


@pytest.fixture
def plain():
    """A network with room for ranks, and what it is made of."""
    spec = ModelSpec(StageGenotype("plain", (2, 1), (8, 12)), 1, 1, (1, 8, 8), ("a", "b", "c"), (0.4,), (0.25,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build()
        model.train()(_x(32))
    return spec, model.eval()


# --- the plan


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.5])
def test_the_budget_is_met_by_the_numbers_that_the_layers_really_hold(keep, kind, make):
    _, model = make(kind)
    plan = Cstar(keep).plan(model)
    layers, compressed = deployed_layers(model), Cstar(keep).plan(model).apply(model)
    fixed = ("first convolution", "classifier", "depthwise", "no factors")
    competing = [layer.name for layer in plan.layers if not layer.reason.startswith(fixed)]
    before = sum(layers[name].weight.numel() for name in competing)
    after = sum(
        parameter.numel()
        for name in competing
        for key, parameter in compressed.get_submodule(name).named_parameters()
        if key.endswith("weight")
    )
    assert 0 < after <= keep * before
    saved = before - after
    count = [sum(p.numel() for p in network.parameters()) for network in (model, compressed)]
    assert count[0] - count[1] == saved, "nothing else changes"


def test_every_layer_is_named_with_action_and_reason(kind, make):
    _, model = make(kind)
    plan = Cstar(0.5).plan(model)
    layers = deployed_layers(model)
    assert [layer.name for layer in plan.layers] == list(layers), "all layers, in order, no auxiliary head"
    skipped = _skipped(plan)
    assert skipped["stem.0" if kind == "cells" else "features.0"] == "first convolution"
    assert skipped["classifier"] == "classifier"
    for layer in plan.layers:
        shape = layers[layer.name].weight.shape
        if layer.action == "replaced":
            ranks = tuple(layer.data["ranks"])
            assert parameters_of(shape, ranks) < shape.numel()
            assert layer.reason.endswith(f": {parameters_of(shape, ranks)} numbers for {shape.numel()}")
        else:
            assert layer.action == "skipped" and not layer.data
    if kind == "cells":
        depthwise = [n for n, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
        assert depthwise and all(skipped[name].startswith("depthwise") for name in depthwise)
        assert all(len(ranks) == 1 for ranks in _replaced(plan).values()), "only 1x1 convolutions are left"
        tiny = [n for n, layer in layers.items() if layer.weight.shape[:2] == (2, 2)]
        assert tiny and all(skipped[name].startswith("no factors of rank 1") for name in tiny)


def test_the_compressed_network_is_that_of_the_projected_weights(kind, make):
    _, model = make(kind)
    state = copy.deepcopy(model.state_dict())
    plan = Cstar(0.5).plan(model)
    compressed, dense = plan.apply(model), _projected(model, plan)
    for mode in (False, True):
        torch.testing.assert_close(compressed.train(mode)(_x()), dense.train(mode)(_x()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(compressed.eval()(_x()), model(_x()), atol=1e-3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "left alone"


def test_keeping_everything_changes_nothing(kind, make):
    _, model = make(kind)
    plan = Cstar(1.0).plan(model)
    assert not _replaced(plan)
    assert torch.equal(plan.apply(model)(_x()), model(_x()))


def test_a_smaller_share_never_holds_more_and_never_fits_better(plain):
    _, model = plain
    sizes, errors, layers = [], [], deployed_layers(model)
    for keep in (1.0, 0.8, 0.6, 0.4, 0.2):
        plan = Cstar(keep).plan(model)
        sizes.append(sum(p.numel() for p in plan.apply(model).parameters()))
        projected = deployed_layers(_projected(model, plan))
        errors.append(
            sum(float(((layers[n].weight - projected[n].weight).norm() / layers[n].weight.norm()).detach())
                for n in layers)
        )  # fmt: skip
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    assert errors == sorted(errors) and errors[0] == 0


def test_least_rank_and_step_are_kept(plain):
    _, model = plain
    found = _replaced(Cstar(0.5, min_rank=3, step=4).plan(model))
    layers = deployed_layers(model)
    assert found
    for name, ranks in found.items():
        for rank, full in zip(ranks, layers[name].weight.shape[:2], strict=True):
            assert rank >= 3 and (rank in (3, full) or rank % 4 == 0)


def test_a_share_below_what_the_least_ranks_leave_is_refused_with_the_possible_one(plain):
    _, model = plain
    with pytest.raises(InputError, match="keep at least") as error:
        Cstar(0.05, min_rank=2).plan(model)
    least = float(str(error.value).split("keep at least ")[1].split(",")[0])
    assert Cstar(least, min_rank=2).plan(model)
    with pytest.raises(InputError, match="keep at least"):
        Cstar(least - 0.001, min_rank=2).plan(model)
    with pytest.raises(InputError, match="no layer"):
        Cstar(0.5).plan(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_wrong_settings_are_refused():
    wrong = [{"keep": 0.0}, {"keep": 1.01}, {"keep": float("nan")}, {"epochs": -1}, {"rho": -1.0}, {"min_rank": 0}]
    for settings in (*wrong, {"rho": float("nan")}, {"rho": float("inf")}, {"step": 0}):
        with pytest.raises(InputError):
            Cstar(**settings)


class _Odd(nn.Module):
    """Layers that cannot be replaced, beside one that can."""

    def __init__(self):
        super().__init__()

        class Scaled(nn.Conv2d):
            def forward(self, x):
                return 2 * super().forward(x)

        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.own = Scaled(8, 8, 3, padding=1)
        self.once = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.once
        self.tied = nn.Conv2d(8, 8, 1)
        self.other = nn.Conv2d(8, 8, 1)
        self.other.weight = self.tied.weight
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.again(self.once(self.own(self.grouped(self.first(x)))))
        x = self.other(self.tied(x)).flatten(2).transpose(1, 2)
        return self.last(self.middle(self.encoder(x)).mean(1))


def test_layers_that_cannot_be_replaced_are_named_with_the_reason():
    torch.manual_seed(0)
    model = _Odd().eval()
    plan = Cstar(0.2).plan(model)
    skipped = _skipped(plan)
    assert skipped["grouped"] == "grouped convolution"
    assert skipped["own"] == "Scaled has a forward pass of its own"
    assert skipped["tied"] == skipped["other"] == "shares its weight with another layer"
    assert "TransformerEncoderLayer reads its weight" in skipped["encoder.linear1"]
    assert "MultiheadAttention reads its weight" in skipped["encoder.self_attn.out_proj"]
    compressed = plan.apply(model)
    assert set(_replaced(plan)) == {"once", "middle"}
    assert compressed.again is compressed.once, "one module, used twice, is replaced in both places"
    x = _x(channels=3)
    torch.testing.assert_close(compressed(x), _projected(model, plan)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "space, depths, widths, keep", [("resnet", (1, 1), (16, 24), 0.3), ("vgg", (1, 1, 1), (8, 16, 8), 0.15)]
)
def test_residual_and_vgg_networks(space, depths, widths, keep):
    spec = ModelSpec(StageGenotype(space, depths, widths), 1, 1, (3, 8, 8), ("a", "b"), (0.4,) * 3, (0.2,) * 3)
    torch.manual_seed(0)
    model = spec.build().eval()
    plan = Cstar(keep).plan(model)
    kinds = {len(ranks) for ranks in _replaced(plan).values()}
    assert kinds == {1, 2}, "convolutions and, as matrices, shortcuts or linear layers"
    x = _x(channels=3)
    torch.testing.assert_close(plan.apply(model)(x), _projected(model, plan)(x), rtol=1e-3, atol=1e-5)


def test_vision_transformer():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10).eval()
    nn.init.normal_(model.heads.head.weight)
    plan = Cstar(0.5).plan(model)
    skipped = _skipped(plan)
    assert skipped["conv_proj"] == "first convolution" and skipped["heads.head"] == "classifier"
    assert sum("MultiheadAttention" in reason for reason in skipped.values()) == 2
    assert len(_replaced(plan)) == 4 and all(".mlp." in name for name in _replaced(plan))
    x = _x(2, channels=3, size=32)
    torch.testing.assert_close(plan.apply(model)(x), _projected(model, plan)(x), rtol=1e-3, atol=1e-5)


# --- the network


def test_kernels_and_torch_agree_on_outputs_and_input_gradients(make, monkeypatch):
    _, model = make("cells")
    compressed = Cstar(0.5).plan(model).apply(model).eval()

    def evaluated():
        x = _x(8).requires_grad_()
        y = compressed(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    ours = evaluated()
    monkeypatch.setenv("DSARA_NATIVE", "0")
    for mine, theirs in zip(ours, evaluated(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_saved_network_is_the_same_when_loaded(kind, make, tmp_path):
    spec, model = make(kind)
    plan = Cstar(0.5).plan(model)
    assert Plan.from_data(json.loads(json.dumps(plan.to_data()))) == plan
    compressed = plan.apply(model)
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.add_(0.01)  # as if fine-tuned: weights come from the file, not from the plan
    save_model(with_plan(spec, plan), compressed, tmp_path)
    again_spec, again = load_model(tmp_path)
    assert again_spec.plans == (plan,)
    assert torch.equal(again(_x()), compressed.eval()(_x()))


def test_a_plan_gives_the_same_network_each_time(plain):
    _, model = plain
    plan = Cstar(0.5).plan(model)
    first, second = plan.apply(model), plan.apply(model)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    fresh = plan.apply(model, fit=False)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in first.named_parameters()}
    name = next(iter(_replaced(plan)))
    assert not torch.equal(fresh.get_submodule(name)[0].weight, first.get_submodule(name)[0].weight)


def test_the_compressed_network_exports(plain):
    _, model = plain
    compressed = Cstar(0.5).plan(model).apply(model)
    exported = torch.export.export(compressed, (_x(3),)).module()
    torch.testing.assert_close(exported(_x(3)), compressed(_x(3)), rtol=1e-5, atol=1e-6)


def test_every_factor_is_trained(plain):
    _, model = plain
    compressed = Cstar(0.5).plan(model).apply(model).train()
    F.cross_entropy(compressed(_x()), torch.arange(6) % 3).backward()
    assert all(bool(parameter.grad.any()) for parameter in compressed.parameters())


def test_masks_and_ranks_compose_in_both_orders(plain, tmp_path):
    spec, model = plain
    pruning = MagnitudePruning(0.5).plan(model)
    pruned = pruning.apply(model)
    plan = Cstar(0.6).plan(pruned)
    both = plan.apply(pruned)
    for name, ranks in _replaced(plan).items():
        weight = deployed_layers(pruned)[name].weight
        assert bool((weight == 0).any())
        core = both.get_submodule(name)
        dense = nn.Sequential(nn.Conv2d(*weight.shape[1::-1], 3, padding=1, bias=False))
        dense[0].weight = nn.Parameter(low_rank(weight, ranks).detach())
        x = torch.rand(1, weight.shape[1], 5, 5)
        core[1].stride = (1, 1)
        torch.testing.assert_close(core(x), dense(x), rtol=1e-4, atol=1e-5)
    both = plan.apply(pruned)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    save_model(with_plan(with_plan(spec, pruning), plan), both, tmp_path / "a")
    assert torch.equal(load_model(tmp_path / "a")[1](_x()), both(_x()))
    factored = plan.apply(model)
    later = MagnitudePruning(0.5).plan(factored)
    other = later.apply(factored)
    assert any(layer.name.endswith(".1") and layer.action == "masked" for layer in later.layers), "factors compete"
    save_model(with_plan(with_plan(spec, plan), later), other, tmp_path / "b")
    assert torch.equal(load_model(tmp_path / "b")[1](_x()), other(_x()))


def test_networks_of_an_ensemble_are_compressed_each(plain):
    spec, _ = plain
    for prediction in (MeanOverNoise(ImageNoise(0.1), 2), MeanOfParticles(2)):
        torch.manual_seed(0)
        model = dataclasses.replace(spec, prediction=prediction).build().eval()
        plan = plan_for(Cstar(0.5), model)
        compressed = plan.apply(model)
        assert len(_replaced(plan)) == 2 * prediction.count if isinstance(prediction, MeanOfParticles) else 2
        assert sum(p.numel() for p in compressed.parameters()) < sum(p.numel() for p in model.parameters())
        assert compressed(_x()).shape == (6, 3)


def _with(plan, **data):
    """The plan with entries of its first factorised layer replaced."""
    index = next(i for i, layer in enumerate(plan.layers) if layer.action == "replaced")
    layer = plan.layers[index]
    changed = LayerPlan(layer.name, layer.action, layer.reason, {**layer.data, **data})
    return Plan(plan.method, (*plan.layers[:index], changed, *plan.layers[index + 1 :]))


@pytest.mark.parametrize(
    "data",
    [
        {"ranks": None}, {"ranks": 3}, {"ranks": []}, {"ranks": [3]}, {"ranks": [3, 3, 3]}, {"ranks": "33"},
        {"ranks": [0, 3]}, {"ranks": [-1, 3]}, {"ranks": [9, 3]}, {"ranks": [3, 10**12]}, {"ranks": [True, 3]},
        {"ranks": [2.5, 3]}, {"ranks": {"0": 3, "1": 3}}, {"ranks": ["3", "3"]}, {"shape": None}, {"shape": [8, 8]},
        {"shape": [8, 8, 3, 5]}, {"shape": "8833"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("fit", [True, False])
def test_damaged_plans_are_input_errors(data, fit, plain):
    _, model = plain
    plan = Cstar(0.5).plan(model)
    assert plan.apply(model, fit=fit)
    with pytest.raises(InputError):
        _with(plan, **data).apply(model, fit=fit)


def test_plans_of_another_network_are_input_errors(make, plain):
    plans = {kind: Cstar(0.5).plan(make(kind)[1]) for kind in ("cells", "plain")}
    for kind, other in (("cells", "plain"), ("plain", "cells")):
        with pytest.raises(InputError, match="another network"):
            plans[kind].apply(make(other)[1])
    _, model = plain
    plan = Cstar(0.5).plan(model)
    with pytest.raises(InputError, match="no layer"):
        Plan("cstar", (*plan.layers, *plan.layers)).apply(model)  # a layer cannot be replaced twice
    grouped = copy.deepcopy(model)
    grouped.features[3] = nn.Conv2d(16, 8, 3, padding=1, groups=2)
    with pytest.raises(InputError, match="another network"):
        plan.apply(grouped)


# --- steering


def test_steered_networks_carry_the_projection_and_release_an_ordinary_one(kind, make):
    _, model = make(kind)
    before = copy.deepcopy(model.state_dict())
    method = Cstar(0.5)
    assert isinstance(method, Steers) and not isinstance(method, Recovers)
    steered = method.steered(model)
    plan = method.plan(model)
    assert method.plan(steered) == plan, "the ranks of the beginning are those of the weights"
    layers = deployed_layers(steered)
    for name, ranks in _replaced(plan).items():
        assert torch.equal(layers[name].get_buffer(TARGET), low_rank(layers[name].weight.detach(), ranks))
        assert not bool(layers[name].get_buffer(DUAL).any())
    assert torch.equal(steered(_x()), model(_x()))
    released = method.released(steered)
    assert released.state_dict().keys() == before.keys()
    dense = _projected(model, plan)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in released.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {TARGET, DUAL, RANKS} <= {key.rpartition(".")[2] for key in steered.state_dict()}, "all in checkpoints"
    factored = plan.apply(released)
    torch.testing.assert_close(factored(_x()), released(_x()), rtol=1e-4, atol=1e-5)


def test_steps_of_projection_multipliers_and_penalty(plain):
    """Spelt out: Z := P(W + U), U += W - Z at a new epoch only; ranks stand after half; rho 5 times, U a fifth."""
    _, model = plain
    method = Cstar(0.4, epochs=10, rho=0.2)
    steered = method.steered(model)
    layers = {n: layer for n, layer in deployed_layers(steered).items() if hasattr(layer, TARGET)}
    objective = method.steering(Standard())
    batch = Batch(_x(), torch.arange(6) % 3, torch.arange(6))
    chance = torch.Generator().manual_seed(0)
    seen = []
    for epoch in range(10):
        known = {n: (layer.weight.detach().clone(), layer.get_buffer(DUAL).clone()) for n, layer in layers.items()}
        buffers = {n: layer.get_buffer(TARGET).clone() for n, layer in layers.items()}
        objective(steered, batch, _state(epoch, step=2 * epoch))
        after = {n: layer.get_buffer(TARGET).clone() for n, layer in layers.items()}
        loss, metrics = objective(steered, batch, _state(epoch, step=2 * epoch + 1))
        assert all(torch.equal(layers[n].get_buffer(TARGET), z) for n, z in after.items()), "once an epoch"
        plan = _replaced(method.plan(steered))
        for name, (w, u) in known.items():
            z, dual = layers[name].get_buffer(TARGET), layers[name].get_buffer(DUAL)
            if epoch == 0:
                assert torch.equal(z, buffers[name]) and torch.equal(dual, u)
                continue
            expected = low_rank(w + u, plan[name]) if name in plan else w + u
            torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(dual, (u + w - expected) / (5 if epoch == 9 else 1), rtol=1e-4, atol=1e-6)
        pulled = sum((la.weight - la.get_buffer(TARGET) + la.get_buffer(DUAL)).square().sum() for la in layers.values())
        natural, _ = Standard()(steered, batch, _state())
        torch.testing.assert_close(loss, natural + (1.0 if epoch == 9 else 0.2) / 2 * pulled)
        apart = torch.cat([(layer.weight - layer.get_buffer(TARGET)).flatten() for layer in layers.values()]).norm()
        size = torch.cat([layer.weight.flatten() for layer in layers.values()]).norm()
        torch.testing.assert_close(metrics["low_rank_gap"], (apart / size).detach())
        seen.append(plan)
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.add_(torch.randn(layer.weight.shape, generator=chance) * 0.2)
    assert len({str(plan) for plan in seen[:5]}) > 1, "chosen anew"
    assert len({str(plan) for plan in seen[5:]}) == 1, "frozen"
    assert int(steered.get_buffer(EPOCH)) == 9
    final = deployed_layers(method.released(steered))
    for name, ranks in seen[-1].items():  # weights moved since: what is released is projected once more
        expected = low_rank((layers[name].weight + layers[name].get_buffer(DUAL)).detach(), ranks)
        torch.testing.assert_close(final[name].weight, expected, rtol=0, atol=0)
    sizes = {n: layer.weight.numel() for n, layer in layers.items()}
    held = sum(parameters_of(layers[n].weight.shape, seen[-1][n]) if n in seen[-1] else sizes[n] for n in sizes)
    assert held <= 0.4 * sum(sizes.values())


@pytest.mark.parametrize("objective", [Standard(), PgdAt(Pgd(ThreatModel("linf", 0.1), steps=2)), "perturbed"], ids=str)
def test_without_a_pull_the_gradients_are_those_of_the_objective(objective, plain):
    if objective == "perturbed":  # gradients of its own: taken as they are, and added to
        objective = WeightPerturbation(PgdAt(Pgd(ThreatModel("linf", 0.1), steps=1)), gamma=0.05)
    _, model = plain
    batch = Batch(_x(), torch.arange(6) % 3, torch.arange(6))

    def gradients(network, objective):
        parameters = [*network.train().parameters()]
        return gradients_of(objective, network, batch, _state(), parameters)[:2]

    expected_loss, expected = gradients(copy.deepcopy(model), objective)
    for rho, gap in ((0.0, 0.0), (2.0, 2.0)):
        method = Cstar(0.4, rho=rho)
        steered = method.steered(model)
        loss, found = gradients(steered, method.steering(objective))
        pulled = {id(la.weight): la.weight - la.get_buffer(TARGET) for la in deployed_layers(steered).values()
                  if hasattr(la, TARGET)}  # fmt: skip
        pulls = [gap * pulled.get(id(parameter), torch.zeros(())) for parameter in steered.parameters()]
        for ours, theirs, pull in zip(found, expected, pulls, strict=True):
            torch.testing.assert_close(ours, theirs + pull, rtol=1e-5, atol=1e-6)
        assert (float(loss) > float(expected_loss) + 1e-3) == (rho > 0)
        if not rho:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_multipliers_reach_the_best_low_rank_matrix_of_a_quadratic():
    """min |W - A|^2 / 2 under a rank: W and Z meet, in the matrix of Eckart and Young."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12, bias=False), nn.Linear(12, 2)).double()
    wanted = torch.randn(12, 10, dtype=torch.float64)
    method = Cstar(0.6, epochs=60, rho=1.0)
    steered = method.steered(model)

    def objective(network, batch, state):
        return (network[0].weight - wanted).square().sum() / 2, {}

    parameters, gaps = [*steered.parameters()], []
    for epoch in range(60):
        for _ in range(20):
            state, batch = _state(epoch, 60), SimpleNamespace()
            _, gradients, metrics = gradients_of(method.steering(objective), steered, batch, state, parameters)
            with torch.no_grad():
                parameters[0] -= 0.2 * gradients[0]
        gaps.append(float(metrics["low_rank_gap"]))
    assert gaps[-1] < 1e-6 < 0.1 < gaps[0]
    (rank,) = _replaced(method.plan(steered))["0"]
    assert rank == 3
    weight = method.released(steered)[0].weight
    torch.testing.assert_close(weight, low_rank(wanted, (rank,)), rtol=0, atol=1e-5)


def test_a_pruned_network_is_steered_by_what_it_computes_with_and_released_without_masks(plain, tmp_path):
    spec, model = plain
    pruning = MagnitudePruning(0.5).plan(model)
    pruned = pruning.apply(model)
    method = Cstar(0.3)
    steered = method.steered(pruned)
    objective, batch = method.steering(Standard()), Batch(_x(), torch.arange(6) % 3, torch.arange(6))
    parameters = [*steered.parameters()]
    _, gradients, _ = gradients_of(objective, steered, batch, _state(), parameters)
    layers = deployed_layers(steered)
    found = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
    plan = method.plan(steered)
    for name, ranks in _replaced(plan).items():
        parts = layers[name].parametrizations.weight
        assert torch.equal(layers[name].get_buffer(TARGET), low_rank(layers[name].weight.detach(), ranks))
        assert not bool(found[id(parts.original)][parts[0].mask == 0].any())
    released = method.released(steered)
    for name, layer in deployed_layers(released).items():
        if name in _replaced(plan):
            assert not parametrize.is_parametrized(layer)
            assert torch.equal(layer.weight, layers[name].get_buffer(TARGET))
    factored = plan.apply(released)
    torch.testing.assert_close(factored(_x()), released(_x()), rtol=1e-4, atol=1e-5)
    save_model(with_plan(with_plan(spec, pruning), plan), factored, tmp_path)
    assert torch.equal(load_model(tmp_path)[1](_x()), factored(_x()))


def _noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 1, 8, 8), generator=generator).to(torch.uint8)
    return ImageData("noise", x, torch.arange(40) % 3, x[:4], torch.arange(4) % 3, ("a", "b", "c"))


def test_steering_that_was_stopped_goes_on_to_the_same_network(plain, tmp_path):
    _, model = plain
    data, attack = _noise(), Pgd(ThreatModel("linf", 0.05), steps=1)
    parts = split(data.y_train, architecture=0.0, validation=0.2, seed=0)
    method = Cstar(0.5, epochs=4, rho=1.0)
    arguments = data, parts, method.steering(PgdAt(attack)), Training(epochs=4, batch_size=16, optimiser=Sgd(0.05))
    more = {"validation_attack": attack, "seed": 0}
    through, interrupted = method.steered(model), method.steered(model)
    train(through, *arguments, **more)

    def stop(record):
        if record["epoch"] == 2:
            raise Stopped

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        train(interrupted, *arguments, **more, checkpoint=path, log=stop)
    interrupted = method.steered(model)
    train(interrupted, *arguments, **more, checkpoint=path)
    for name, value in interrupted.state_dict().items():
        assert torch.equal(value, through.state_dict()[name]), name


def test_after_steering_the_projection_costs_less_than_a_point():
    """Before any fine-tuning; as it is, the same share costs many points. Robust accuracy likewise."""
    data = Digits()()
    parts = split(data.y_train, architecture=0.0, validation=0.15, seed=0)
    spec = ModelSpec(StageGenotype("plain", (1, 2), (12, 16)), 1, 1, data.input_shape, data.classes, (0.3,), (0.35,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build()
    attack = Pgd(ThreatModel("linf", 0.05), steps=1)
    more = {"validation_attack": attack, "seed": 0}
    settings = Training(epochs=6, batch_size=64, optimiser=Sgd(0.1), validate_every=6)
    train(model, data, parts, PgdAt(attack), settings, **more)
    images, robust = data.x_test.float() / 255, Pgd(ThreatModel("linf", 0.05), steps=5)

    def accuracies(network):
        x_adv = robust(network.eval(), images, data.y_test, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return [float((network(x).argmax(1) == data.y_test).float().mean()) for x in (images, x_adv)]

    method = Cstar(0.3, epochs=12, rho=1.0)
    steered = method.steered(model)
    settings = dataclasses.replace(settings, epochs=12, validate_every=12, optimiser=Sgd(0.05))
    records = train(steered, data, parts, method.steering(PgdAt(attack)), settings, **more)
    assert records[-1]["low_rank_gap"] < 0.1 < records[0]["low_rank_gap"]
    steered.eval()
    plan, released = method.plan(steered), method.released(steered)
    factored = plan.apply(released)
    as_it_is = Cstar(0.3, epochs=0).plan(model).apply(model)
    dense, low, unsteered = accuracies(steered), accuracies(factored), accuracies(as_it_is)
    for before, after, without in zip(dense, low, unsteered, strict=True):
        assert after >= before - 0.01
        assert without <= before - 0.1
    assert sum(p.numel() for p in factored.parameters()) <= sum(p.numel() for p in as_it_is.parameters()) * 1.05
