"""GDWS: identities of the layer, optimality against brute force, weights against autograd, and plans that hold."""

import base64
import copy
import dataclasses
import itertools
import json
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.pgd import Pgd
from nas.compression import gdws
from nas.compression.channel_pruning import ChannelPruning
from nas.compression.fold_batchnorm import BatchNormFolding
from nas.compression.gdws import Gdws, error_weights
from nas.compression.generalised_separable import (
    Choice,
    GeneralisedSeparableConv2d,
    kernel_squares,
    most_kernels,
    separated,
    shared_out,
    step_cost,
)
from nas.compression.int8 import Int8Quantisation
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.plan import LayerPlan, Plan, plan_for
from nas.compression.size import stored_size
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.export.onnx_file import INPUT, OUTPUT, onnx_bytes
from nas.model_file import ModelSpec, load_model, save_model, with_plan
from nas.model_state import constant, crafting
from nas.objective import Setting
from nas.prediction import MeanOfParticles
from nas.threat_model import ThreatModel
from search_spaces.dsara import SPACE
from search_spaces.genotype import StageGenotype

GEOMETRIES = {
    "3x3": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "both, no bias": {"stride": 2, "dilation": 2, "padding": (2, 1), "bias": False},
    "same": {"padding": "same", "dilation": 2},
    "even kernel": {"kernel_size": (2, 4), "padding": "same", "dilation": 2},
    "oblong": {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 1)},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "grouped": {"groups": 3, "padding": 1},
    "fewer outputs than taps": {"out_channels": 3, "kernel_size": 5},
    "grouped, few outputs": {"groups": 3, "out_channels": 6, "dilation": 2},
}


def _convolution(in_channels=6, out_channels=12, kernel_size=3, *, dtype=torch.float64, seed=0, **geometry):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(in_channels, out_channels, kernel_size, **geometry).to(dtype)


