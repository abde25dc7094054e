"""Attacks on hidden layers: which layers they choose, their limiting cases and what they achieve."""

import pytest
import torch
from torch import nn

from nas.attacks.feature_adversary import FeatureAdversary, other_images
from nas.attacks.hidden_features import hidden_layers, recorded, relative_change
from nas.attacks.hidden_layers import HiddenLayers
from nas.attacks.hidden_patch import HiddenPatch
from nas.attacks.ifgsm import IterativeFgsm
from nas.attacks.intermediate_level import IntermediateLevel
from nas.attacks.pgd import Pgd
from nas.attacks.unrecognisable import Unrecognisable
from nas.errors import InputError
from nas.threat_model import ThreatModel
from search_spaces.dsara import SPACE

THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.7)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


class _Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return torch.relu_(self.conv(x) + self.shortcut(x))


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 1, 1)
        self.stage1 = nn.Sequential(_Block(4, 4, 1), _Block(4, 4, 1))
        self.stage2 = nn.Sequential(_Block(4, 8, 2), _Block(8, 8, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.pool(self.stage2(self.stage1(self.stem(x)))).flatten(1))


class _Normalised(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network((x - 0.5) / 0.25)


def _residual():
    torch.manual_seed(1)
    return _Residual().eval()


def _cells():
    torch.manual_seed(1)
    sizes = {"channels": 2, "cells": 4, "input_shape": (1, 8, 8), "classes": 4, "mean": (0.5,), "std": (0.3,)}
    model = SPACE.build(SPACE.random(_generator(4)), **sizes)
    model(torch.rand(16, 1, 8, 8))
    return model.eval()


def _mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 4)).eval()


def _linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


def _images(n=12, dtype=torch.float32):
    return torch.rand(n, 1, 8, 8, generator=_generator(2), dtype=dtype), torch.arange(n) % 4


def test_the_last_block_of_every_stage_is_chosen():
    x, _ = _images()
    assert hidden_layers(_residual(), x) == ("stage1.1", "stage2.1")
    assert hidden_layers(_Normalised(_residual()), x) == ("network.stage1.1", "network.stage2.1")
    assert hidden_layers(nn.Sequential(nn.Identity(), _residual()), x) == ("1.stage1.1", "1.stage2.1")
    assert hidden_layers(_mlp(), x) == ("2",)
    assert hidden_layers(_linear(), x) == ()
    assert hidden_layers(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)), x) == ()
    chosen = hidden_layers(_cells(), x)
    assert len(chosen) >= 2
    assert all(name.startswith("cells.") and name.count(".") == 1 for name in chosen)
    assert chosen[-1] == "cells.3"


