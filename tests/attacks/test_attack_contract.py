"""What every attack promises, checked on whatever is in nas/attacks: a new file is picked up by itself."""

import copy
import dataclasses
import random
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas import plugins
from nas.attacks.losses import LOSSES
from nas.compression.magnitude import MagnitudePruning
from nas.errors import InputError
from nas.threat_model import ThreatModel
from search_spaces.dsara import SPACE

PLUGINS = plugins.available("attacks")
EPSILON = {"linf": 0.06, "l2": 0.4, "l1": 0.4}
ORDER = {"linf": float("inf"), "l2": 2, "l1": 1}

QUICK: dict[str, dict[str, object]] = {"autoattack": {"steps": 2, "queries": 4}}
"""Settings that make an attack of many parts quick, where taking at most ten of whatever it counts does not."""

SUITES = [name for name, cls in PLUGINS.items() if hasattr(cls, "attacks")]
"""Attacks one after the other, each content with a misclassified image."""

LEARNT = ["ai_gan"]
"""Attacks that are trained first: they promise no optimum, all else as every attack."""

ASIDE = {"feature_adversary", "hidden_patch", "intermediate_level", "jsma", "universal", *SUITES, *LEARNT}
"""Attacks that do not climb the loss of each sample on all of its pixels: they aim at features, at few pixels, at all
samples together."""

MAXIMISERS = [
    name
    for name, cls in PLUGINS.items()
    if name not in ASIDE and not hasattr(cls, "nearest") and not hasattr(cls, "attempt")
]
"""Attacks that climb their loss by gradients to the edge of the ball."""

NEAREST = {name: 1.05 for name, cls in PLUGINS.items() if hasattr(cls, "nearest")}
# What EAD calls near is the elastic net, whatever the norm; OPT asks for ten distances along a direction an estimate.
NEAREST |= {"ead": 4.0, "opt": 1.1}
"""Attacks that look for the nearest misclassified image, and how many times the exact distance they may need."""

QUERYING = [name for name, cls in PLUGINS.items() if hasattr(cls, "attempt")]
"""Attacks that count the answers of the model they need."""


def _variants(cls):
    """Changes to the defaults of an attack: every other value of each closed choice, every known loss, all at once."""
    hints = typing.get_type_hints(cls)
    changes = [{}]
    for field in dataclasses.fields(cls):
        if field.name == "loss":
            values = [name for name in LOSSES if name != field.default]
        elif typing.get_origin(hints[field.name]) is typing.Literal:
            values = [value for value in typing.get_args(hints[field.name]) if value != field.default]
        elif hints[field.name] is bool:
            values = [not field.default]
        else:
            continue
        changes += [{field.name: value} for value in values]
    changes.append({name: value for change in changes for name, value in change.items() if name != "random_start"})
    possible = []
    for change in changes:
        try:
            cls(**change)
        except InputError:
            continue  # a combination the attack refuses
        possible.append(change)
    assert {} in possible, "an attack must have a default for everything"
    return possible


def _cheap(cls):
    """At most ten of whatever an attack counts (steps, queries)."""
    return {
        field.name: 10
        for field in dataclasses.fields(cls)
        if type(field.default) is int and field.default > 10 and field.name != "threat_model"
    } | QUICK.get(cls.__module__.rpartition(".")[2], {})


def _budget(name):
    """Queries enough for 16 pixels, for an attack that counts them."""
    return {"queries": 2000} if name in QUERYING else {}


def _takes(cls, change, norm):
    """Whether the attack has a form for this norm."""
    try:
        cls(**{**change, "threat_model": ThreatModel(norm, EPSILON[norm])})
    except InputError:
        return False
    return True


CASES = [
    pytest.param(
        name, change, norm, id=f"{name}-{norm}-" + (",".join(f"{k}={v}" for k, v in change.items()) or "default")
    )
    for name, cls in PLUGINS.items()
    for change in _variants(cls)
    for norm in EPSILON
    if _takes(cls, change, norm)
]


def _attack(name, change, norm, **more):
    cls = PLUGINS[name]
    threat_model = ThreatModel(norm, EPSILON[norm])
    return _ready(cls(**{**_cheap(cls), **change, "threat_model": threat_model, **more}))


def _ready(attack):
    """The attack, trained on the images and a model of these tests if it is one that has to be."""
    if type(attack).__module__.rpartition(".")[2] not in LEARNT:
        return attack
    x, y = _images(8, seed=1)
    return attack.fit(_model("zoo"), x, y, generator=torch.Generator().manual_seed(0))