def _x(n=5, channels=6, size=9, dtype=torch.float64, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _blocks(layer):
    """The definition: for each input channel the matrix [O / groups, kh kw] of what it is multiplied by."""
    weight = layer.weight.detach().double()
    per_group = weight.shape[0] // layer.groups
    return [
        weight[group * per_group : (group + 1) * per_group, channel].flatten(1).numpy()
        for group in range(layer.groups)
        for channel in range(weight.shape[1])
    ]


def _channel_losses(layer, alpha=None):
    """For each channel the loss that 0, 1, 2, ... kernels leave, by the singular values of its block."""
    losses = []
    for channel, block in enumerate(_blocks(layer)):
        squares = np.linalg.svd(block, compute_uv=False) ** 2
        scale = 1.0 if alpha is None else float(alpha[channel])
        losses.append([scale * squares[taken:].sum() for taken in range(len(squares) + 1)])
    return losses


def _net(seed=0, width=8, dtype=torch.float32):
    """A plain network with room for kernels, whose normalisation has seen images."""
    genotype = StageGenotype("plain", (2, 2), (width, 12))
    spec = ModelSpec(genotype, 1, 1, (1, 8, 8), ("a", "b", "c"), (0.4,), (0.25,))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = spec.build().to(dtype)
        for _ in range(30):
            model.train()(torch.rand(64, 1, 8, 8, dtype=dtype))
        nn.init.normal_(model.classifier.weight)
    return spec, model.eval()


def _setting(model, images=40, batch_size=16, seed=0, channels=1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(256, (images, channels, 8, 8), generator=generator).to(torch.uint8)
    data = ImageData("noise", x, torch.arange(images) % 3, x[:4], torch.arange(4) % 3, ("a", "b", "c"))
    return Setting(model, data, split(data.y_train, architecture=0.5, validation=0.1, seed=0), seed, 0, batch_size)


def _replaced(plan):
    return [layer for layer in plan.layers if layer.action == "replaced"]


def _skipped(plan):
    return {layer.name: layer.reason for layer in plan.layers if layer.action == "skipped"}


def _kernels(plan, model):
    layers = deployed_layers(model)
    return {layer.name: gdws._unpack(layer, layers[layer.name]) for layer in _replaced(plan)}


def _implicit(model, compressed):
    """``model`` with the weights that the layers of ``compressed`` amount to."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in compressed.named_modules():
            if isinstance(module, GeneralisedSeparableConv2d):
                dense.get_submodule(name).weight.copy_(module.dense_weight())
    return dense


# --- the layer


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_with_all_kernels_the_layer_is_the_convolution(geometry, dtype, most):
    layer, x = _convolution(dtype=dtype, **geometry), _x(dtype=dtype)
    full = most_kernels(layer.weight.shape, layer.groups)
    new = separated(layer, [full] * layer.in_channels)
    expected = layer(x).detach()
    assert new(x).shape == expected.shape
    assert float((new(x).detach() - expected).abs().max() / expected.abs().max()) < most
    assert new.index is None, "as many kernels of each channel need no gather"


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_with_few_kernels_it_is_the_convolution_with_truncated_blocks(geometry):
    """Explicit and implicit form are the same function, and what is lost are the singular values left out."""
    layer = _convolution(**geometry)
    kernels = [2, 0, 1, 1, 2, 0] if layer.groups == 1 else [2, 0, 1, 1, 0, 2]
    new = separated(layer, kernels)
    assert new.index.tolist() == [c for c, count in enumerate(kernels) for _ in range(count)]
    implicit = copy.deepcopy(layer)
    with torch.no_grad():
        implicit.weight.copy_(new.dense_weight())
    torch.testing.assert_close(new(_x()), implicit(_x()), rtol=1e-12, atol=1e-12)
    losses = _channel_losses(layer)
    for block, was, count, loss in zip(_blocks(implicit), _blocks(layer), kernels, losses, strict=True):
        assert np.linalg.matrix_rank(block) == count
        assert ((was - block) ** 2).sum() == pytest.approx(loss[count], abs=1e-12)


def test_both_factors_of_a_kernel_have_like_magnitudes():
    new = separated(_convolution(groups=3), [2] * 6)
    columns = new.pointwise.weight.view(3, 4, 4).transpose(1, 2).reshape(12, 4)
    torch.testing.assert_close(columns.norm(dim=1), new.depthwise.weight.flatten(1).norm(dim=1))


@pytest.mark.parametrize("kernels", [[1, 3, 0, 2, 1, 1], [2] * 6])
def test_multiplications_and_numbers_are_those_of_the_formula(kernels):
    layer, total = _convolution(kernel_size=5, stride=2, padding=2), sum(kernels)
    new = separated(layer, kernels)
    with FlopCounterMode(display=False) as counter:
        pixels = new(_x(1))[0, 0].numel()
    assert counter.get_total_flops() == 2 * pixels * total * (25 + 12)
    assert new.depthwise.weight.numel() + new.pointwise.weight.numel() == total * (25 + 12)
    assert step_cost(layer.weight.shape, 1) == 25 + 12
    assert stored_size(new).dense == 8 * (total * (25 + 12) + 12)
    assert step_cost(_convolution(groups=3).weight.shape, 3) == 3 * (9 + 4)


def test_layers_keep_what_the_convolution_had():
    layer = _convolution(dtype=torch.float32, padding=1).to(memory_format=torch.channels_last).eval()
    layer.weight.requires_grad_(False)
    before = torch.get_rng_state()
    new = separated(layer, [1, 2, 1, 1, 1, 1])
    assert torch.equal(torch.get_rng_state(), before)
    assert not new.training
    assert not new.depthwise.weight.requires_grad and not new.pointwise.weight.requires_grad
    assert new.pointwise.bias.requires_grad and torch.equal(new.pointwise.bias, layer.bias)
    assert new.depthwise.weight.dtype == torch.float32
    assert new.depthwise.weight.is_contiguous(memory_format=torch.channels_last)
    half = separated(layer.to(torch.bfloat16), [1] * 6)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert separated(layer.to("meta"), [1, 2, 1, 1, 1, 1], fit=False).index.device.type == "meta"


def test_maps_stay_in_their_memory_order():
    """A gather that puts channels first costs the depthwise convolution twice its time."""
    new, x = separated(_convolution(), [1, 2, 0, 1, 1, 3]), _x()
    seen = []
    new.depthwise.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    first = x.clone().requires_grad_()
    results = [(y := new(given), *torch.autograd.grad(y.square().sum(), given)) for given in (first, last)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert seen[0].is_contiguous() and seen[1].is_contiguous(memory_format=torch.channels_last)


def test_the_layer_trains_copies_and_moves_like_any_other():
    new = separated(_convolution(), [1, 2, 0, 1, 1, 1])
    torch.testing.assert_close(copy.deepcopy(new)(_x()), new(_x()), rtol=0, atol=0)
    assert list(new.state_dict()) == ["depthwise.weight", "pointwise.weight", "pointwise.bias"]
    assert torch.autograd.gradcheck(lambda x: new(x), _x(1, size=4).requires_grad_(), atol=1e-6)
    new(_x()).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in new.parameters())


# --- how many kernels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("geometry", [{}, {"groups": 2, "out_channels": 6}, {"out_channels": 3}])
def test_kernels_are_the_best_of_all_by_brute_force(weighted, geometry):
    """Both budgets: least error of a number of kernels, and fewest kernels within an error."""
    layer = _convolution(
        **{"in_channels": 4 if geometry.get("groups") else 3, "out_channels": 5, **geometry, "kernel_size": 2}
    )
    alpha = torch.tensor([0.2, 3.0, 1.0, 0.7])[: layer.in_channels] if weighted else None
    choice, losses = Choice.of(layer.weight, layer.groups, alpha), _channel_losses(layer, alpha)
    inside = layer.in_channels // layer.groups
    best = {}
    for kernels in itertools.product(*(range(len(loss)) for loss in losses)):
        sums = {sum(kernels[first : first + inside]) for first in range(0, len(kernels), inside)}
        if len(sums) == 1:
            loss = sum(losses[c][count] for c, count in enumerate(kernels))
            best[min(sums)] = min(best.get(min(sums), np.inf), loss)
    assert len(choice.gains) == max(best)
    for steps, loss in best.items():
        kernels = choice.kernels(steps)
        assert sum(kernels) == steps * layer.groups
        found = sum(losses[c][count] for c, count in enumerate(kernels))
        assert found == pytest.approx(loss, abs=1e-12)
        assert float(choice.errors[steps]) == pytest.approx(loss, abs=1e-12)
    chance = np.random.default_rng(0)
    for error in chance.uniform(0, best[0], 200):
        fewest = min(steps for steps, loss in best.items() if loss <= error)
        assert choice.steps_within(float(error)) == max(1, fewest)


@pytest.mark.parametrize("geometry", [{}, {"groups": 3}, {"out_channels": 5}])
def test_error_and_kernels_are_each_others_inverse(geometry):
    choice = Choice.of(_convolution(**geometry).weight, geometry.get("groups", 1))
    errors = choice.errors.tolist()
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert [choice.steps_within(errors[steps]) for steps in range(1, len(errors))] == [*range(1, len(errors))]
    assert choice.steps_within(errors[0]) == 1, "a layer keeps a kernel"


def test_no_error_takes_as_many_kernels_as_the_blocks_have_rank():
    layer = _convolution(dtype=torch.float32)
    with torch.no_grad():
        layer.weight[:, 1] = 0
        layer.weight[:, 2] = torch.rand(12, 1, 1) * torch.rand(1, 3, 3)
        layer.weight[:, 4] = (torch.rand(12, 2) @ torch.rand(2, 9)).view(12, 3, 3)
    choice = Choice.of(layer.weight, 1)
    assert choice.kernels(choice.steps_within(0.0)) == [9, 0, 1, 9, 2, 9]
    assert (kernel_squares(layer.weight, 1) > 0).sum(1).tolist() == [9, 0, 1, 9, 2, 9]


def test_kernels_go_with_their_channels():
    layer, order = _convolution(), torch.tensor([3, 0, 5, 1, 4, 2])
    choice, other = Choice.of(layer.weight, 1), Choice.of(layer.weight[:, order], 1)
    for steps in range(len(choice.gains) + 1):
        kernels = choice.kernels(steps)
        assert other.kernels(steps) == [kernels[channel] for channel in order]


def _cases(chance):
    """Two or three small layers, of which some are best left dense."""
    choices = []
    for seed in range(int(chance.integers(2, 4))):
        layer = _convolution(2, int(chance.integers(2, 6)), 2, seed=int(chance.integers(1000)) + seed)
        scale = float(chance.choice([0.1, 1.0, 10.0]))
        choices.append(Choice.of(layer.weight * scale, 1))
    return [choice for choice in choices if choice.limit >= 1]


def _spent(choices, steps):
    pairs = zip(choices, steps, strict=True)
    return sum(choice.dense if taken is None else taken * choice.cost for choice, taken in pairs)


def _left(choices, steps):
    pairs = zip(choices, steps, strict=True)
    return sum(0.0 if taken is None else float(choice.errors[taken]) for choice, taken in pairs)


def test_a_budget_is_shared_out_by_brute_force_as_well_as_is_promised():
    chance, optimal, one = np.random.default_rng(0), 0, 0
    for _ in range(60):
        choices = _cases(chance)
        every = [[None, *range(1, choice.limit + 1)] for choice in choices]
        points = sorted((_spent(choices, steps), _left(choices, steps)) for steps in itertools.product(*every))
        largest = max(choice.dense - choice.cost for choice in choices)
        least, most = points[0][0], max(choice.dense for choice in choices) + points[-1][0]
        last = np.inf
        for budget in range(least, most, 3):
            steps = shared_out(choices, budget)
            error = _left(choices, steps)
            best = min(left for spent, left in points if spent <= budget)
            smaller = min((left for spent, left in points if spent <= budget - largest), default=np.inf)
            assert _spent(choices, steps) <= budget
            assert best - 1e-12 <= error <= smaller + 1e-12
            assert all(
                taken is None or 1 <= taken <= choice.limit for taken, choice in zip(steps, choices, strict=True)
            )
            last = min(last, error)
            optimal, one = optimal + (error <= best + 1e-12), one + 1
        assert shared_out(choices, sum(choice.dense for choice in choices)) is not None
        assert _left(choices, shared_out(choices, sum(choice.dense for choice in choices))) == 0
    assert optimal / one > 0.5, "mostly the optimum itself"


def test_of_one_layer_a_budget_is_spent_in_the_best_way():
    for shape in ((3, 5), (2, 3), (4, 2)):
        choice = Choice.of(_convolution(*shape, 2).weight, 1)
        for budget in range(choice.cost, choice.dense + choice.cost):
            (steps,) = shared_out([choice], budget)
            if budget >= choice.dense:
                assert steps is None
            else:
                assert steps == min(choice.limit, budget // choice.cost)


# --- error weights


def _by_autograd(model, layers, x, competitors):
    """The definition, image by image and class by class."""
    sums = {name: torch.zeros(layer.in_channels, dtype=torch.float64) for name, layer in layers.items()}
    for image in x:
        logits = model(image[None])[0]
        order = logits.argsort(descending=True)
        for other in order[1 : 1 + (competitors or len(order))]:
            margin = logits[order[0]] - logits[other]
            gradients = torch.autograd.grad(margin, [layer.weight for layer in layers.values()], retain_graph=True)
            for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
                size = gradient.shape[0] // layer.groups * gradient.shape[2:].numel()
                squares = gradient.unflatten(0, (layer.groups, -1)).square().sum((1, 3, 4)).flatten()
                sums[name] += squares / (2 * (margin.detach() + 1e-6) ** 2 * size) / len(x)
    return sums


class _Awkward(nn.Module):
    """All that differs between convolutions, one used twice, activations in place, and few pixels at the end."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.twice = nn.Conv2d(4, 4, (3, 2), padding="same", dilation=2)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect")
        self.few = nn.Conv2d(6, 12, 3, padding=1, padding_mode="circular", stride=2)
        self.again = nn.Conv2d(12, 12, (1, 3), padding="same")
        self.unused = nn.Conv2d(6, 12, 3)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        x = self.relu(self.twice(self.relu(self.twice(x))))
        x = self.few(self.relu(self.grouped(x)))
        return self.head(self.again(self.again(x)).mean((2, 3)))


@pytest.mark.parametrize("competitors", [0, 2])
@pytest.mark.parametrize("room", [gdws.ROOM, 1])
def test_error_weights_are_those_of_the_definition(competitors, room, monkeypatch):
    monkeypatch.setattr(gdws, "ROOM", room)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Awkward().double().eval()
    layers = {name: getattr(model, name) for name in ("twice", "grouped", "few", "again")}
    x = _x(6, 1, 8)
    expected = _by_autograd(model, layers, x, competitors)
    found = error_weights(model, {**layers, "unused": model.unused}, x, competitors)
    assert found.keys() == expected.keys(), "of a layer that is not called nothing is known"
    for name, alpha in expected.items():
        torch.testing.assert_close(found[name].double(), alpha, rtol=1e-9, atol=0)
        assert float(alpha.max()) > 0


def test_error_weights_of_a_linear_model_have_a_closed_form():
    """Logits W x: the gradient of z_a - z_j is x in row a and -x in row j, so its square is 2 |x_c|^2."""
    layer = _convolution(3, 4, 5)
    model, x = nn.Sequential(layer, nn.Flatten()), _x(7, 3, 5)
    logits = model(x).detach()
    top = logits.max(1, keepdim=True)
    others = torch.ones_like(logits).scatter(1, top.indices, 0)
    inverse = (others / (top.values - logits + 1e-6).square()).sum(1)
    closed = (x.square().sum((2, 3)) * inverse[:, None]).mean(0) / (4 * 25)
    torch.testing.assert_close(error_weights(model, {"0": layer}, x)["0"].double(), closed, rtol=1e-10, atol=0)


def test_a_tie_weighs_much_but_not_infinitely():
    layer = _convolution(3, 4, 5)
    with torch.no_grad():
        layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
        layer.bias[:2] += 100
    alpha = error_weights(nn.Sequential(layer, nn.Flatten()), {"0": layer}, _x(7, 3, 5))["0"]
    assert bool(alpha.isfinite().all()) and float(alpha.min()) > 1e6


def test_images_near_a_decision_do_not_outweigh_the_others():
    """Of a linear model: with a floor, an almost tied image counts a few times as much as another, not a million."""
    layer, x = _convolution(3, 2, 5), _x(8, 3, 5)
    model = nn.Sequential(layer, nn.Flatten())
    with torch.no_grad():
        gaps = model(x)[:, 0] - model(x)[:, 1]
        layer.bias[0] -= gaps[3] - 1e-3  # the fourth image is tied now
        floor = float((gaps - gaps[3] + 1e-3).abs().median())
    for given, most in ((0.0, 1.0), (floor, 0.4)):
        alone = error_weights(model, {"0": layer}, x[3:4], floor=given)["0"].sum()
        share = float(alone / 8 / error_weights(model, {"0": layer}, x, floor=given)["0"].sum())
        assert (0.99 if given == 0 else 0.0) < share < most


def test_weighing_leaves_the_network_alone():
    _, model = _net()
    model.train()
    model.features[4].eval()
    layers = {name: layer for name, layer in deployed_layers(model).items() if isinstance(layer, nn.Conv2d)}
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    before = torch.get_rng_state()
    alone = error_weights(model, layers, _x(4, 1, 8, torch.float32))
    Gdws(weights="adversarial", attack=Pgd(ThreatModel("linf", 0.1), steps=2)).plan(model, _setting(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    after = error_weights(model.eval(), layers, _x(4, 1, 8, torch.float32))
    assert all(torch.equal(alone[name], after[name]) for name in layers), "of running statistics in any mode"


def _rescaled(model, factor):
    """The same function: the last convolution is larger, its normalisation undoes that."""
    other = copy.deepcopy(model)
    norm = other.features[10]
    with torch.no_grad():
        other.features[9].weight.mul_(factor)
        norm.running_mean.mul_(factor)
        norm.running_var.add_(norm.eps).mul_(factor**2).sub_(norm.eps)
    return other


def test_weighed_errors_do_not_depend_on_the_scale_of_weights():
    _, model = _net(dtype=torch.float64)
    other = _rescaled(model, 10.0)
    torch.testing.assert_close(other(_x(4, 1, 8)), model(_x(4, 1, 8)))
    for weights in ("adversarial", "relative"):
        weighed = Gdws(keep=0.5, weights=weights, attack=Pgd(ThreatModel("linf", 0.05), steps=2))
        kernels = [_kernels(weighed.plan(net, _setting(net)), net) for net in (model, other)]
        assert kernels[0] == kernels[1] and kernels[0]
    unit = Gdws(keep=0.5, weights="unit")
    assert _kernels(unit.plan(model), model) != _kernels(unit.plan(other), other)


def test_attack_seed_and_samples_decide_what_errors_are_weighed_on(monkeypatch):
    _, model = _net()
    seen, floors = [], []

    def noted(model, layers, x, competitors, floor):
        seen.append(x)
        floors.append(floor)
        assert competitors == 1
        return error_weights(model, layers, x, competitors, floor)

    monkeypatch.setattr(gdws, "error_weights", noted)
    method = Gdws(
        weights="adversarial", samples=20, competitors=1, margin=0.5, attack=Pgd(ThreatModel("linf", 0.1), steps=1)
    )

    def images(method, **setting):
        seen.clear()
        method.plan(model, _setting(model, **setting))
        return [len(x) for x in seen], torch.cat(seen)

    sizes, x = images(method)
    assert sizes == [16, 4]
    top = model(x).detach().topk(2).values
    assert floors == [pytest.approx(0.5 * float((top[:, 0] - top[:, 1]).median()))] * 2
    layers = {"features.6": model.features[6]}
    torch.testing.assert_close(
        method._alphas(model, layers, _setting(model)), error_weights(model, layers, x, 1, floors[0]), rtol=1e-6, atol=0
    )
    assert torch.equal(x, images(method)[1]), "the same arguments, the same plan"
    assert not torch.equal(x, images(method, seed=1)[1])
    assert images(dataclasses.replace(method, samples=1000))[0] == [16, 16, 4], "the 36 that are trained on"
    training = _setting(model)
    clean = training.data.x_train[training.split.training].float() / 255
    nearest = [(image - clean).abs().amax((1, 2, 3)).min() for image in x]
    assert all(0 < float(distance) <= 0.1 + 1e-6 for distance in nearest), "training images, attacked"


# --- plans


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.35])
def test_the_budget_is_met_by_the_numbers_that_the_layers_really_hold(keep):
    _, model = _net()
    plan = Gdws(keep, weights="unit", step=1).plan(model)
    compressed = plan.apply(model)
    layers = deployed_layers(model)
    competing = [name for name in layers if name not in ("features.0", "classifier")]
    before = sum(layers[name].weight.numel() for name in competing)
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in compressed.parameters())
    assert (1 - keep) * before <= saved < (1 - keep) * before + 30, "with less than a kernel to spare"
    for layer in _replaced(plan):
        new, numbers = compressed.get_submodule(layer.name), layers[layer.name].weight.numel()
        now = sum(p.numel() for p in new.parameters())
        assert now < numbers
        assert f"{sum(new.kernels)} kernels" in layer.reason and f"{now} numbers for {numbers}" in layer.reason


