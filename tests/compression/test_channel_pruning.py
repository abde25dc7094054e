"""Channel pruning: a smaller dense network that computes what the large one does with those channels at zero."""

import base64
import copy
import json
import sys
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from nas.attacks.pgd import Pgd
from nas.compression.channel_pruning import ChannelPruning
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.packing import pack, unpack
from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError
from nas.model_file import load_model, save_model, with_plan
from nas.threat_model import ThreatModel
from search_spaces.catalogue import space_of
from search_spaces.genotype import StageGenotype
from search_spaces.network import parameter_count

SHAPES = {"resnet": (3, 8, 8), "vgg": (3, 8, 8), "mlp": (1, 8, 8), "vit": (3, 8, 8), "robust": (3, 8, 8)}
STAGES = {
    "resnet": StageGenotype("resnet", (1, 2), (8, 12)),
    "vgg": StageGenotype("vgg", (1, 2), (6, 8)),
    "mlp": StageGenotype("mlp", (2,), (24,)),
    "vit": StageGenotype("vit", (2,), (16,)),
    "robust": StageGenotype(
        "residual",
        (2, 2),
        (8, 12),
        (("block", "robust"), ("scales", 3), ("cardinality", 1), ("base_width", 60), ("se", "residual"), ("stem", 6)),
    ),
}