def test_recording_leaves_no_trace_even_when_the_network_fails():
    model, (x, _) = _residual(), _images()
    with recorded(model, ("stage1.1",)) as features:
        model(x)
        assert features["stage1.1"].shape == (12, 4, 8, 8)
    with pytest.raises(ZeroDivisionError), recorded(model, ("stage1.1",)):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        hidden_layers(model, torch.rand(1, 2, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_layer_is_named_with_the_nearest():
    model, (x, y) = _residual(), _images()
    for attack in (HiddenLayers(layers=("stage1.2",)), IntermediateLevel(layer="stage1.2")):
        with pytest.raises(InputError, match=r"stage1\.1"):
            attack(model, x, y, generator=_generator())


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("make", [_residual, _cells])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_without_weight_it_is_projected_gradient_descent_bit_for_bit(threat_model, make, keep):
    model, (x, y) = make(), _images()
    expected = Pgd(threat_model, 7, keep=keep)(model, x, y, generator=_generator())
    assert torch.equal(
        HiddenLayers(threat_model, 7, weight=0.0, keep=keep)(model, x, y, generator=_generator()), expected
    )
    assert not torch.equal(HiddenLayers(threat_model, 7, keep=keep)(model, x, y, generator=_generator()), expected)


def test_a_linear_network_has_nothing_hidden():
    model, (x, y) = _linear(), _images()
    found = HiddenLayers(THREATS[0], 5)(model, x, y, generator=_generator())
    assert torch.equal(found, Pgd(THREATS[0], 5)(model, x, y, generator=_generator()))


@pytest.mark.parametrize("make", [_residual, _cells])
def test_hidden_layers_move_further_than_by_the_loss_alone(make):
    model, (x, y) = make(), _images()
    layers = hidden_layers(model, x)
    moved = []
    for weight in (0.0, 100.0):
        x_adv = HiddenLayers(THREATS[0], 20, weight=weight)(model, x, y, generator=_generator())
        with torch.no_grad(), recorded(model, layers) as features:
            model(x)
            clean = {name: output.clone() for name, output in features.items()}
            model(x_adv)
            moved.append(relative_change(features, clean))
    assert float(moved[1].mean()) > float(moved[0].mean())


@pytest.mark.parametrize("threat_model", [ThreatModel("linf", 1.0), *THREATS], ids=str)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_patch_stays_in_its_square(threat_model, weight):
    model, (x, y) = _residual(), _images()
    attack = HiddenPatch(threat_model, area=0.15, steps=10, weight=weight)
    mask = attack.mask(x, _generator())
    assert mask.flatten(1).sum(1).tolist() == [9] * len(x)
    tops = {tuple(image[0].any(1).nonzero()[0].tolist()) for image in mask}
    assert len(tops) > 2, "places differ"
    x_adv = attack(model, x, y, generator=_generator())
    assert torch.equal(x_adv[~mask], x[~mask])
    assert bool((x_adv != x)[mask].any())
    assert bool(threat_model.contains(x_adv, x).all())


def test_a_patch_reaches_the_worst_case_of_a_linear_model_within_it():
    """All of epsilon on every pixel of the square, along the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x, y = 0.3 + 0.4 * _images()[0], torch.arange(12) % 2
    attack = HiddenPatch(ThreatModel("linf", 0.1), area=0.2, steps=30)
    mask = attack.mask(x, _generator())
    w = model[1].weight.detach()
    rising = (w[1 - y] - w[y]).sign().view_as(x)
    expected = x + 0.1 * rising * mask
    torch.testing.assert_close(attack(model, x, y, generator=_generator()), expected)


def test_the_whole_image_is_a_patch_too_and_more_places_are_not_weaker():
    model, (x, y) = _residual(), _images()
    whole = HiddenPatch(THREATS[0], area=1.0)
    assert bool(whole.mask(x, _generator()).all())
    assert bool(HiddenPatch(area=1e-6).mask(x, _generator()).flatten(1).sum(1).eq(1).all())
    losses = []
    for places in (1, 6):
        attack = HiddenPatch(ThreatModel("linf", 1.0), steps=10, places=places, weight=0.0)
        x_adv = attack(model, x, y, generator=_generator())
        losses.append(nn.functional.cross_entropy(model(x_adv), y).item())
    assert losses[1] > losses[0]


def test_a_feature_adversary_approaches_its_guide():
    model, (x, y) = _residual(), _images()
    guides = x.flip(0)
    layers = hidden_layers(model, x)[-1:]

    def distance(images):
        with torch.no_grad(), recorded(model, layers) as features:
            model(guides)
            aim = {name: output.clone() for name, output in features.items()}
            model(images)
            return relative_change(features, aim)

    before = distance(x)
    near = FeatureAdversary(THREATS[0])(model, x, y, generator=_generator(), guides=guides)
    free = FeatureAdversary(ThreatModel("linf", 1.0), 200)(model, x, y, generator=_generator(), guides=guides)
    assert bool((distance(near) < before).all())
    assert float((distance(free) / before).median()) < 0.3
    assert torch.equal(FeatureAdversary(THREATS[0])(model, x, y, generator=_generator(), guides=x), x)


def test_guides_are_of_other_classes_and_noise_where_there_are_none():
    x, y = _images()
    guides = other_images(x, y, _generator(), ThreatModel())
    rows = (guides.unsqueeze(1) == x.unsqueeze(0)).flatten(2).all(2).int().argmax(1)
    assert torch.equal(guides, x[rows])
    assert bool((y[rows] != y).all())
    alone = other_images(x, torch.zeros_like(y), _generator(), ThreatModel(lower=-1.0))
    assert float(alone.min()) < -0.5
    assert FeatureAdversary()(_residual(), x[:1], y[:1], generator=_generator()).shape == (1, 1, 8, 8)


def test_the_intermediate_level_goes_on_where_the_first_attack_went():
    """On the logits of two classes of a linear model, both attacks have one optimum; on hidden layers the projection
    grows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x, y = 0.3 + 0.4 * _images()[0], torch.arange(12) % 2
    found = IntermediateLevel(THREATS[0])(model, x, y, generator=_generator())
    torch.testing.assert_close(found, IterativeFgsm(THREATS[0])(model, x, y, generator=_generator()))

    model, (x, y) = _residual(), _images()
    attack = IntermediateLevel(THREATS[0], layer="stage2.0")
    first = IterativeFgsm(THREATS[0])(model, x, y, generator=_generator())
    second = attack(model, x, y, generator=_generator())

    def outputs(images):
        with torch.no_grad(), recorded(model, ("stage2.0",)) as features:
            model(images)
            return features["stage2.0"].flatten(1).clone()

    direction = outputs(first) - outputs(x)
    projections = [((outputs(images) - outputs(x)) * direction).sum(1) for images in (first, second)]
    assert float(projections[1].sum()) > float(projections[0].sum())
    default = IntermediateLevel(THREATS[0])(model, x, y, generator=_generator())
    middle = IntermediateLevel(THREATS[0], layer="stage1.1")(model, x, y, generator=_generator())
    assert torch.equal(default, middle)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_noise_becomes_the_class_without_becoming_the_image(weight):
    """The hidden layer has a third as many values as there are pixels."""
    model, (x, _) = _mlp(), _images()
    y = model(x).argmax(1)
    found = Unrecognisable(150, 0.02, weight)
    before = [parameter.clone() for parameter in model.parameters()]
    images = found.collide(model, x, y, generator=_generator())
    assert images.shape == x.shape
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert bool((model(images).argmax(1) == y).all())
    assert float((images - x).abs().mean()) > 0.15, "uniform noise is 1/3 away from uniform noise"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_collision_reaches_the_hidden_layers():
    model, (x, _) = _residual(), _images()
    y, layers = model(x).argmax(1), ("stage2.1",)

    def distance(images):
        with torch.no_grad(), recorded(model, layers) as features:
            model(x)
            aim = {name: output.clone() for name, output in features.items()}
            model(images)
            return float(relative_change(features, aim).mean())

    by_weight = [
        distance(Unrecognisable(150, 0.02, weight).collide(model, x, y, generator=_generator()))
        for weight in (0.0, 1.0)
    ]
    assert by_weight[1] < 0.6 * by_weight[0]
    start = x.flip(0)
    untouched = Unrecognisable(1, 1e-9).collide(model, x, y, generator=_generator(), start=start)
    torch.testing.assert_close(untouched, start)


def test_wrong_settings_are_refused():
    for cls, settings in (
        (HiddenLayers, {"weight": -1.0}),
        (HiddenLayers, {"steps": 0}),
        (HiddenLayers, {"loss": "kl", "random_start": False}),
        (HiddenPatch, {"area": 0.0}),
        (HiddenPatch, {"places": 0}),
        (FeatureAdversary, {"steps": 0}),
        (IntermediateLevel, {"loss": "kl"}),
        (Unrecognisable, {"learning_rate": 0.0}),
        (Unrecognisable, {"lower": 1.0}),
    ):
        with pytest.raises(InputError):
            cls(**settings)