@pytest.mark.parametrize("step", [4, 8])
def test_kernels_come_in_the_multiples_that_engines_want(step):
    _, model = _net()
    for method in (Gdws(0.6, step=step), Gdws(error=0.3, weights="relative", step=step)):
        kernels = _kernels(method.plan(model), model)
        assert kernels and all(sum(counts) % step == 0 for counts in kernels.values())
    for groups in (1, 2, 3):
        layer = _convolution(12, groups=groups)
        single, several = (Choice.of(layer.weight, groups, multiple=multiple) for multiple in (1, step))
        assert (several.size * groups) % step == 0 and several.cost == several.size * single.cost
        assert len(several.errors) == len(several.gains) + 1
        for steps in range(several.limit + 1):
            assert several.kernels(steps) == single.kernels(steps * several.size)
            assert float(several.errors[steps]) == float(single.errors[steps * several.size])
            if steps:
                removed = float(several.errors[steps - 1] - several.errors[steps])
                assert float(several.gains[steps - 1]) == pytest.approx(removed)
    tiny = _convolution(2, 2, 2)
    assert Choice.of(tiny.weight, 1, multiple=step).size == 1, "no multiple is smaller than the layer"
    exact = _convolution(6, 12)
    with torch.no_grad():
        exact.weight.copy_(torch.rand(12, 6, 1, 1) * torch.rand(1, 6, 3, 3))
    choice = Choice.of(exact.weight.float(), 1, multiple=step)
    assert choice.kernels(choice.steps_within(0.0)) == [1] * 6, "none that computes nothing"


