"""An activation takes the place of every ReLU, is described in model.json, and leaves ReLU networks as they were."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas import plugins
from nas.activations.activation import Shared, activation_from_data, activation_to_data, places, with_activation
from nas.activations.gelu import Gelu
from nas.activations.lossy import Lossy
from nas.activations.prelu import Prelu, Slopes
from nas.activations.relu import Relu
from nas.activations.silu import Silu
from nas.activations.softplus import Softplus
from nas.activations.sparta import Sparta
from nas.activations.transfer import activation_modules, activation_parameters
from nas.analysis.complexity import complexity
from nas.compression.magnitude import MagnitudePruning
from nas.errors import InputError
from nas.export.onnx_file import onnx_bytes
from nas.folding import joinable
from nas.model_file import ModelSpec, load_model, save_model, with_plan
from nas.model_state import crafting

KINDS = ["cells", "plain", "resnet", "vgg", "mlp", "vit"]
ALL = [
    Silu(), Softplus(5.0), Gelu(), Prelu(), Sparta(), Sparta(kind="dw-pw", gate="relu"), Sparta(kind="shared"),
    Sparta(kind="pool", share="place"), Sparta(kind="pointwise"), Lossy(), Lossy(kind="topk", learned=True),
    Lossy(kind="binary", first=2),
]  # fmt: skip
X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _id(activation):
    return f"{type(activation).__name__}-{getattr(activation, 'kind', '')}"


@pytest.mark.parametrize("kind", KINDS)
def test_another_activation_and_back_gives_the_same_logits_to_the_bit(kind, spec_of, build):
    model = build(spec_of(kind))
    before, reference = copy.deepcopy(model.state_dict()), model(X)
    own = Gelu() if kind == "vit" else Relu()
    for activation in ALL:
        other = with_activation(model, activation, (1, 8, 8))
        assert not other.training
        assert any(isinstance(m, nn.ReLU) for m in other.modules()) <= bool(activation.first)
        restored = with_activation(other, own, (1, 8, 8))
        assert torch.equal(restored(X), reference)
        assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
        assert restored.state_dict().keys() == before.keys()
    assert torch.equal(model(X), reference)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class _Functional(nn.Module):
    """Torch's own operations in place of a network's ReLUs, as functions."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("kind", ["cells", "resnet", "mlp", "vit"])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (Silu(), lambda x: x * torch.sigmoid(x)),
        (Softplus(5.0), lambda x: torch.log1p(torch.exp(5 * x)) / 5),
        (Gelu(), lambda x: x * torch.special.ndtr(x)),
        (Prelu(0.125), lambda x: torch.where(x > 0, x, 0.125 * x)),
        (Sparta(), lambda x: x * torch.sigmoid(x)),
        (Lossy(bound=2.0, levels=4), lambda x: 0.5 * torch.round(2 * x.clamp(0, 2))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outputs_and_input_gradients_are_those_of_torch(kind, activation, function, spec_of, build, stir):
    """Also where the ReLU network runs on native kernels, alone and while it is attacked."""
    model = build(spec_of(kind)).double()
    changed = with_activation(model, activation, (1, 8, 8))
    for module in changed.modules():
        if hasattr(module, "level"):
            module.level.fill_(1.0)
    expected = copy.deepcopy(model)
    for name in places(expected):
        expected.set_submodule(name, _Functional(function))
    x = X.double()
    assert torch.allclose(changed(x), expected(x), rtol=1e-9, atol=1e-9)
    if not (kind == "vit" and isinstance(activation, Gelu)):  # that has it anyway
        assert not torch.allclose(changed(x), model(x), atol=1e-4)
    with crafting(changed), crafting(expected):
        grads = []
        for network in (changed, expected):
            if isinstance(activation, Lossy):
                from nas.activations.lossy import backward

                with backward(network, "true"):
                    point = x.clone().requires_grad_(True)
                    grads.append(torch.autograd.grad(network(point)[:, 0].sum(), point)[0])
            else:
                point = x.clone().requires_grad_(True)
                grads.append(torch.autograd.grad(network(point)[:, 0].sum(), point)[0])
    assert torch.allclose(*grads, rtol=1e-8, atol=1e-9)
    assert isinstance(activation, Lossy) or float(grads[0].abs().max()) > 0


def test_relu_is_recognised_by_nothing_new(spec_of, build):
    """Without an activation the network has the very modules it had, and folding still joins what follows."""
    model = build(spec_of("plain"))
    assert all(type(module) is nn.ReLU for module in places(model).values())
    assert all(followers.relu is not None for followers in joinable(model).values())
    assert not any(isinstance(module, Shared) for module in model.modules())
    # With a shared gate in place normalisations are still folded into convolutions.
    other = build(spec_of("plain", Sparta()))
    assert all(followers.norm is not None and followers.relu is None for followers in joinable(other).values())
    assert len(joinable(other)) == 4


@pytest.mark.parametrize("activation", ALL, ids=_id)
@pytest.mark.parametrize("kind", ["cells", "resnet", "vit"])
def test_a_network_comes_back_from_its_files(kind, activation, spec_of, build, stir, tmp_path):
    spec = spec_of(kind, activation, auxiliary=kind == "cells")
    model = stir(build(spec))
    if kind == "cells":
        assert not any(isinstance(module, nn.ReLU) for module in model.auxiliary.modules()) or activation.first
        logits = []
        model.auxiliary.register_forward_hook(lambda m, i, o: logits.append(o))
        copy.deepcopy(model).train()(X)
        assert len(logits) == 1
        model.auxiliary._forward_hooks.clear()
    save_model(spec, model, tmp_path)
    again_spec, again = load_model(tmp_path)
    assert again_spec == spec
    assert torch.equal(again(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    plan = MagnitudePruning(0.5).plan(model)
    pruned = plan.apply(model)
    save_model(with_plan(spec, plan), pruned, tmp_path)
    assert torch.equal(load_model(tmp_path)[1](X), pruned(X))
    assert not torch.equal(pruned(X), model(X))


def test_a_copy_has_gates_of_its_own(spec_of, build):
    """What places share is copied along, and stays shared."""
    model = build(spec_of("plain", Sparta()))
    twin = copy.deepcopy(model)
    reference = model(X)
    with torch.no_grad():
        for parameter in activation_parameters(twin):
            parameter.add_(0.5)
    assert torch.equal(model(X), reference)
    alone = copy.deepcopy(twin)
    assert torch.equal(alone(X), twin(X)) and not torch.equal(twin(X), reference)
    converted = copy.deepcopy(model).double()
    assert torch.allclose(converted(X.double()).float(), reference, atol=1e-5)


def test_shared_gates_are_stored_and_trained_once(spec_of, build):
    spec = spec_of("plain", Sparta())
    model = build(spec)
    keys = [key for key, _ in activation_modules(model)]
    assert keys == ["stage1-4", "stage2-6"]
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(model.state_dict().keys() & set(names)) == len(set(names))
    own = {id(p) for p in activation_parameters(model)}
    assert sum(p.numel() for p in model.parameters() if id(p) in own) == (4 + 6) * (9 + 2)


def test_parameters_and_multiplications_are_counted(spec_of):
    base, gated = complexity(spec_of("plain")), complexity(spec_of("plain", Sparta()))
    places_of = complexity(spec_of("plain", Sparta(share="place")))
    assert gated.parameters - base.parameters == (4 + 6) * 11
    assert places_of.parameters - base.parameters == 2 * (4 + 6) * 11
    # Two maps of 8x8 in stage 1, two of 4x4 in stage 2; k^2 for each value, its single products not counted.
    extra = 2 * (4 * 64 + 6 * 16) * 9
    assert gated.macs - base.macs == places_of.macs - base.macs == extra
    assert complexity(spec_of("plain", Silu())) == base


def test_kinds_of_cells_have_gates_of_their_own(spec_of, build):
    spec = spec_of("cells", Sparta())
    kinds = {place.kind for place in spec.genotype.layout.place(spec.cells, spec.channels)}
    found = {key.rpartition("-")[0] for key, _ in activation_modules(build(spec))}
    assert found == kinds


def test_one_module_at_two_widths_has_gates_for_both():
    """Torchvision's bottleneck blocks rectify maps of two widths by one module."""
    from torchvision.models.resnet import Bottleneck

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), Bottleneck(16, 4)).eval()
    changed = with_activation(model, Sparta(gate="relu"), (1, 8, 8))
    assert torch.allclose(changed(X), model(X), atol=1e-6)
    assert {key for key, _ in activation_modules(changed)} == {"stage1-4", "stage1-16"}
    slopes = with_activation(model, Prelu(), (1, 8, 8))
    assert sorted(len(m.weight) for m in slopes.modules() if isinstance(m, Slopes)) == [4, 16]


def test_prelu_is_torch_s():
    x = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-0.5, 2, 5)
    module = Slopes(5, 0.0)
    module.weight.data = weight
    assert torch.allclose(module(x), F.prelu(x, weight))
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.allclose(module(tokens), F.prelu(x, weight).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("activation", [None, *ALL], ids=_id)
def test_settings_survive_json(activation):
    data = json.loads(json.dumps(activation_to_data(activation)))
    assert activation_from_data(data) == activation


def test_older_files_have_relu(spec_of):
    data = spec_of().to_data()
    assert data.pop("activation") is None
    assert ModelSpec.from_data(data).activation is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("silu", "null or an object"),
        ({}, "null or an object"),
        ({"name": 3}, "null or an object"),
        ({"name": "spartan"}, "did you mean 'sparta'"),
        ({"name": "sparta", "kernels": 3}, "did you mean 'kernel'"),
        ({"name": "sparta", "kernel": 4}, "odd"),
        ({"name": "sparta", "kernel": 10**9}, "odd"),
        ({"name": "sparta", "kernel": True}, "type int"),
        ({"name": "sparta", "kind": ["dw"]}, "type str"),
        ({"name": "sparta", "kind": "dw_pw"}, "one of dw"),
        ({"name": "softplus", "beta": 0}, "above 0"),
        ({"name": "softplus", "beta": float("nan")}, "above 0"),
        ({"name": "lossy", "levels": 0}, "levels"),
        ({"name": "lossy", "kind": "clip_quant"}, "clip-quant"),
        ({"name": "lossy", "keep": 0.0}, "keep"),
        ({"name": "lossy", "bound": -1.0}, "bound"),
        ({"name": "sparta", "beta": 2.0, "gate": "relu"}, "beta"),
    ],
)
def test_a_wrong_description_is_an_input_error(data, message, spec_of):
    whole = {**spec_of().to_data(), "activation": data}
    with pytest.raises(InputError, match=message):
        ModelSpec.from_data(whole)


