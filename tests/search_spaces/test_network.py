"""Networks build and run for every size of image, and with kept weights compute what they compute without."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.compression.magnitude import MagnitudePruning
from nas.model_state import crafting
from search_spaces import kernels, operations
from search_spaces.catalogue import load_genotype
from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.genotype import Cell, Edge, Genotype, GenotypeError, StageGenotype
from search_spaces.layers import BatchNorm2d, KeepsDerived, PointwiseConv2d, constant_weights
from search_spaces.layout import Layout
from search_spaces.network import stem
from search_spaces.plain import SPACE as PLAIN

SIZES = [(8, 8), (9, 11), (28, 28), (32, 32), (64, 64), (96, 96), (224, 224)]


def _random(seed=0, space=DSARA):
    return space.random(torch.Generator().manual_seed(seed))


def _moments(channels):
    return {
        "mean": tuple(0.3 + 0.1 * c for c in range(channels)),
        "std": tuple(0.2 + 0.05 * c for c in range(channels)),
    }


def _sizes(channels, shape, colours, classes):
    return {"channels": channels, "cells": 5, "input_shape": (colours, *shape), "classes": classes, **_moments(colours)}


def _runs(model, shape, colours, classes, seed=0):
    """Forward and backward in eval mode on one image and in train mode on two; a gradient for every weight."""
    generator = torch.Generator().manual_seed(seed)
    for batch, train in ((1, False), (2, True)):
        model.train(train)
        x = torch.rand(batch, colours, *shape, generator=generator).requires_grad_()
        heard = []
        if hasattr(model, "auxiliary"):
            handle = model.auxiliary.register_forward_hook(lambda *arguments, heard=heard: heard.append(arguments[2]))
        logits = model(x)
        assert logits.shape == (batch, classes)
        assert bool(torch.isfinite(logits).all())
        loss = F.cross_entropy(logits, torch.arange(batch) % classes)
        if hasattr(model, "auxiliary"):
            handle.remove()
            assert [result.shape for result in heard] == ([(batch, classes)] if train else [])
            loss = loss + sum(result.square().sum() for result in heard)
        used = [p for n, p in model.named_parameters() if train or not n.startswith("auxiliary.")]
        gradients = torch.autograd.grad(loss, [x, *used])
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert float(gradients[0].abs().amax()) > 0


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize(("space", "classes"), [(DSARA, 2), (DARTS, 100)], ids=["dsara", "darts"])
def test_cell_networks_run_for_every_image_size(shape, space, classes):
    torch.manual_seed(0)
    colours = 1 + SIZES.index(shape) % 4
    network = space.build(_random(3, space), **_sizes(2, shape, colours, classes), auxiliary=True)
    _runs(network, shape, colours, classes)


@pytest.mark.parametrize("shape", [SIZES[i] for i in (0, 1, 2, 6)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_supernets_run_for_every_image_size(shape):
    torch.manual_seed(0)
    colours = 4 - SIZES.index(shape) % 4
    _runs(DSARA.supernet(**_sizes(1, shape, colours, 2)), shape, colours, 2)


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_plain_networks_run_for_every_image_size(shape):
    torch.manual_seed(0)
    colours = 1 + SIZES.index(shape) % 4
    network = PLAIN.build(StageGenotype("plain", (1, 2, 1), (3, 4, 5)), **_sizes(1, shape, colours, 100))
    _runs(network, shape, colours, 100)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_fewest_channels_and_cells(channels):
    """One channel per node leaves nothing for the odd pixels of a factorised reduction."""
    torch.manual_seed(0)
    sizes = {**_sizes(channels, (8, 8), 3, 2), "cells": DSARA.layout.minimum_cells}
    _runs(DSARA.build(_random(1), **sizes, auxiliary=True), (8, 8), 3, 2)
    _runs(DSARA.supernet(**sizes), (8, 8), 3, 2)


@pytest.mark.parametrize(
    ("side", "largest", "expected"),
    [
        (8, 64, 8),
        (32, 64, 32),
        (64, 64, 64),
        (65, 64, 33),
        (96, 64, 48),
        (128, 64, 64),
        (224, 64, 56),
        (32, 8, 8),
        (33, 8, 5),
    ],
)
def test_the_stem_halves_large_images(side, largest, expected):
    layers = stem((3, side, side + 9), 6, largest)
    y = layers(torch.rand(2, 3, side, side + 9))
    assert y.shape[1] == 6
    assert y.shape[2] == expected <= largest
    assert y.shape[3] > 1


def test_the_layout_says_how_small_the_stem_makes_images():
    layout = replace(DSARA.layout, stem=8)
    genotype = replace(_random(1), layout=layout)
    network, supernet = (
        space.build(genotype, **_sizes(2, (32, 32), 1, 3)) if built else space.supernet(**_sizes(2, (32, 32), 1, 3))
        for built, space in ((True, DSARA), (False, replace(DSARA, layout=layout)))
    )
    for model in (network, supernet):
        assert model.stem(torch.rand(2, 1, 32, 32)).shape[2:] == (8, 8)
        _runs(model, (32, 32), 1, 3)


def test_each_reduction_halves_the_map():
    network = DSARA.build(load_genotype("arnas"), **{**_sizes(2, (20, 20), 1, 2), "cells": 8})
    shapes = []
    for cell in network.cells:
        cell.register_forward_hook(lambda module, given, result: shapes.append(tuple(result.shape[1:])))
    network(torch.rand(2, 1, 20, 20))
    assert shapes == [(8, 20, 20)] * 2 + [(16, 10, 10)] * 3 + [(16, 5, 5)] * 3


def test_normalisation_is_inside():
    network = DSARA.build(_random(), **_sizes(2, (8, 8), 2, 3)).eval()
    seen = []
    network.stem.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x = torch.rand(3, 2, 8, 8)
    network(x)
    moments = _moments(2)
    for channel in range(2):
        expected = (x[:, channel] - moments["mean"][channel]) / moments["std"][channel]
        torch.testing.assert_close(seen[0][:, channel], expected)


def test_the_plain_space_has_no_cells_and_no_auxiliary_head():
    stages = StageGenotype("plain", (1, 1), (2, 2))
    with pytest.raises(GenotypeError):
        PLAIN.build(stages, **_sizes(1, (8, 8), 1, 2), auxiliary=True)
    with pytest.raises(GenotypeError):
        PLAIN.check(_random())
    with pytest.raises(GenotypeError):
        DSARA.check(stages)


def test_an_operation_without_module_is_refused():
    with pytest.raises(ValueError, match="none"):
        operations.build("none", 4, 1)


def _only(operation):
    """A genotype with one operation everywhere, wired so that nodes 2 to 5 all matter."""
    cell = Cell(tuple((Edge(operation, node), Edge(operation, node + 1)) for node in range(4)))
    return Genotype("dsara", DSARA.layout, tuple((kind, cell) for kind in DSARA.layout.kinds))


FOLDED = {name: _only(name) for name in DSARA.operations} | {"arnas": load_genotype("arnas")}
FOLDED |= {f"random {seed}": _random(seed) for seed in range(3)}


def _network(genotype, shape=(8, 8), keep=None, seed=0):
    """In float64, with statistics and affine parameters that no default could imitate."""
    torch.manual_seed(seed)
    network = DSARA.build(genotype, **_sizes(3, shape, 2, 4))
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    for share in keep or ():
        network = MagnitudePruning(share).plan(network).apply(network)
    return network.double().eval()


def _with_gradient(network, x):
    x = x.clone().requires_grad_()
    logits = network(x)
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(9))
    return logits.detach(), torch.autograd.grad((logits * direction).sum(), x)[0]


def _kept(network):
    """How many modules hold derived tensors."""
    return sum(bool(module.kept) for module in network.modules() if isinstance(module, KeepsDerived))


@pytest.mark.parametrize(
    ("name", "keep"),
    [(name, None) for name in FOLDED] + [("arnas", (0.4,)), ("random 0", (0.7, 0.5))],
    ids=lambda value: str(value),
)
def test_kept_weights_compute_the_same_function(name, keep):
    """Logits and input gradients inside ``crafting`` are those of the ordinary evaluation, at every pass."""
    network = _network(FOLDED[name], keep=keep)
    x = torch.rand(5, 2, 8, 8, dtype=torch.float64)
    logits, gradient = _with_gradient(network, x)
    with crafting(network):
        for _ in range(2):
            ours, our_gradient = _with_gradient(network, x)
            torch.testing.assert_close(ours, logits, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(our_gradient, gradient, rtol=1e-10, atol=1e-10)
        assert _kept(network) > 0, "the path with kept weights was not taken"
        part, part_gradient = _with_gradient(network, x[:2])  # another batch size from the same kept tensors
        torch.testing.assert_close(part, logits[:2], rtol=1e-10, atol=1e-10)
        assert part_gradient.shape == x[:2].shape
    assert _kept(network) == 0
    again, again_gradient = _with_gradient(network, x)
    assert torch.equal(again, logits)
    assert torch.equal(again_gradient, gradient)


def test_kept_weights_on_maps_of_several_sizes():
    """16x16 maps use convolutions, the 8x8 and 4x4 maps behind them matrices; odd sizes too."""
    for shape in ((16, 16), (13, 9), (7, 11)):
        network = _network(load_genotype("arnas"), shape=shape)
        x = torch.rand(3, 2, *shape, dtype=torch.float64)
        logits, gradient = _with_gradient(network, x)
        with crafting(network):
            ours, our_gradient = _with_gradient(network, x)
            assert _kept(network) > 0
        torch.testing.assert_close(ours, logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(our_gradient, gradient, rtol=1e-10, atol=1e-10)


def test_kept_weights_do_not_outlive_a_change():
    network = _network(load_genotype("arnas"))
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    with crafting(network):
        before = network(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
        for module in network.modules():
            if isinstance(module, BatchNorm2d):
                module.running_mean.add_(0.1)
    with crafting(network):
        after = network(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, network(x), rtol=1e-10, atol=1e-10)


def test_batch_statistics_are_not_folded():
    network = _network(load_genotype("arnas"))
    x = torch.rand(6, 2, 8, 8, dtype=torch.float64)
    with crafting(network, batch_statistics=True):
        logits, gradient = _with_gradient(network, x)
    network.train()
    expected, expected_gradient = _with_gradient(network, x)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_inside_still_fire_while_crafting(kind):
    """On every layer of a network, once per pass, with the tensors the layer really sees."""
    network = _network(load_genotype("arnas"))
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    heard = {}

    def listen(name):
        if kind == "forward":
            return lambda module, given, result: heard.setdefault(name, []).append(result.detach())
        return lambda module, given: heard.setdefault(name, []).append(given[0].detach())

    for name, module in network.named_modules():
        if not list(module.children()):
            hook = module.register_forward_hook if kind == "forward" else module.register_forward_pre_hook
            hook(listen(name))
    network(x)
    expected, heard = heard, {}
    with crafting(network):
        network(x)
    assert heard.keys() == expected.keys()
    for name in expected:
        assert len(heard[name]) == len(expected[name])
        torch.testing.assert_close(heard[name], expected[name], rtol=1e-10, atol=1e-10)


def test_a_hook_on_one_layer_leaves_the_others_fast():
    network = _network(load_genotype("arnas"))
    layers = [module for module in network.modules() if isinstance(module, PointwiseConv2d)]
    heard = []
    layers[-1].register_forward_hook(lambda *arguments: heard.append(1))
    with crafting(network):
        network(torch.rand(2, 2, 8, 8, dtype=torch.float64))
        kept = _kept(network)
    keepers = sum(isinstance(module, KeepsDerived) for module in network.modules())
    assert heard == [1]
    assert kept == keepers - 1


def test_backward_hooks_inside_still_fire_while_crafting():
    network = _network(load_genotype("arnas"))
    layer = next(module for module in network.cells[1].operations.modules() if isinstance(module, PointwiseConv2d))
    heard = []
    layer.register_full_backward_hook(lambda *arguments: heard.append(1))
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    with crafting(network):
        _with_gradient(network, x)
    assert heard == [1]


def test_supernets_keep_their_matrices_too():
    torch.manual_seed(0)
    supernet = DSARA.supernet(**_sizes(2, (8, 8), 1, 3)).double().eval()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    logits, gradient = _with_gradient(supernet, x)
    with crafting(supernet):
        for _ in range(2):
            ours, our_gradient = _with_gradient(supernet, x)
            torch.testing.assert_close(ours, logits, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(our_gradient, gradient, rtol=1e-10, atol=1e-10)
        assert _kept(supernet) > 0
    assert _kept(supernet) == 0


def test_nested_constant_weights_end_with_the_outer_one():
    network = _network(load_genotype("arnas"))
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad(), constant_weights(network):
        network(x)
        with constant_weights(network):
            network(x)
        assert _kept(network) > 0
    assert _kept(network) == 0


@pytest.mark.parametrize("first", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"])
def test_the_first_pass_may_happen_anywhere(first):
    """What the kernels remember between calls must serve every later call, whoever came first."""
    network = _network(load_genotype("arnas")).train()
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    kernels.tap_basis.cache_clear()
    try:
        with first():
            network(x)
        logits = network(x)
        assert logits.device.type == "cpu"
        gradients = torch.autograd.grad(logits.sum(), list(network.parameters()))
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    finally:
        kernels.tap_basis.cache_clear()


def test_sections_of_one_kind_may_be_any_number():
    for sections in range(1, 4):
        layout = Layout(("normal",) * sections, tuple(range(1, sections + 1)))
        kinds = layout.kinds
        cell = Cell(((Edge("dil_conv_3x3", 0), Edge("skip_connect", 1)),))
        genotype = Genotype("darts", layout, tuple((kind, cell) for kind in kinds))
        network = DARTS.build(genotype, **_sizes(2, (8, 8), 1, 3), auxiliary=True)
        assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)
        assert hasattr(network, "auxiliary") == (sections > 1)