class _Zoo(nn.Module):
    """Everything that keeps a state: several kinds of normalisation, dropout, a frozen weight, an integer buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.dropout = nn.Dropout(0.3)
        self.other_dropout = nn.Dropout2d(0.3)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2)
        self.frozen = nn.BatchNorm2d(4, momentum=None)
        self.frozen.weight.requires_grad_(False)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.bn1d = nn.BatchNorm1d(36, affine=False)
        self.classifier = nn.Linear(36, 3)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x):
        x = self.dropout(F.silu(self.instance(self.bn(self.conv(x)))))
        x = self.other_dropout(self.untracked(self.frozen(self.conv2(x))))
        return self.classifier(self.bn1d(x.flatten(1)))


def _cell_network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        genotype = SPACE.random(torch.Generator().manual_seed(seed))
        sizes = {"channels": 2, "cells": 4, "input_shape": (2, 8, 8), "classes": 3}
        network = SPACE.build(genotype, **sizes, mean=(0.4, 0.6), std=(0.2, 0.3), auxiliary=True)
        with torch.no_grad():
            network(torch.rand(8, 2, 8, 8))  # running statistics other than the initial ones
        return MagnitudePruning(0.7).plan(network).apply(network)


MODELS = {}


def _model(kind):
    """A fresh copy of a model that is made once."""
    if kind not in MODELS:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            MODELS[kind] = _Zoo() if kind == "zoo" else _cell_network()
    return copy.deepcopy(MODELS[kind])


def _images(n=4, channels=2, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, side, side, generator=generator)
    x[0, :, 0, 0], x[0, :, 1, 1] = 0.0, 1.0  # pixels on the bounds
    return x, torch.randint(3, (n,), generator=generator)


def _random_streams():
    return torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()


def _snapshot(model):
    return {
        "parameters": {name: value.detach().clone() for name, value in model.named_parameters()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "requires_grad": {name: value.requires_grad for name, value in model.named_parameters()},
        "grad": {name: (value.grad, value.grad if value.grad is None else value.grad.clone())
                 for name, value in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "tracking": {name: getattr(module, "track_running_stats", None) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
    }  # fmt: skip


def _assert_unchanged(model, before):
    after = _snapshot(model)
    for part in ("requires_grad", "training", "tracking", "hooks"):
        assert after[part] == before[part], part
    for part in ("parameters", "buffers"):
        assert after[part].keys() == before[part].keys()
        for name, value in before[part].items():
            assert torch.equal(after[part][name], value), (part, name)
            assert after[part][name].dtype == value.dtype
    for name, (tensor, content) in before["grad"].items():
        assert after["grad"][name][0] is tensor, name
        assert content is None or torch.equal(after["grad"][name][0], content), name


def _put(model, mode):
    """A state of the train/eval flags: all of one kind, or mixed."""
    model.train(mode != "eval")
    if mode == "mixed":
        for number, module in enumerate(model.modules()):
            module.training = number % 3 != 1


@pytest.mark.parametrize(("name", "change", "norm"), CASES)
def test_the_result_is_in_the_ball_and_in_range(name, change, norm):
    x, y = _images(8)
    attack = _attack(name, change, norm)
    x_adv = attack(_model("zoo").eval(), x, y, generator=torch.Generator().manual_seed(0))
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    delta = (x_adv - x).double().flatten(1)
    size = delta.norm(p=ORDER[norm], dim=1)
    assert float(size.max()) <= EPSILON[norm] + 1e-6
    if name in MAXIMISERS:
        assert float(size.max()) > 0.2 * EPSILON[norm], "an attack that hardly moves anything is none"


@pytest.mark.parametrize("name", PLUGINS)
def test_the_default_attack_stays_in_the_default_threat_model(name):
    """With nothing economised: as a recipe that names only the attack would run it."""
    x, y = _images()
    attack = _ready(PLUGINS[name]())
    x_adv = attack(_model("zoo").eval(), x, y, generator=torch.Generator().manual_seed(0))
    threat_model = ThreatModel()
    assert float(threat_model.distance(x_adv, x).max()) <= threat_model.epsilon + 1e-6
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert str(attack)


@pytest.mark.parametrize(("kind", "mode"), [("zoo", "train"), ("zoo", "eval"), ("zoo", "mixed"), ("cells", "train")])
@pytest.mark.parametrize(("name", "change", "norm"), CASES)
def test_the_model_and_the_world_are_left_as_found(name, change, norm, kind, mode):
    x, y = _images()
    model = _model(kind)
    _put(model, mode)
    named = list(model.named_parameters())
    for number, (_, parameter) in enumerate(named):
        if number % 2:  # half of the gradients exist already, half are None
            parameter.grad = torch.full_like(parameter, 0.25)
    flowed = []
    for name_, parameter in named:
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name_: flowed.append(name))
    x_before, y_before = x.clone(), y.clone()
    before, streams = _snapshot(model), _random_streams()
    attack = _attack(name, change, norm)
    attack(model, x, y, generator=torch.Generator().manual_seed(0))
    _assert_unchanged(model, before)
    for found, expected in zip(_random_streams(), streams, strict=True):
        assert np.array_equal(found, expected) if not isinstance(found, tuple) else found == expected
    assert flowed == [], "gradients reached the weights"
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert x.grad is None


@pytest.mark.parametrize("name", PLUGINS)
def test_a_failing_model_is_left_as_found(name):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _model("zoo")

        def forward(self, x):
            self.inner(x)
            raise FloatingPointError

    model, (x, y) = Fails(), _images()
    before = _snapshot(model)
    with pytest.raises(FloatingPointError):
        _ready(PLUGINS[name]())(model, x, y, generator=torch.Generator().manual_seed(0))
    _assert_unchanged(model, before)


@pytest.mark.parametrize(("name", "change", "norm"), CASES)
def test_the_generator_is_the_only_chance(name, change, norm):
    x, y = _images()
    model, attack = _model("zoo").train(), _attack(name, change, norm)

    def run(seed):
        return attack(model, x, y, generator=torch.Generator().manual_seed(seed))

    first = run(0)
    torch.manual_seed(99)
    assert torch.equal(first, run(0))
    # A step of all epsilon on one pixel: the projection onto the l_1 ball then leaves nothing of the start.
    if getattr(attack, "random_start", False) and (name, norm) != ("fgsm", "l1"):
        assert not torch.equal(first, run(1))


@pytest.mark.parametrize(("name", "change", "norm"), CASES)
def test_epsilon_zero_returns_the_images_exactly(name, change, norm):
    x, y = _images()
    attack = _attack(name, change, norm, threat_model=ThreatModel(norm, 0.0))
    for dtype in (torch.float32, torch.float64):
        model, images = _model("zoo").to(dtype).eval(), x.to(dtype)
        assert torch.equal(attack(model, images, y, generator=torch.Generator().manual_seed(0)), images)


@pytest.mark.parametrize(("name", "change", "norm"), CASES)
def test_attacks_work_where_gradients_are_switched_off(name, change, norm):
    x, y = _images()
    model, attack = _model("zoo").eval(), _attack(name, change, norm)
    expected = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, generator=torch.Generator().manual_seed(0)), expected)


@pytest.mark.parametrize(("name", "change", "norm"), CASES)
def test_a_sample_does_not_depend_on_its_batch(name, change, norm):
    """Where nothing couples the samples: no random numbers, running statistics."""
    attack = _attack(name, change, norm)
    x, y = _images(5)
    model, x = _smooth(), x.double()
    whole = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    chance = not torch.equal(whole, attack(model, x, y, generator=torch.Generator().manual_seed(1)))
    if chance or getattr(attack, "statistics", "running") != "running":
        pytest.skip("the samples share random numbers or batch statistics")
    parts = [attack(model, x[i : i + 1], y[i : i + 1], generator=torch.Generator().manual_seed(0)) for i in range(5)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-9)


def _smooth():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 3)).double().eval()


def _linear(seed):
    """A two-class linear model in float64, interior images, and for each sample the exact worst margin by norm."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 16, generator=generator, dtype=torch.float64))
        model[1].bias.copy_(torch.randn(2, generator=generator, dtype=torch.float64))
    x = 0.45 + 0.1 * torch.rand(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    w = (model[1].weight[y] - model[1].weight[1 - y]).detach()
    b = (model[1].bias[y] - model[1].bias[1 - y]).detach()
    margin = (w * x.flatten(1)).sum(1) + b
    worst = {
        "linf": margin - EPSILON["linf"] * w.abs().sum(1),
        "l2": margin - EPSILON["l2"] * w.square().sum(1).sqrt(),
        "l1": margin - EPSILON["l1"] * w.abs().amax(1),  # one pixel: there is room for all of epsilon in it
    }
    return model, x, y, margin, worst


def _exact(cls, norm):
    """Settings under which an iterative attack has converged: long steps, many of them."""
    fields = {field.name for field in dataclasses.fields(cls)}
    settings = {"steps": 60, "step_size": EPSILON[norm]}
    return {name: value for name, value in settings.items() if name in fields}


MAXIMISED = [(name, norm) for name in MAXIMISERS for norm in EPSILON if _takes(PLUGINS[name], {}, norm)]
# The sparse steps of Auto-PGD in l_1 shrink to a tenth of epsilon at least and move several of the 16 pixels at a time.
EXACT = [case for case in MAXIMISED if case not in (("apgd", "l1"), ("apgd_t", "l1"))]


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize(("name", "norm"), EXACT)
def test_the_exact_worst_case_of_a_linear_model_is_reached(name, norm, loss):
    """min over the ball of w.(x + d) + b is the margin less eps |w| in the dual norm."""
    cls = PLUGINS[name]
    change = {"loss": loss} if "loss" in {field.name for field in dataclasses.fields(cls)} else {}
    for seed in range(3):
        model, x, y, _, worst = _linear(seed)
        attack = cls(threat_model=ThreatModel(norm, EPSILON[norm]), **change, **_exact(cls, norm))
        x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(seed))
        reached = F.cross_entropy(model(x_adv), y, reduction="none").detach()
        torch.testing.assert_close(reached, F.softplus(-worst[norm]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "norm"), MAXIMISED)
