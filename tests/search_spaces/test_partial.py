"""Partial channels against the edge-by-edge definition, and the limit in which all channels pass."""

import pytest
import torch
import torch.nn.functional as F

from search_spaces.cell_space import CellSpace
from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.partial import PartialCell
from search_spaces.supernet import MixedCell, edge_row

SIZES = [(8, 8), (7, 5), (11, 10)]
SHAPE = {"input_shape": (1, 8, 8), "classes": 3, "mean": (0.5,), "std": (0.3,), "cells": 4}


def _inputs(size, reduces_before, channels=8):
    torch.manual_seed(1)
    before = (2 * size[0], 2 * size[1]) if reduces_before else size
    batch = 6 if size == (11, 10) else 8  # the native kernels take multiples of 4 only: both ways are compared
    shapes = (batch, channels, *before), (batch, channels, *size)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _weights(edges, operations):
    torch.manual_seed(2)
    return torch.softmax(torch.randn(edges, operations, dtype=torch.float64), 1).requires_grad_()


def _assert_same_function(ours, reference, parameters):
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    torch.manual_seed(3)
    direction = torch.randn_like(reference)
    mine = torch.autograd.grad((ours * direction).sum(), parameters, materialize_grads=True)
    theirs = torch.autograd.grad((reference * direction).sum(), parameters, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("reduces", "before"), [(False, False), (False, True), (True, False)])
def test_if_all_channels_pass_it_is_the_full_cell(size, reduces, before):
    cells = []
    for make, more in ((MixedCell, {}), (PartialCell, {"share": 1})):
        torch.manual_seed(0)
        cells.append(make(DSARA.operations, 3, (8, 8), 4, reduces=reduces, previous_reduces=before, **more).double())
    full, part = cells
    part.load_state_dict(full.state_dict())
    x, weights = _inputs(size, before), _weights(9, 7)
    theirs = full(*x, weights)
    full_gradients = torch.autograd.grad(theirs.square().sum(), [*x, weights, *full.parameters()])
    ours = part(*x, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(ours.square().sum(), [*x, weights, *part.parameters()])
    for a, b in zip(gradients, full_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def _shuffled(x, groups):
    """The channel shuffle as it is usually written."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


def _edge_by_edge(cell, x0, x1, weights, share):
    """PC-DARTS as defined: each edge mixes its first channels, copies or pools the rest, concatenates and shuffles."""
    values = [cell.preprocess0(x0), cell.preprocess1(x1)]
    for node in range(cell.nodes):
        total = 0
        for source in range(node + 2):
            x, edges = values[source].contiguous(), cell.sources[source]
            passing = x.shape[1] // share
            rows = [edge_row(n, source) for n in range(max(source - 1, 0), cell.nodes)]
            mixed = edges(x[:, :passing], weights[rows])[rows.index(edge_row(node, source))]
            rest = x[:, passing:]
            rest = rest if edges.stride == 1 else F.max_pool2d(rest, 2, ceil_mode=True)
            total = total + _shuffled(torch.cat([mixed, rest], 1), share)
        values.append(total)
    return torch.cat(values[2:], 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("reduces", "before"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("share", [2, 4])
def test_it_is_the_edge_by_edge_definition(size, reduces, before, share):
    torch.manual_seed(0)
    cell = PartialCell(DARTS.operations, 3, (8, 8), 8, reduces=reduces, previous_reduces=before, share=share).double()
    for module in cell.modules():
        # Both graphs are alive at once, and one must not move the buffers that the other one keeps.
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats = False
    x, weights = _inputs(size, before), _weights(9, 8)
    reference = _edge_by_edge(cell, *x, weights, share)
    _assert_same_function(cell(*x, weights), reference, [*x, weights, *cell.parameters()])


def test_a_supernet_of_partial_cells():
    """Fewer weights, the same architecture parameters, all of which matter."""
    sizes = {}
    for share in (1, 2, 4):
        torch.manual_seed(0)
        supernet = DSARA.supernet(channels=4, partial_channels=share, **SHAPE).double()
        sizes[share] = sum(parameter.numel() for parameter in supernet.weight_parameters())
        loss = F.cross_entropy(supernet(torch.rand(8, 1, 8, 8, dtype=torch.float64)), torch.arange(8) % 3)
        gradients = torch.autograd.grad(loss, supernet.architecture_parameters())
        assert [tuple(gradient.shape) for gradient in gradients] == [(14, 7)] * 3
        assert all(float(gradient.abs().amax(1).min()) > 1e-9 for gradient in gradients)
    assert sizes[1] > sizes[2] > sizes[4]


def test_channels_that_cannot_be_divided_are_refused():
    space = CellSpace("dsara", ("skip_connect", "sep_conv_3x3"), DSARA.layout, nodes=2)
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4"):
        space.supernet(channels=6, partial_channels=4, **SHAPE)
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4"):
        space.supernet(channels=6, partial_channels=4, sampled=True, **SHAPE)