def test_a_network_without_activations_is_refused():
    with pytest.raises(InputError, match="no activation"):
        with_activation(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), Silu(), (1, 8, 8))


@pytest.mark.parametrize("activation", [Silu(), Sparta(), Sparta(kind="shared", gate="relu"), Softplus()], ids=_id)
@pytest.mark.parametrize("kind", [pytest.param("cells", marks=pytest.mark.slow), "resnet"])
def test_smooth_networks_are_exported_by_torch(kind, activation, spec_of, build, stir):
    model = stir(build(spec_of(kind, activation)))
    images = torch.export.Dim("images", min=2)
    with torch.no_grad():
        program = torch.export.export(model, (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: images},))
    assert torch.allclose(program.module()(X), model(X), atol=1e-5)


@pytest.mark.parametrize("activation", [Sparta(), Lossy(bound=2.0)], ids=_id)
def test_a_network_becomes_an_onnx_file(activation, spec_of, build, stir):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = stir(build(spec_of("plain", activation)))
    session = runtime.InferenceSession(onnx_bytes(model, (1, 8, 8)))
    (logits,) = session.run(None, {"pixels": X.numpy()})
    assert torch.allclose(torch.from_numpy(logits), model(X), atol=1e-4)


def test_every_activation_is_listed():
    assert set(plugins.available("activations")) == {"relu", "silu", "gelu", "softplus", "prelu", "sparta", "lossy"}
