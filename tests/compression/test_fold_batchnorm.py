"""Batch-norm folding: the same function with fewer layers, and only where that is so."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import resnet18, vgg16_bn
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.pgd import Pgd
from nas.compression.fold_batchnorm import BatchNormFolding
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.plan import LayerPlan, Plan, plan_for
from nas.defences.particles import Particles
from nas.errors import InputError
from nas.model_file import load_model, save_model, with_plan
from nas.threat_model import ThreatModel


def _folded(model):
    return BatchNormFolding().plan(model).apply(model)


def _norms(model):
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not name.startswith("auxiliary.")
    ]


def _skipped(model):
    return {layer.name: layer.reason for layer in BatchNormFolding().plan(model).layers if layer.action == "skipped"}


def _shaken(model, seed=0):
    """Statistics and affine parameters no default could imitate, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
                if module.affine:
                    module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
    return model.eval()


def _same(a, b, x, tolerance):
    """Logits and gradients of the loss with respect to ``x`` are equal."""
    y, found = torch.arange(len(x)) % 3, []
    for model in (a, b):
        images = x.clone().requires_grad_()
        logits = model(images)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), images)
        found.append((logits, gradient))
    (logits, gradient), (logits_b, gradient_b) = found
    torch.testing.assert_close(logits_b, logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient_b, gradient, rtol=tolerance * 10, atol=tolerance)
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["cells", "plain"])
def test_a_folded_network_is_the_same_function_without_norms(kind, dtype, make):
    for seed in range(3):
        _, model = make(kind, seed)
        model = _shaken(model, seed).to(dtype)
        folded = _folded(model)
        assert _norms(model) and not _norms(folded), "every normalisation of these networks follows a convolution"
        x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
        _same(model, folded, x, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("build", [resnet18, vgg16_bn])
def test_networks_of_torchvision(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _shaken(build(num_classes=3)).double()
    folded = _folded(model)
    assert not _norms(folded)
    _same(model, folded, torch.rand(2, 3, 32, 32, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "bias": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False},
        {"kernel_size": (1, 3), "padding": "same", "padding_mode": "reflect", "groups": 4},
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_any_convolution_keeps_its_settings(arguments, affine):
    """And the formula: weight times gamma / sqrt(var + eps), bias (b - mean) scale + beta."""
    convolution, norm = nn.Conv2d(4, 8, **arguments), nn.BatchNorm2d(8, affine=affine, eps=0.01)
    model = _shaken(nn.Sequential(convolution, norm, nn.ReLU(), nn.Conv2d(8, 3, 1), nn.Flatten())).double()
    folded = _folded(model)
    scale = (norm.weight if affine else 1) / (norm.running_var + 0.01).sqrt()
    bias = 0 if convolution.bias is None else convolution.bias
    torch.testing.assert_close(folded[0].weight, convolution.weight * scale.view(-1, 1, 1, 1))
    torch.testing.assert_close(folded[0].bias, (bias - norm.running_mean) * scale + (norm.bias if affine else 0))
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    for name in ("stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(folded[0], name) == getattr(convolution, name)


class _Net(nn.Module):
    """Convolution, normalisation and what is between them, by a function of the modules and x."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.compute = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.compute(self, x).mean((2, 3))


def _conv(inputs=3, outputs=3):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _tied():
    first, second = _conv(), _conv()
    second.weight = first.weight
    return _Net(lambda m, x: m.norm(m.second(m.first(x))), first=first, second=second, norm=nn.BatchNorm2d(3))


UNFIT = {
    "its output is used again": lambda: _Net(
        lambda m, x: m.norm(y := m.conv(x)) + y, conv=_conv(), norm=nn.BatchNorm2d(3)
    ),
    "changed in place between": lambda: _Net(
        lambda m, x: m.norm(m.conv(x).relu_()), conv=_conv(), norm=nn.BatchNorm2d(3)
    ),
    "after a pool": lambda: _Net(lambda m, x: m.norm(F.avg_pool2d(m.conv(x), 2)), conv=_conv(), norm=nn.BatchNorm2d(3)),
    "before the convolution": lambda: _Net(lambda m, x: m.conv(m.norm(x)), conv=_conv(), norm=nn.BatchNorm2d(3)),
    "convolution called twice": lambda: _Net(
        lambda m, x: m.norm(m.conv(m.conv(x))), conv=_conv(), norm=nn.BatchNorm2d(3)
    ),
    "norm called twice": lambda: _Net(
        lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)), a=_conv(), b=_conv(), norm=nn.BatchNorm2d(3)
    ),
    "statistics of the batch": lambda: _Net(
        lambda m, x: m.norm(m.conv(x)), conv=_conv(), norm=nn.BatchNorm2d(3, track_running_stats=False)
    ),
    "weights are shared": _tied,
    "beside something that is no convolution": lambda: _Net(
        lambda m, x: m.norm(torch.cat([m.conv(x), x], 1)), conv=_conv(), norm=nn.BatchNorm2d(6)
    ),
    "part is used again": lambda: _Net(
        lambda m, x: m.norm(torch.cat([y := m.a(x), m.b(x)], 1)) + torch.cat([y, y], 1),
        a=_conv(), b=_conv(), norm=nn.BatchNorm2d(6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_normalisation_stays_where_folding_would_change_the_function(case):
    model = UNFIT[case]().eval()
    if case != "statistics of the batch":
        _shaken(model)
    plan = BatchNormFolding().plan(model)
    assert all(layer.action == "skipped" and layer.reason for layer in plan.layers)
    assert "norm" in {layer.name for layer in plan.layers}, "the plan says why it stays"
    folded = plan.apply(model)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(folded(x), model(x))


def test_one_normalisation_of_several_convolutions_side_by_side():
    model = _shaken(
        _Net(lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], 1)), a=_conv(3, 2), b=_conv(3, 5), norm=nn.BatchNorm2d(7))
    ).double()
    folded = _folded(model)
    assert isinstance(folded.norm, nn.Identity)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_every_layer_is_named(kind, make):
    _, model = make(kind)
    layers = BatchNormFolding().plan(model).layers
    assert [layer.name for layer in layers] == list(deployed_layers(model))
    depthwise = [n for n, layer in deployed_layers(model).items() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert set(depthwise) <= set(_skipped(model)), "a 1x1 convolution stands between it and the normalisation"
    assert "classifier" in _skipped(model)


def test_an_attack_finds_the_same_images(kind, make):
    _, model = make(kind)
    folded = _folded(model)
    x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
    attack = Pgd(ThreatModel("linf", 0.1), steps=5)
    found = [attack(m, x, y, generator=torch.Generator().manual_seed(3)) for m in (model, folded)]
    # A sign of a gradient of nearly zero may differ.
    assert float(((found[0] - found[1]).abs() > 1e-4).float().mean()) < 0.005
    assert torch.equal(model(found[0]).argmax(1), folded(found[0]).argmax(1))


def test_masks_stay_masks(kind, make):
    _, model = make(kind)
    pruned = MagnitudePruning(0.4).plan(model).apply(model)
    folded = _folded(pruned)
    torch.testing.assert_close(folded(x := torch.rand(5, 1, 8, 8)), pruned(x), rtol=1e-5, atol=1e-5)
    masked = 0
    for name, layer in deployed_layers(pruned).items():
        again = deployed_layers(folded)[name]
        assert parametrize.is_parametrized(again) == parametrize.is_parametrized(layer)
        if parametrize.is_parametrized(layer):
            masked += 1
            assert torch.equal(again.weight == 0, layer.weight == 0)
    assert masked > 0
    with torch.no_grad():
        for layer in deployed_layers(folded).values():
            if parametrize.is_parametrized(layer):
                layer.parametrizations.weight.original.add_(1.0)
    for name, layer in deployed_layers(folded).items():
        assert int((layer.weight == 0).sum()) >= int((deployed_layers(pruned)[name].weight == 0).sum())


def test_a_weight_that_is_computed_otherwise_is_left_alone():
    model = _shaken(nn.Sequential(nn.utils.parametrizations.weight_norm(_conv()), nn.BatchNorm2d(3), nn.Flatten()))
    assert isinstance(_folded(model)[1], nn.BatchNorm2d)
    assert "computed" in _skipped(model)["1"]


def test_folding_again_changes_nothing(kind, make):
    _, model = make(kind)
    once = _folded(model)
    twice = _folded(once)
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name])


def test_the_folded_network_can_be_saved_loaded_and_trained(kind, make, tmp_path):
    spec, model = make(kind)
    plan = Plan.from_data(json.loads(json.dumps(BatchNormFolding().plan(model).to_data())))
    folded = plan.apply(model)
    save_model(with_plan(spec, plan), folded, tmp_path)
    _, loaded = load_model(tmp_path)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded(x), folded(x))
    optimiser = torch.optim.SGD(folded.parameters(), 0.1)
    before = copy.deepcopy(folded.state_dict())
    F.cross_entropy(folded.train()(x), torch.arange(5) % 3).backward()
    optimiser.step()
    assert any(name.endswith("bias") and not torch.equal(v, before[name]) for name, v in folded.state_dict().items())


def test_an_ensemble_is_folded_member_by_member(make):
    ensemble = Particles([make("plain", weights_seed=seed)[1] for seed in range(2)]).eval()
    folded = plan_for(BatchNormFolding(), ensemble).apply(ensemble)
    assert not _norms(folded)
    torch.testing.assert_close(folded(x := torch.rand(5, 1, 8, 8)), ensemble(x), rtol=1e-5, atol=1e-5)


def test_networks_without_batch_norm_stay_as_they_are():
    with torch.random.fork_rng():
        model = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval()
    plan = BatchNormFolding().plan(model)
    assert {layer.action for layer in plan.layers} == {"skipped"}
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(plan.apply(model)(x), model(x))


def test_a_network_without_layers_is_refused():
    with pytest.raises(InputError, match="no convolution or linear layer"):
        BatchNormFolding().plan(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()))


def test_a_plan_of_another_network_is_refused(make):
    plans = {kind: BatchNormFolding().plan(make(kind)[1]) for kind in ("cells", "plain")}
    for kind, other in (("cells", "plain"), ("plain", "cells")):
        with pytest.raises(InputError, match="another network"):
            plans[kind].apply(make(other)[1])
    _, model = make("plain")
    layers = plans["plain"].layers
    first = next(i for i, layer in enumerate(layers) if layer.action == "replaced")
    channels = layers[first].data["channels"]
    for data in (
        {}, {"norm": "features.1"}, {"norm": 5, "channels": channels}, {"norm": "features.0", "channels": channels},
        {"norm": "features.1", "channels": [0, 10**12]}, {"norm": "features.1", "channels": [-1, 3]},
        {"norm": "features.1", "channels": "04"}, {"norm": "features.1", "channels": [0]},
        {"norm": "features.1", "channels": [True, channels[1] + 1]}, {"norm": "no", "channels": channels},
        {"norm": "features.1", "channels": [0.0, channels[1]]}, {"norm": "features.7", "channels": channels},
    ):  # fmt: skip
        wrong = LayerPlan(layers[first].name, "replaced", "wrong", data)
        with pytest.raises(InputError, match="another network"):
            Plan("fold_batchnorm", (*layers[:first], wrong, *layers[first + 1 :])).apply(model)
    with pytest.raises(InputError, match="another network"):
        Plan("fold_batchnorm", (layers[first], *layers)).apply(model)