def test_stronger_compression_is_smaller_and_farther():
    _, model = _net()
    sizes, errors = [], []
    for keep in (1.0, 0.8, 0.6, 0.4, 0.25):
        compressed = Gdws(keep, weights="unit").plan(model).apply(model)
        sizes.append(sum(p.numel() for p in compressed.parameters()))
        pairs = zip(_implicit(model, compressed).parameters(), model.parameters(), strict=True)
        errors.append(sum(float((a - b).detach().square().sum()) for a, b in pairs))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    assert errors == sorted(errors) and errors[0] == 0


def test_the_error_bounds_what_every_layer_loses():
    _, model = _net()
    compressed = {}
    for error in (2.0, 0.6):
        plan = Gdws(error=error, weights="unit", step=1).plan(model)
        found = compressed[error] = plan.apply(model)
        implicit, layers = _implicit(model, found), deployed_layers(model)
        assert _replaced(plan)
        for layer in _replaced(plan):
            was, now = layers[layer.name], implicit.get_submodule(layer.name)
            lost = float((was.weight - now.weight).detach().square().sum())
            losses = _channel_losses(was)
            kernels = found.get_submodule(layer.name).kernels
            last = min(loss[count - 1] - loss[count] for loss, count in zip(losses, kernels, strict=True) if count)
            assert lost <= error + 1e-6 and (lost + last > error - 1e-6 or sum(kernels) == 1), "one fewer is too few"
        for name, reason in _skipped(plan).items():
            assert reason.startswith(("first", "classifier", "break-even"))
            if reason.startswith("break-even"):
                choice = Choice.of(layers[name].weight, 1)
                assert choice.steps_within(error) * choice.cost >= choice.dense
    sizes = [sum(p.numel() for p in compressed[error].parameters()) for error in (2.0, 0.6)]
    assert sizes[0] < sizes[1]
    nothing = Gdws(error=0.0, weights="unit").plan(model)
    assert not _replaced(nothing), "kernels of full rank cost more than the layer"
    assert _skipped(nothing)["features.3"].startswith("break-even: kernels within the error take 1088 numbers, the")