def test_the_default_settings_come_near_the_worst_case(name, norm):
    """At least 80 % of the possible fall of the margin, for every sample."""
    model, x, y, margin, worst = _linear(5)
    attack = PLUGINS[name](threat_model=ThreatModel(norm, EPSILON[norm]))
    x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    logits = model(x_adv).detach()
    reached = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
    assert float(((margin - reached) / (margin - worst[norm])).min()) > 0.8


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name in NEAREST for norm in EPSILON if _takes(PLUGINS[name], {}, norm)]
)
def test_the_nearest_misclassified_image_of_a_linear_model_is_found(name, norm):
    """The boundary is margin / |w|_1 (l_inf) or margin / |w|_2 (l_2) away; what is misclassified already stays."""
    model, x, y, margin, worst = _linear(5)
    distance = margin / (margin - worst[norm]) * EPSILON[norm]
    attack = PLUGINS[name](threat_model=ThreatModel(norm, EPSILON[norm]), **_budget(name))
    nearest = attack.nearest(model, x, y, generator=torch.Generator().manual_seed(0))
    right = margin > 0
    assert bool(right.any())
    assert torch.equal(nearest[~right], x[~right])
    assert float(nearest.min()) >= 0
    assert float(nearest.max()) <= 1
    assert bool((model(nearest).argmax(1) != y).all())
    found = attack.threat_model.distance(nearest, x)[right] / distance[right]
    assert float(found.min()) >= 1 - 1e-9
    assert float(found.max()) <= NEAREST[name]


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name in QUERYING for norm in EPSILON if _takes(PLUGINS[name], {}, norm)]
)
def test_queries_are_counted_as_the_model_sees_them(name, norm):
    """Every image a sample shows to the model is one query of that sample; what it needs no answer for costs none."""
    model, x, y, margin, _ = _linear(5)
    seen = 0

    def count(module, inputs):
        nonlocal seen
        seen += len(inputs[0])

    model.register_forward_pre_hook(count)
    attack = PLUGINS[name](threat_model=ThreatModel(norm, EPSILON[norm]), **_budget(name))
    attempt = attack.attempt(model, x, y, generator=torch.Generator().manual_seed(0))
    assert int(attempt.queries.sum()) == seen
    assert bool((attempt.queries >= 1).all())
    broken = model(attempt.x_adv).argmax(1) != y
    assert torch.equal(attempt.broken_at >= 0, broken)
    assert bool((attempt.broken_at <= attempt.queries).all())
    assert bool((attempt.broken_at[margin <= 0] == 1).all()), "the clean image is the first query"
    x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x_adv, attempt.x_adv)


