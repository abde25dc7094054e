"""Sparta: known functions at first, a gate that sees a neighbourhood and nothing else, parameters that move house."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nas.activations.sparta import SATURATED, Gate, Sparta, gates, openness
from nas.activations.transfer import (
    activation_parameters,
    activation_state,
    freeze_activation,
    load_activation,
    save_activation,
)
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.evaluation.model_checks import gates_open
from nas.evaluation.suspicion import Case
from nas.model_file import save_model
from nas.optimisation import Sgd
from nas.prediction import MeanOfParticles
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.standard import Standard
from search_spaces.genotype import StageGenotype

KINDS = ["dw", "dw-pw", "shared", "pool", "pointwise"]
SPATIAL = ["dw", "dw-pw", "shared", "pool"]


def _maps(channels=8, size=7, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, channels, size, size, generator=generator, dtype=dtype)


def _gate(kind="dw", channels=8, seed=0, dtype=torch.float64, **settings):
    """With parameters that have left their beginning."""
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(Sparta(kind=kind, **settings), channels).to(dtype)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return gate


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_silu_or_as_relu(kind):
    x = _maps()
    soft = Gate(Sparta(kind=kind), 8)(x)
    assert torch.equal(soft, x * torch.sigmoid(x))
    assert torch.allclose(soft, F.silu(x), rtol=1e-6, atol=1e-7)  # that is fused, and rounds once less
    assert torch.equal(Gate(Sparta(kind=kind, gate="relu"), 8)(x), F.relu(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_beta_comes_near_relu(kind):
    x = torch.linspace(-5, 5, 100_001).view(1, 1, 1, -1).expand(1, 8, 1, -1)
    worst = float((Gate(Sparta(kind=kind, beta=20.0), 8)(x) - F.relu(x)).detach().abs().max())
    assert worst == pytest.approx(0.2785 / 20, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_only_neighbours_within_the_kernel_change_an_output(kind, kernel):
    gate, x = _gate(kind, kernel=kernel), _maps(dtype=torch.float64)
    reach = {"pool": 1, "pointwise": 0}.get(kind, kernel // 2)
    before = gate(x)
    for row in range(7):
        for column in range(7):
            moved = x.clone()
            moved[:, :, row, column] += 0.5
            changed = bool((gate(moved) != before)[:, :, 3, 3].any())
            assert changed == (max(abs(row - 3), abs(column - 3)) <= reach), (row, column)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_parameters_of_a_gate(kind, channels):
    gate = Gate(Sparta(kind=kind), channels)
    narrow = max(1, channels // 8)
    expected = {
        "dw": channels * 11, "pointwise": channels * 11, "shared": 11, "pool": channels * (channels + 2),
        "dw-pw": channels * 11 + 2 * channels * narrow,
    }  # fmt: skip
    assert sum(p.numel() for p in gate.parameters()) == expected[kind]


@pytest.mark.parametrize("gate", ["soft", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_true_and_finite(kind, gate):
    module = _gate(kind, channels=3, gate=gate)
    x = _maps(3, 4, torch.float64).requires_grad_(True)
    parameters = dict(module.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), atol=1e-6)
    extreme = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e-30]).repeat(3).view(1, 3, 5, 1).requires_grad_(True)
    single = copy.deepcopy(module).float()
    gradients = torch.autograd.grad(single(extreme).sum(), [extreme, *single.parameters()])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_from_the_first_steps(kind):
    """Zeros at the beginning must not hold one another there."""
    module = Gate(Sparta(kind=kind), 8)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    before = copy.deepcopy(module.state_dict())
    for _ in range(2):
        loss = (module(_maps()) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert not any(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_one_pixel_vectors_and_tokens(kind):
    gate = _gate(kind)
    x = _maps(dtype=torch.float64)
    pixel = x[:, :, :1, :1]
    assert torch.equal(gate(pixel[:, :, 0, 0]), gate(pixel)[:, :, 0, 0])
    tokens = x.flatten(2).transpose(1, 2)
    expected = gate(x).flatten(2).transpose(1, 2)
    assert torch.allclose(gate(tokens), expected, atol=1e-12)
    first = _maps(size=1, dtype=torch.float64, seed=3)
    classed = torch.cat([first.flatten(2).transpose(1, 2), tokens], 1)
    assert torch.allclose(gate(classed)[:, 1:], expected, atol=1e-12)
    assert torch.allclose(gate(classed)[:, 0], gate(first)[:, :, 0, 0], atol=1e-12)
    with pytest.raises(InputError, match="square map"):
        gate(tokens[:, :-2])


def test_saturated_gates_are_told(spec_of, build):
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(40, dtype=torch.int64)
    model = build(spec_of("plain", Sparta()))

    def check():
        all_ = torch.ones(40, dtype=torch.bool)
        return gates_open(Case(model, x, y, all_, all_, ThreatModel(epsilon=0.1), 0))

    assert [line.verdict for line in check()] == ["pass"]
    with torch.no_grad(), openness(model) as found:
        model(x)
    assert all(SATURATED < value <= 0.25 for value in found.values())
    with torch.no_grad():
        next(iter(gates(model).values())).bias.fill_(30.0)
    (line,) = check()
    assert line.verdict == "fail" and next(iter(found)) in line.detail
    model = build(spec_of("plain"))
    assert check() == []


# Parameters of activations by themselves


def _bytes(model):
    return {name: tensor.clone() for name, tensor in activation_state(model).items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", ["file", "folder"])
@pytest.mark.parametrize("settings", [{}, {"kind": "dw-pw"}, {"kind": "pool", "gate": "relu"}])
def test_parameters_move_into_a_deeper_network(way, settings, spec_of, build, stir, tmp_path):
    activation = Sparta(**settings)
    source = stir(build(spec_of("resnet", activation)))
    if way == "file":
        save_activation(source, tmp_path / "phi.safetensors")
        place = tmp_path / "phi.safetensors"
    else:
        save_model(spec_of("resnet", activation), source, tmp_path)
        place = tmp_path
    deeper = build(spec_of(activation=activation, genotype=StageGenotype("resnet", (3, 2), (4, 6))), seed=5)
    weights = {name: t.clone() for name, t in deeper.state_dict().items() if ".own." not in name}
    assert not _same(_bytes(deeper), _bytes(source))
    load_activation(deeper, place)
    assert _same(_bytes(deeper), _bytes(source))
    assert all(torch.equal(deeper.state_dict()[name], tensor) for name, tensor in weights.items())


def test_parameters_of_other_widths_are_refused_unless_shared(spec_of, build, stir, tmp_path):
    wider = StageGenotype("resnet", (1, 1), (8, 6))
    for activation, fits in ((Sparta(), False), (Sparta(kind="shared"), True)):
        path = tmp_path / "phi.safetensors"
        save_activation(stir(build(spec_of("resnet", activation))), path)
        other = build(spec_of(activation=activation, genotype=wider))
        if fits:
            load_activation(other, path)
        else:
            with pytest.raises(InputError, match="'stage1-8', only for stage1-4, stage2-6"):
                load_activation(other, path)


def test_each_network_of_an_ensemble_gets_them(spec_of, build, stir, tmp_path):
    source = stir(build(spec_of("plain", Sparta())))
    save_activation(source, tmp_path / "phi")
    spec = replace(spec_of("plain", Sparta()), prediction=MeanOfParticles(2))
    ensemble = build(spec)
    load_activation(ensemble, tmp_path / "phi")
    assert all(_same(_bytes(member), _bytes(source)) for member in ensemble.members)
    save_model(spec, ensemble, tmp_path)
    with pytest.raises(InputError, match="ensemble of 2"):
        load_activation(source, tmp_path)


def test_what_cannot_be_transferred_is_told(spec_of, build, tmp_path):
    path = tmp_path / "phi.safetensors"
    save_activation(build(spec_of("plain", Sparta())), path)
    with pytest.raises(InputError, match="kernel"):
        load_activation(build(spec_of("plain", Sparta(kernel=5))), path)
    with pytest.raises(InputError, match="no parameters"):
        load_activation(build(spec_of("plain")), path)
    with pytest.raises(InputError, match="no parameters"):
        save_activation(build(spec_of("plain")), path)
    with pytest.raises(InputError, match="neither"):
        load_activation(build(spec_of("plain", Sparta())), tmp_path / "absent")
    save_model(spec_of("plain"), build(spec_of("plain")), tmp_path)
    with pytest.raises(InputError, match="only for none"):
        load_activation(build(spec_of("plain", Sparta())), tmp_path)


def _data():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 3
    x = (80 * y.view(-1, 1, 1, 1) + torch.randint(0, 60, (64, 1, 8, 8), generator=generator)).to(torch.uint8)
    return ImageData("made up", x, y, x[:8], y[:8], ("a", "b", "c"))


def _train(model, checkpoint=None, epochs=2, **settings):
    from nas.attacks.fgsm import Fgsm

    data = _data()
    parts = split(data.y_train, architecture=0.5, validation=0.25, seed=0)
    training = Training(epochs, 8, Sgd(**settings))
    return train(
        model, data, parts, Standard(), training, validation_attack=Fgsm(), seed=0, checkpoint=checkpoint
    )  # fmt: skip


def test_frozen_parameters_stay_while_the_rest_is_trained(spec_of, build, stir):
    model = stir(build(spec_of("plain", Sparta())))
    free = copy.deepcopy(model)
    freeze_activation(model)
    before, weights = _bytes(model), model.classifier.weight.clone()
    assert not any(parameter.requires_grad for parameter in activation_parameters(model))
    _train(model)
    assert _same(_bytes(model), before)
    assert all(parameter.grad is None for parameter in activation_parameters(model))
    assert not torch.equal(model.classifier.weight, weights)
    _train(free)
    assert not _same(_bytes(free), before)


def test_parameters_of_activations_do_not_decay(spec_of, build):
    """A gate that no gradient reaches stays; a weight decays."""
    model = build(spec_of("plain", Sparta()))
    own = {id(parameter) for parameter in activation_parameters(model)}
    optimiser = Sgd(weight_decay=0.5).optimiser([*model.parameters()], activation_parameters(model))
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        name: 0.0 if id(p) in own else 0.5 for name, p in model.named_parameters()
    }
    assert len(Sgd().optimiser([*build(spec_of("plain")).parameters()], []).param_groups) == 1
    before, classifier = _bytes(model), model.classifier.weight.norm().item()
    _train(model, learning_rate=1e-3, weight_decay=100.0, schedule="constant", momentum=0.0)
    assert model.classifier.weight.norm().item() < 0.7 * classifier
    after = _bytes(model)
    assert all(torch.allclose(after[name], before[name], atol=0.05) for name in before)
    assert not _same(after, before)


def test_a_training_goes_on_from_its_checkpoint_to_the_same(spec_of, build, tmp_path):
    """Optimiser states of two groups, too."""
    spec = spec_of("plain", Sparta())
    whole, part = build(spec), build(spec)
    _train(whole, tmp_path / "whole", epochs=3)

    class Stop(Exception):
        pass

    from nas.tensor_file import read_tree, write_tree
    from nas.training import loop

    calls = []

    def stopping(tree, path):
        write_tree(tree, path)
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_tree", stopping)
        with pytest.raises(Stop):
            _train(part, tmp_path / "part", epochs=3)
    assert len(read_tree(tmp_path / "part", "cpu")["records"]) == 2
    again = build(spec, seed=9)
    _train(again, tmp_path / "part", epochs=3)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