def test_a_relative_error_is_the_share_of_the_squared_norm_that_is_lost():
    _, model = _net()
    plan = Gdws(error=0.3, weights="relative").plan(model)
    implicit, layers = _implicit(model, plan.apply(model)), deployed_layers(model)
    assert _replaced(plan)
    for layer in _replaced(plan):
        was, now = layers[layer.name].weight.detach(), implicit.get_submodule(layer.name).weight.detach()
        share = float((was - now).square().sum() / was.square().sum())
        assert 0.2 < share <= 0.3 and layer.reason.endswith(f"error {share:.3g}")
    with torch.no_grad():
        model.features[6].weight.zero_()
    assert _kernels(Gdws(error=0.3, weights="relative").plan(model), model)["features.6"] == [1, *[0] * 7], (
        "nothing to lose"
    )


def test_what_is_separable_is_found_to_be():
    """A convolution made of a depthwise and a 1x1 one is taken apart again, without error and without a gather."""
    _, model = _net()
    with torch.no_grad():
        for index in (3, 6):
            layer = model.features[index]
            out, inside = layer.weight.shape[:2]
            layer.weight.copy_(torch.randn(out, inside, 1, 1) * torch.randn(1, inside, 3, 3))
    for method in (Gdws(error=0.0, weights="unit"), Gdws(keep=1.0, weights="unit")):
        plan = method.plan(model)
        assert _kernels(plan, model) == {"features.3": [1] * 8, "features.6": [1] * 8}
        compressed = plan.apply(model)
        assert compressed.features[3].index is None
        torch.testing.assert_close(compressed(_images()), model(_images()), rtol=1e-5, atol=1e-5)


