"""Networks build and run for every size of image."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from search_spaces import operations
from search_spaces.catalogue import load_genotype
from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.genotype import Cell, Edge, Genotype, GenotypeError, StageGenotype
from search_spaces.layout import Layout
from search_spaces.network import Stem
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
    layers = Stem((3, side, side + 9), 6, largest)
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


def test_sections_of_one_kind_may_be_any_number():
    for sections in range(1, 4):
        layout = Layout(("normal",) * sections, tuple(range(1, sections + 1)))
        kinds = layout.kinds
        cell = Cell(((Edge("dil_conv_3x3", 0), Edge("skip_connect", 1)),))
        genotype = Genotype("darts", layout, tuple((kind, cell) for kind in kinds))
        network = DARTS.build(genotype, **_sizes(2, (8, 8), 1, 3), auxiliary=True)
        assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)
        assert hasattr(network, "auxiliary") == (sections > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stem_of_constant_weights_is_that_of_its_layers(dtype):
    """Folded where nothing needs the weights; images in the order of memory that cells read, the same values."""
    torch.manual_seed(0)
    stem = Stem((3, 32, 32), 6, 16).to(dtype)
    x = torch.rand(8, 3, 32, 32, dtype=dtype)
    for _ in range(3):
        stem(x)  # running statistics other than the initial ones
    stem.eval()
    for parameter in stem.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if parameter.dim() == 1 else None

    def value_and_gradient(function):
        point = x.clone().requires_grad_()
        y = function(point)
        (gradient,) = torch.autograd.grad(y.square().sum(), point)
        return y.detach(), gradient

    expected = value_and_gradient(lambda point: torch.nn.Sequential.forward(stem, point))
    learning = value_and_gradient(stem)
    assert not stem._constant()
    stem.requires_grad_(False)
    assert stem._constant()
    folded = value_and_gradient(stem)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for found in (learning, folded):
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)
    assert learning[0].shape == folded[0].shape == (8, 6, 16, 16)