@pytest.mark.parametrize(("name", "change", "norm"), CASES)
def test_an_attack_raises_its_own_loss(name, change, norm):
    """For every sample, on a smooth model: an attack that does not climb (a loss flat at its start) is no attack."""
    attack = _attack(name, change, norm)
    if name not in MAXIMISERS or getattr(attack, "statistics", "running") != "running":
        pytest.skip("not a maximiser of the loss under running statistics")
    if getattr(attack, "stop_when_broken", False):
        pytest.skip("content with a loss that breaks the sample")
    if (name, norm) == ("hidden_layers", "l1"):
        pytest.skip("what it raises is the sum of the loss and hidden changes, here on one pixel a step")
    model, (x, y) = _smooth(), _images(16)
    x = 0.25 + 0.5 * x.double()
    loss = LOSSES[getattr(attack, "loss", "cross_entropy")]
    with torch.no_grad():
        clean = model(x)
        x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        noise = ThreatModel(norm, EPSILON[norm]).random_start(x, torch.Generator().manual_seed(1))
        gained = loss(model(x_adv), y, clean) - loss(clean, y, clean)
        by_chance = loss(model(noise), y, clean) - loss(clean, y, clean)
    assert float(gained.min()) > 0
    assert float(gained.mean()) > 3 * abs(float(by_chance.mean()))