def _images(n=20, seed=5):
    return _x(n, 1, 8, torch.float32, seed)


def test_keeping_everything_changes_nothing(kind, make):
    for model in (make(kind)[1], _net()[1]):
        plan = Gdws(1.0, weights="unit").plan(model)
        assert not _replaced(plan)
        assert torch.equal(plan.apply(model)(_images()), model(_images()))


def test_predictions_and_attacks_carry_over_where_no_kernel_is_left_out():
    """Explicit layers of full rank: the same answers to a thousand images and to those made against the other."""
    _, model = _net()
    full = copy.deepcopy(model)
    for index in (3, 6, 9):
        layer = full.features[index]
        full.features[index] = separated(layer, [9 if layer.out_channels > 8 else 8] * layer.in_channels)
    x = torch.rand(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    assert float((full(x) - model(x)).detach().abs().max()) < 1e-4
    assert torch.equal(full(x).argmax(1), y)
    attack = Pgd(ThreatModel("linf", 0.1), steps=3)
    for one, other in ((model, full), (full, model)):
        x_adv = attack(one, x, y, generator=torch.Generator().manual_seed(1))
        assert float((one(x_adv).argmax(1) == other(x_adv).argmax(1)).float().mean()) >= 0.999
    assert float((model(x_adv).argmax(1) != y).float().mean()) > 0.1, "the attack does something"


def test_the_compressed_network_is_that_of_the_nearest_weights():
    _, model = _net()
    compressed = Gdws(0.5, weights="unit").plan(model).apply(model)
    dense = _implicit(model, compressed)
    for mode in (False, True):
        torch.testing.assert_close(
            compressed.train(mode)(_images()), dense.train(mode)(_images()), rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(compressed.eval()(_images()), model(_images()), atol=1e-2)
    plain = compressed(_images())
    with crafting(compressed), torch.no_grad():  # normalisation folded into the 1x1 convolutions
        torch.testing.assert_close(compressed(_images()), plain, rtol=1e-4, atol=1e-5)
    with constant(compressed), torch.no_grad():
        torch.testing.assert_close(compressed(_images()), plain, rtol=1e-4, atol=1e-5)


def _resnet():
    """A torchvision ResNet of a tenth of the width, with what is its own: 7x7 stem, 1x1 shortcuts, in-place ReLU."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
        narrow = {64: 6, 128: 8, 256: 10, 512: 12}
        for name, module in [*network.named_modules()]:
            if isinstance(module, nn.Conv2d):
                sizes = narrow.get(module.in_channels, 1), narrow[module.out_channels]
                new = nn.Conv2d(*sizes, module.kernel_size, module.stride, module.padding, bias=False)
                network.set_submodule(name, new)
            elif isinstance(module, nn.BatchNorm2d):
                network.set_submodule(name, nn.BatchNorm2d(narrow[module.num_features]))
        network.fc = nn.Linear(12, 3)
        return network.eval()


def test_a_residual_network_is_compressed_where_it_has_kernels():
    model = _resnet()
    plan = Gdws(0.4, weights="adversarial", attack=Pgd(ThreatModel("linf", 0.05), steps=1)).plan(model, _setting(model))
    assert [layer.name for layer in plan.layers] == list(deployed_layers(model))
    skipped = _skipped(plan)
    assert skipped["conv1"] == "first convolution" and skipped["fc"] == "classifier"
    assert skipped["layer2.0.downsample.0"] == "1x1 convolution: no kernel to separate"
    assert len(_replaced(plan)) >= 4
    compressed = plan.apply(model)
    torch.testing.assert_close(compressed(_images()), _implicit(model, compressed)(_images()), rtol=1e-4, atol=1e-5)


def test_networks_without_kernels_are_refused_with_the_reason(make):
    transformer = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    cells = make("cells")[1]
    for model, told in ((cells, "depthwise convolution: already separate"), (transformer, "linear layer")):
        with pytest.raises(InputError, match=told):
            Gdws(0.5).plan(model)
        plan = Gdws(error=0.1).plan(model)
        assert [layer.name for layer in plan.layers] == list(deployed_layers(model))
        assert {layer.action for layer in plan.layers} == {"skipped"}
    reasons = set(_skipped(Gdws(error=0.1).plan(cells)).values())
    assert reasons == {
        "first convolution", "classifier", "depthwise convolution: already separate",
        "1x1 convolution: no kernel to separate",
    }  # fmt: skip


def test_layers_that_are_more_than_their_weight_are_left_alone():
    class Squared(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) ** 2

    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), Squared(6, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3),
        nn.Conv2d(6, 1, (1, 2)), nn.Conv2d(1, 6, 3),
    )  # fmt: skip
    model[3].weight = model[2].weight
    plan = Gdws(0.5, weights="unit").plan(model)
    assert _skipped(plan) == {
        "0": "first convolution", "1": "Squared has a forward pass of its own",
        "2": "shares its weight with another layer", "3": "shares its weight with another layer",
        "5": "break-even: it fits the budget as it is, without error",
        "6": "depthwise convolution: already separate",
    }  # fmt: skip
    tiny = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, (1, 2)), nn.Conv2d(1, 2, 3))
    assert _skipped(Gdws(error=9.0, weights="unit").plan(tiny))["2"].startswith("depthwise")


def test_a_module_that_stands_twice_is_replaced_once():
    layer = _convolution(6, 6, padding=1, dtype=torch.float32)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), layer, nn.ReLU(), layer, nn.Flatten(), nn.Linear(6 * 36, 3)).eval()
    plan = Gdws(0.5, weights="adversarial", attack=Pgd(ThreatModel("linf", 0.05), steps=1)).plan(model, _setting(model))
    assert [item.name for item in _replaced(plan)] == ["1"]
    compressed = plan.apply(model)
    assert compressed[1] is compressed[3] and isinstance(compressed[1], GeneralisedSeparableConv2d)
    torch.testing.assert_close(compressed(_images()), _implicit(model, compressed)(_images()))


def test_pruned_networks_are_separated_as_they_compute_and_separated_ones_pruned():
    _, model = _net()
    pruned = MagnitudePruning(0.3).plan(model).apply(model)
    compressed = Gdws(0.4, weights="unit").plan(pruned).apply(pruned)
    assert _replaced(Gdws(0.4, weights="unit").plan(pruned))
    dense = copy.deepcopy(pruned)
    for layer in deployed_layers(dense).values():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    again = Gdws(0.4, weights="unit").plan(dense).apply(dense)
    torch.testing.assert_close(compressed(_images()), again(_images()))
    assert compressed.features[6].depthwise.weight.requires_grad
    twice = MagnitudePruning(0.5).plan(compressed).apply(compressed)
    assert parametrize.is_parametrized(twice.features[6].pointwise)
    twice(_images())
    reasons = _skipped(Gdws(error=0.1, weights="unit").plan(compressed))
    assert reasons["features.6.depthwise"].startswith("depthwise")
    assert reasons["features.6.pointwise"].startswith("1x1")


def test_what_comes_before_and_after_fits_or_says_so(setting):
    _, model = _net()
    method = Gdws(0.5)
    folded = BatchNormFolding().plan(model, setting).apply(model)
    compressed = method.plan(folded).apply(folded)
    torch.testing.assert_close(compressed(_images()), _implicit(folded, compressed)(_images()), rtol=1e-4, atol=1e-5)
    compressed = method.plan(model).apply(model)
    name = _replaced(method.plan(model))[0].name
    after = BatchNormFolding().plan(compressed, setting)
    assert f"{name}.pointwise" in {layer.name for layer in _replaced(after)}, "its normalisation goes into the 1x1"
    torch.testing.assert_close(after.apply(compressed)(_images()), compressed(_images()), rtol=1e-4, atol=1e-5)
    quantised = Int8Quantisation(images=16).plan(model, setting).apply(model)
    with pytest.raises(InputError, match="no layer left"):
        method.plan(quantised)
    with pytest.raises(InputError, match="prune channels before"):
        ChannelPruning(0.5).plan(compressed, setting)


def test_a_plan_survives_json_and_the_network_its_files(tmp_path, monkeypatch):
    spec, model = _net()
    plan = Gdws(0.5, weights="unit").plan(model)
    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))
    assert again == plan and again.method == "gdws"
    compressed, second = plan.apply(model), again.apply(model)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in compressed.state_dict().items())
    spec = with_plan(spec, plan)
    save_model(spec, compressed, tmp_path)

    def never(*_args, **_kwargs):
        raise AssertionError("weights are about to be loaded")

    monkeypatch.setattr(torch.linalg, "svd", never)
    monkeypatch.setattr(torch.linalg, "svdvals", never)
    with torch.device("meta"):
        shapes = spec.build().state_dict()  # how numbers are counted without any
    assert {name: t.shape for name, t in shapes.items()} == {n: t.shape for n, t in compressed.state_dict().items()}
    loaded_spec, loaded = load_model(tmp_path)
    assert loaded_spec == spec
    assert torch.equal(loaded(_images()), compressed(_images()))


def test_each_network_of_an_ensemble_has_kernels_of_its_own():
    spec, _ = _net()
    spec = dataclasses.replace(spec, prediction=MeanOfParticles(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ensemble = spec.build().eval()
    method = Gdws(0.5, weights="adversarial", samples=12, attack=Pgd(ThreatModel("linf", 0.05), steps=1))
    plan = plan_for(method, ensemble, _setting(ensemble))
    assert {layer.name.split(".")[1] for layer in _replaced(plan)} == {"0", "1"}
    compressed = plan.apply(ensemble)
    for one, two in zip(compressed.members, ensemble.members, strict=True):
        alone = method.plan(two, _setting(two)).apply(two)
        assert torch.equal(one(_images()), alone(_images()))


def test_cells_with_a_separated_stem_compute_what_torch_does():
    """Of a searched network only a stem of several convolutions has kernels; native kernels do the cells."""
    genotype = SPACE.random(torch.Generator().manual_seed(0))
    spec = ModelSpec(genotype, 4, 4, (3, 256, 256), ("a", "b", "c"), (0.4,) * 3, (0.25,) * 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build().eval()
    plan = Gdws(0.5, weights="unit").plan(model)
    assert [layer.name for layer in _replaced(plan)] == ["stem.3"]
    compressed = plan.apply(model).requires_grad_(False)
    results = []
    for network in (compressed, copy.deepcopy(compressed)):
        if results:
            for module in network.modules():  # who is watched is computed by torch
                module.register_forward_hook(lambda *_: None)
        x = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logits = network(x)
        results.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), x)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_network_is_exported_for_batches_of_any_size():
    _, model = _net()
    compressed = Gdws(0.5, weights="unit").plan(model).apply(model).requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(compressed, (_images(4),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(_images(7)), compressed(_images(7)))


def test_an_onnx_file_computes_the_same():
    onnxruntime = pytest.importorskip("onnxruntime")
    _, model = _net()
    compressed = Gdws(0.5).plan(model).apply(model)
    assert any(getattr(module, "index", None) is not None for module in compressed.modules())
    session = onnxruntime.InferenceSession(onnx_bytes(compressed, (1, 8, 8)), providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT], {INPUT: _images(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), compressed(_images(5)).detach(), rtol=1e-4, atol=1e-5)


# --- bad input


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"keep": 0.0}, "above 0"), ({"keep": 1.1}, "at most 1"), ({"keep": float("nan")}, "above 0"),
        ({"error": -1.0}, "at least 0"), ({"error": float("inf")}, "finite"), ({"error": float("nan")}, "finite"),
        ({"keep": 0.5, "error": 0.1}, "not both"), ({"weights": "none"}, "'unit'"), ({"samples": 0}, "samples"),
        ({"competitors": -1}, "competitors"), ({"margin": -1.0}, "margin"), ({"step": 0}, "step"),
    ],
)  # fmt: skip
def test_impossible_settings_are_told(fields, told):
    with pytest.raises(InputError, match=told):
        Gdws(**fields)


def test_a_budget_below_a_kernel_a_layer_names_what_is_possible():
    _, model = _net()
    with pytest.raises(InputError, match=r"keep at least 0\.\d+") as caught:
        Gdws(0.001, weights="unit").plan(model)
    assert str(caught.value).endswith(", or lower step")
    for step in (1, 8):
        with pytest.raises(InputError, match="keep at least") as caught:
            Gdws(0.001, weights="unit", step=step).plan(model)
        least = float(re.search(r"at least (0\.\d+)", str(caught.value))[1])
        plan = Gdws(least, weights="unit", step=step).plan(model)
        assert [sum(counts) for counts in _kernels(plan, model).values()] == [step] * 3
        assert plan.apply(model)(_images()).isfinite().all()
        with pytest.raises(InputError, match="keep at least"):
            Gdws(least - 1e-3, weights="unit", step=step).plan(model)


def test_weighing_without_data_or_numbers_is_refused():
    _, model = _net()
    with pytest.raises(InputError, match="'unit'"):
        Gdws(0.5, weights="adversarial").plan(model)
    with torch.no_grad():
        model.features[6].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="finite"):
        Gdws(0.5, weights="unit").plan(model)


def _with_data(plan, **data):
    """The plan with entries of its first replaced layer changed."""
    index = next(i for i, layer in enumerate(plan.layers) if layer.action == "replaced")
    layer = plan.layers[index]
    changed = LayerPlan(layer.name, layer.action, layer.reason, {**layer.data, **data})
    return Plan(plan.method, (*plan.layers[:index], changed, *plan.layers[index + 1 :]))


def _packed(values, kind="<u4"):
    return base64.b64encode(zlib.compress(np.array(values, kind).tobytes())).decode()


def test_damaged_kernels_are_input_errors():
    _, model = _net()
    plan = Gdws(0.5, weights="unit").plan(model)
    layer = _replaced(plan)[0]
    kernels, data = _kernels(plan, model)[layer.name], layer.data["kernels"]
    assert _with_data(plan, kernels=_packed(kernels)).apply(model)
    wrong = {
        "none": {"kernels": None}, "number": {"kernels": 5}, "empty": {"kernels": ""}, "text": {"kernels": "!" + data},
        "list": {"kernels": kernels}, "cut": {"kernels": data[:-8]}, "no base64": {"kernels": "ä"},
        "short": {"kernels": _packed(kernels[1:])}, "long": {"kernels": _packed([*kernels, 1])},
        "other type": {"kernels": _packed(kernels, "<u8")}, "none at all": {"kernels": _packed([0] * 8)},
        "too many": {"kernels": _packed([10] * 8)}, "negative": {"kernels": _packed([2**32 - 1] * 8)},
        "bomb": {"kernels": base64.b64encode(zlib.compress(bytes(10**8))).decode()},
        "no shape": {"shape": None}, "other shape": {"shape": [8, 8, 5, 5]}, "endless": {"shape": [10**40]},
    }  # fmt: skip
    accepted = []
    for name, changed in wrong.items():
        try:
            _with_data(plan, **changed).apply(model)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            accepted.append(name)
    assert accepted == []
    with pytest.raises(InputError, match="damaged"):
        Plan("gdws", (LayerPlan(layer.name, "replaced", "", {"shape": layer.data["shape"]}),)).apply(model)


def test_groups_must_get_as_many_kernels_each():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), _convolution(groups=3, dtype=torch.float32))
    layer = {"shape": [12, 2, 3, 3]}
    for kernels, fits in (([1, 1, 2, 0, 0, 2], True), ([1, 1, 2, 0, 0, 1], False), ([1, 1, 4, 4, 0, 2], False)):
        plan = Plan("gdws", (LayerPlan("1", "replaced", "", {**layer, "kernels": _packed(kernels)}),))
        if fits:
            plan.apply(model)(_images())
        else:
            with pytest.raises(InputError, match="each group"):
                plan.apply(model)


def test_a_plan_of_another_network_is_refused(make):
    _, model = _net()
    plan = Gdws(0.5, weights="unit").plan(model)
    for other in (make("plain")[1], make("cells")[1], _net(width=6)[1]):
        with pytest.raises(InputError, match="another network"):
            plan.apply(other)
    first = _replaced(plan)[0]
    with pytest.raises(InputError, match="another network"):
        Plan("gdws", (first, first)).apply(model)
    with pytest.raises(InputError, match="another network"):
        Plan("gdws", (dataclasses.replace(first, name="classifier"),)).apply(model)
    assert F.softmax(plan.apply(model)(_images()), 1).isfinite().all()