def _network(kind, make, seed=0):
    """A network in eval mode and images for it."""
    if kind in ("cells", "plain"):
        return make(kind, seed)[1], torch.rand(6, 1, 8, 8)
    shape = SHAPES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        genotype = STAGES[kind]
        constants = (0.5,) * shape[0], (0.25,) * shape[0]
        model = space_of(genotype).build(
            genotype, channels=0, cells=0, input_shape=shape, classes=4, mean=constants[0], std=constants[1],
            auxiliary=False,
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.eval(), torch.rand(6, *shape)


def _setting_for(x, setting):
    """A setting with images of the shape of ``x``, which tells networks without convolutions what they take."""
    from dataclasses import replace

    images = (x * 255).to(torch.uint8)
    y = torch.arange(len(images)) % 3
    data = replace(setting.data, x_train=images, y_train=y, x_test=images, y_test=y)
    return replace(setting, data=data)


def _masks(plan):
    """Layer -> side -> what is kept of it."""
    found = {}
    for layer in plan.layers:
        if layer.action == "replaced":
            counts = dict(zip(("outputs", "inputs"), layer.data["shape"], strict=False))
            found[layer.name] = {
                side: unpack(layer.data[side], torch.Size([count]), layer.name)
                for side, count in counts.items()
                if side in layer.data
            }
    return found


def _zeroed(model, plan):
    """A dense copy in which the channels that the plan takes away give nothing but zeros."""
    zeroed = copy.deepcopy(model)
    modules = dict(zeroed.named_modules())
    with torch.no_grad():
        for name, sides in _masks(plan).items():
            if "outputs" in sides:
                for parameter in modules[name].parameters():
                    parameter[~sides["outputs"]] = 0
    return zeroed


def _same(a, b, x, tolerance):
    """Logits and input gradients are equal."""
    y, found = torch.arange(len(x)) % 3, []
    for model in (a, b):
        images = x.clone().requires_grad_()
        logits = model(images)
        found.append((logits, torch.autograd.grad(F.cross_entropy(logits, y), images)[0]))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(second, first, rtol=tolerance, atol=tolerance)
    assert float(found[0][1].abs().max()) > 0


KINDS = ["cells", "plain", "resnet", "vgg", "mlp", "vit", "robust"]


@pytest.mark.parametrize(("scope", "dtype"), [("layer", torch.float32), ("network", torch.float64)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_network_with_those_channels_at_zero(kind, scope, dtype, make, setting):
    """Every layer that reads a removed channel knows, whatever joins them: additions, halves, concatenations."""
    model, x = _network(kind, make)
    model, x = model.to(dtype), x.to(dtype)
    plan = ChannelPruning(0.85 if kind == "vit" else 0.45, scope=scope).plan(model, _setting_for(x, setting))
    pruned = plan.apply(model)
    assert parameter_count(pruned) < parameter_count(model)
    _same(_zeroed(model, plan), pruned, x, 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_give_nothing_go_first_and_nothing_changes(kind, make, setting):
    model, x = _network(kind, make)
    model, x = model.double(), x.double()
    own = _setting_for(x, setting)
    method = ChannelPruning(0.85 if kind == "vit" else 0.45)
    other = ChannelPruning.plan(method, _network(kind, make, seed=0)[0].double(), own)
    # Other channels than those that are small in this network: turned around.
    turned = Plan(other.method, tuple(_reversed(layer) for layer in other.layers))
    zeroed = _zeroed(model, turned)
    modules = dict(zeroed.named_modules())
    with torch.no_grad():
        for name, sides in _masks(turned).items():
            if "inputs" in sides:
                modules[name].weight.transpose(0, 1)[~sides["inputs"]] = 0
    plan = method.plan(zeroed, own)
    assert parameter_count(plan.apply(zeroed)) < 0.9 * parameter_count(model)
    _same(zeroed, plan.apply(zeroed), x, 1e-9)


def _reversed(layer):
    counts = dict(zip(("outputs", "inputs"), layer.data.get("shape", ()), strict=False))
    masks = {
        side: pack(unpack(layer.data[side], torch.Size([count]), layer.name).flip(0))
        for side, count in counts.items()
        if side in layer.data
    }
    return LayerPlan(layer.name, layer.action, layer.reason, {**layer.data, **masks})


@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_kept_and_less_is_part_of_more(kind, scope, make, setting):
    model, x = _network(kind, make)
    own, total = _setting_for(x, setting), parameter_count(model)
    before, masks = total, None
    for keep in (0.95, 0.9, 0.85) if kind == "vit" else (0.8, 0.5, 0.3):
        plan = ChannelPruning(keep, scope=scope).plan(model, own)
        pruned = plan.apply(model)
        assert 0.7 * keep * total <= parameter_count(pruned) <= keep * total
        assert parameter_count(pruned) < before
        for name, sides in (masks or {}).items():
            for side, mask in sides.items():
                assert bool((_masks(plan)[name][side] <= mask).all()), "what was gone stays gone"
        before, masks = parameter_count(pruned), _masks(plan)
        assert plan == ChannelPruning(keep, scope=scope).plan(model, own)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_changes_nothing(kind, make, setting):
    model, x = _network(kind, make)
    plan = ChannelPruning(1.0).plan(model, _setting_for(x, setting))
    assert all(layer.action == "skipped" and layer.reason for layer in plan.layers)
    assert [layer.name for layer in plan.layers] == list(deployed_layers(model))
    assert torch.equal(plan.apply(model)(x), model(x))


@pytest.mark.parametrize("kind", ["cells", "plain", "resnet", "vgg", "mlp"])
def test_what_cannot_be_reached_is_refused_with_what_can(kind, make, setting):
    model, x = _network(kind, make)
    own = _setting_for(x, setting)
    with pytest.raises(InputError, match="cannot be reached") as error:
        ChannelPruning(1e-6).plan(model, own)
    least = float(str(error.value).split()[-2])
    pruned = ChannelPruning(least * 1.02).plan(model, own).apply(model)
    assert all(min(layer.weight.shape) >= 1 for layer in deployed_layers(pruned).values())
    assert pruned(x).shape == model(x).shape, "classes stay"
    (first, *_, last), (first_before, *_, last_before) = (deployed_layers(m).values() for m in (pruned, model))
    assert first.weight.shape[1] == first_before.weight.shape[1], "images stay"
    assert len(last.weight) == len(last_before.weight)


def test_native_kernels_still_compute_the_same_and_still_fit(make, setting):
    """Against torch's own operations, as hooks keep the kernels away: logits, statistics, gradients."""
    fit = 0
    for seed in range(2):
        model, x = _network("cells", make, seed)
        for keep in (0.7, 0.4):
            pruned = ChannelPruning(keep).plan(model, setting).apply(model)
            fit += sum(cell._parts() is not None for cell in pruned.cells)
            watched = copy.deepcopy(pruned)
            for module in watched.modules():
                module.register_forward_hook(lambda module, given, y: None)
            for mode in (False, True):
                found = []
                for network in (pruned.train(mode), watched.train(mode)):
                    images = torch.cat([x, x[:2].flip(3)]).requires_grad_()
                    loss = F.cross_entropy(network(images), torch.arange(8) % 3)
                    weights = [p for n, p in network.named_parameters() if not n.startswith("auxiliary.")]
                    found.append([loss, *torch.autograd.grad(loss, [images, *weights])])
                for first, second in zip(*found, strict=True):
                    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
            for name, value in pruned.state_dict().items():
                torch.testing.assert_close(value, watched.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert fit >= 0.7 * 2 * 2 * 4, "as long as all groups shrink in step"


def test_a_pool_that_gets_fewer_channels_than_it_was_made_for():
    """And does not read beyond them."""
    from search_spaces.operations import AvgPool, MaxPool

    x = torch.rand(4, 3, 8, 8)
    for kind, expected in ((MaxPool, F.max_pool2d), (AvgPool, F.avg_pool2d)):
        more = {} if kind is MaxPool else {"count_include_pad": False}
        torch.testing.assert_close(kind(5, 2)(x), expected(x, 3, 2, 1, **more))


def _perceptron():
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model[3].weight.mul_(torch.rand(8, 1, generator=generator) * 10)
    return model.double().eval()


def _scores(model, strengths):
    """Of both hidden layers, by hand: the mean of what goes in and what comes out."""
    first, second, third = strengths
    return (first.sum(1) + second.sum(0)) / 2, (second.sum(1) + third.sum(0)) / 2


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_the_least_important_channels_go(importance, setting):
    model = _perceptron()
    attack = Pgd(ThreatModel("linf", 0.1), steps=2)
    plan = ChannelPruning(0.5, importance, images=1000, attack=attack).plan(model, setting)
    weights = [model[i].weight for i in (1, 3, 5)]
    if importance == "magnitude":
        strengths = [weight.detach().square() for weight in weights]
    else:
        rows = setting.split.training
        x, y = setting.data.x_train[rows].double() / 255, setting.data.y_train[rows]
        from nas.randomness import generator

        streams = generator(0, "channel pruning attack")
        total = [torch.zeros_like(weight) for weight in weights]
        for part, labels in zip(x.split(16), y.split(16), strict=True):
            adversarial = attack(model, part, labels, generator=streams)
            loss = F.cross_entropy(model(adversarial), labels, reduction="sum")
            total = [t + g for t, g in zip(total, torch.autograd.grad(loss, weights), strict=True)]
        strengths = [(w * t).abs().detach() for w, t in zip(weights, total, strict=True)]
    masks, removed = _masks(plan), 0
    for name, score in zip(("1", "3"), _scores(model, strengths), strict=True):
        kept = masks[name]["outputs"]
        assert torch.equal(kept, masks[str(int(name) + 2)]["inputs"])
        assert float(score[kept].min()) >= float(score[~kept].max())
        removed += int((~kept).sum())
    assert removed > 4


@pytest.mark.parametrize(
    "kind,scope",
    [(kind, scope) for kind in ("resnet", "plain", "mlp") for scope in ("layer", "network")] + [("cells", "layer")],
)
def test_in_steps_every_layer_keeps_a_multiple_and_the_most_important(kind, scope, make, setting):
    model, x = _network(kind, make)
    own = _setting_for(x, setting)
    widths = {name: len(layer.weight) for name, layer in deployed_layers(model).items()}
    step = 2
    assert all(width % step == 0 for width in [*widths.values()][:-1]), "all but the classes"
    single = _masks(ChannelPruning(0.6, scope=scope).plan(model, own))
    plan = ChannelPruning(0.6, scope=scope, step=step).plan(model, own)
    pruned = plan.apply(model)
    assert parameter_count(pruned) <= 0.6 * parameter_count(model)
    whole = {
        (name, side): mask
        for name, sides in _masks(plan).items()
        for side, mask in sides.items()
        if side == "inputs" or name.rpartition(".")[2] not in ("even", "odd")  # halves of a layer
    }
    assert not {place: len(mask) for place, mask in whole.items() if int(mask.sum()) % step}
    odd = [name for name, sides in single.items() for mask in sides.values() if int(mask.sum()) % step]
    assert odd, "one by one they would not be"
    for name, sides in _masks(plan).items():
        for side, mask in sides.items():
            other = single.get(name, {}).get(side, torch.ones_like(mask))
            assert bool((mask <= other).all()) or bool((other <= mask).all()), "the same ranking"


def test_a_group_that_is_no_multiple_first_becomes_one_and_small_ones_stay(setting):
    model = _perceptron()  # 10 and 8 hidden units
    masks = _masks(ChannelPruning(0.8, step=4).plan(model, setting))
    assert int(masks["1"]["outputs"].sum()) == 8
    masks = _masks(ChannelPruning(0.9, step=8).plan(model, setting))
    assert int(masks["1"]["outputs"].sum()) == 8 and "outputs" not in masks.get("3", {})
    with pytest.raises(InputError, match="with 8 channels left in every layer"):
        ChannelPruning(0.5, step=8).plan(model, setting)


def test_scope_decides_who_competes(setting):
    model = _perceptron()
    layer = _masks(ChannelPruning(0.5, scope="layer").plan(model, setting))
    shares = [float(layer[name]["outputs"].double().mean()) for name in ("1", "3")]
    assert abs(shares[0] - shares[1]) <= 0.13
    network = _masks(ChannelPruning(0.5, scope="network").plan(model, setting))
    scores = _scores(model, [model[i].weight.detach().square() for i in (1, 3, 5)])
    relative = torch.cat([score / score.mean() for score in scores])
    kept = torch.cat([network[name]["outputs"] for name in ("1", "3")])
    assert float(relative[kept].min()) >= float(relative[~kept].max())


def test_a_vision_transformer_loses_hidden_units_only(make, setting):
    model, x = _network("vit", make)
    plan = ChannelPruning(0.85).plan(model, _setting_for(x, setting))
    replaced = {layer.name for layer in plan.layers if layer.action == "replaced"}
    assert replaced
    assert all(".mlp." in name for name in replaced)
    reasons = {layer.name: layer.reason for layer in plan.layers if layer.action == "skipped"}
    assert "tied to" in reasons["network.conv_proj"]
    assert "within another layer" in reasons["network.encoder.layers.encoder_layer_0.self_attention.out_proj"]


class _Odd(nn.Module):
    """Layers that must be left alone, beside one that need not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.again = nn.Conv2d(8, 8, 1)
        self.free = nn.Conv2d(8, 6, 1)
        self.tied = nn.Conv2d(6, 6, 1)
        self.tied2 = nn.Conv2d(6, 6, 1)
        self.tied2.weight = self.tied.weight
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.end = nn.Conv2d(6, 5, 1)
        self.normed = nn.Conv2d(5, 5, 1)
        nn.utils.parametrizations.weight_norm(self.normed)
        self.spare = nn.Conv2d(5, 16, 1)
        self.back = nn.Conv2d(16, 5, 1)
        self.classifier = nn.Linear(5, 3)

    def forward(self, x):
        x = self.again(self.again(self.grouped(self.first(x)).relu()).relu())
        x = self.free(x).relu()
        x = self.tied2(self.tied(x) * self.scale)
        x = self.normed(self.end(x).relu())
        x = x + self.back(self.spare(x).relu())
        return self.classifier(x.mean((2, 3)))


def test_layers_that_must_be_left_alone_say_why():
    model = _Odd().double().eval()
    plan = ChannelPruning(0.9).plan(model)
    assert {layer.name for layer in plan.layers if layer.action == "replaced"} == {"spare", "back"}
    reasons = {layer.name: layer.reason for layer in plan.layers if layer.action == "skipped"}
    for name, told in {
        "first": "grouped convolution", "grouped": "grouped convolution", "again": "called more than once",
        "tied": "shares its weight", "tied2": "shares its weight", "normed": "computed", "classifier": "classes",
        "free": "shares its weight", "end": "computed",
    }.items():  # fmt: skip
        assert told in reasons[name], name
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(plan.apply(model)(x), _zeroed(model, plan)(x))


def test_masks_are_cut_with_their_weights(make, setting):
    for kind in ("cells", "plain"):
        model, x = _network(kind, make)
        masked = MagnitudePruning(0.5).plan(model).apply(model)
        plan = ChannelPruning(0.5).plan(masked, setting)
        pruned = plan.apply(masked)
        masks = _masks(plan)
        for name, layer in deployed_layers(pruned).items():
            before = deployed_layers(masked)[name]
            assert parametrize.is_parametrized(layer) == parametrize.is_parametrized(before)
            weight = before.weight
            for axis, side in enumerate(("outputs", "inputs")):
                if side in masks.get(name, {}):
                    weight = weight.index_select(axis, masks[name][side].nonzero().flatten())
            assert torch.equal(layer.weight, weight)
        assert pruned(x).shape == model(x).shape


def test_pruning_again_prunes_further(kind, make, setting):
    model, x = _network(kind, make)
    once = ChannelPruning(0.7).plan(model, setting).apply(model)
    plan = ChannelPruning(0.6).plan(once, setting)
    twice = plan.apply(once)
    assert parameter_count(twice) <= 0.6 * parameter_count(once)
    _same(_zeroed(once, plan), twice, x, 1e-5)


def test_a_plan_survives_json_and_model_json_and_needs_no_library(kind, make, setting, tmp_path, monkeypatch):
    spec, model = make(kind)
    state, streams = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan = ChannelPruning(0.5).plan(model, setting)
    assert torch.equal(torch.get_rng_state(), streams)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))
    assert again == plan
    pruned = again.apply(model)
    save_model(with_plan(spec, again), pruned, tmp_path)
    _, loaded = load_model(tmp_path)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded(x), pruned(x))
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_the_auxiliary_head_still_fits(make, setting):
    """It is called in train mode only, on a map that has become narrower."""
    model, _ = _network("cells", make)
    before = parameter_count(model.auxiliary)
    pruned = ChannelPruning(0.5).plan(model, setting).apply(model).train()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
    seen = []
    pruned.auxiliary.register_forward_hook(lambda module, given, output: seen.append(output))
    loss = F.cross_entropy(pruned(x), y) + F.cross_entropy(seen[0], y)
    loss.backward()
    assert parameter_count(pruned.auxiliary) < before
    assert all(p.grad is not None for p in pruned.parameters())


def test_wrong_settings_are_refused(setting):
    for wrong in (
        {"keep": 0.0},
        {"keep": 1.1},
        {"keep": float("nan")},
        {"importance": "x"},
        {"scope": "x"},
        {"images": 0},
        {"step": 0},
    ):
        with pytest.raises(InputError):
            ChannelPruning(**wrong)
    model = _perceptron()
    with pytest.raises(InputError, match="data"):
        ChannelPruning(importance="taylor").plan(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()))
    with pytest.raises(InputError, match="data"):
        ChannelPruning().plan(model)
    with pytest.raises(InputError, match="no convolution"):
        ChannelPruning().plan(nn.Sequential(nn.Flatten()), setting)


def test_a_damaged_or_foreign_plan_is_refused(make, setting):
    plans = {kind: ChannelPruning(0.5).plan(make(kind)[1], setting) for kind in ("cells", "plain")}
    for kind, other in (("cells", "plain"), ("plain", "cells")):
        with pytest.raises(InputError, match="another network"):
            plans[kind].apply(make(other)[1])
    _, model = make("plain")
    layers = plans["plain"].layers
    index = next(i for i, layer in enumerate(layers) if "inputs" in layer.data)
    good = layers[index].data
    count = good["shape"][1]
    more = pack(torch.ones(count + 16, dtype=torch.bool))
    for data in (
        {}, {"shape": None}, {"shape": [1]}, {"shape": [10**12, 1]}, {"inputs": None}, {"inputs": 5}, {"inputs": "!!"},
        {"inputs": base64.b64encode(zlib.compress(bytes(10**7))).decode()}, {"inputs": more},
        {"inputs": pack(torch.zeros(count, dtype=torch.bool))},
    ):  # fmt: skip
        damaged = LayerPlan(layers[index].name, "replaced", "wrong", {**good, **data} if data else {})
        with pytest.raises(InputError, match=r"another network|damaged"):
            Plan("channel_pruning", (*layers[:index], damaged, *layers[index + 1 :])).apply(model)
