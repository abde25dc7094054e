"""The sampled path: the full cell with one-hot weights, the straight-through gradient, and what is not computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.operations import OPERATIONS
from search_spaces.partial import PartialCell
from search_spaces.sampled import Sample, SampledCell
from search_spaces.supernet import MixedCell, edge_row

SHAPE = {"channels": 4, "input_shape": (1, 8, 8), "classes": 3, "mean": (0.5,), "std": (0.3,), "cells": 4}


def _supernet(space=DSARA, seed=0, **more):
    torch.manual_seed(seed)
    return space.supernet(sampled=True, **SHAPE, **more).double()


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _loss(supernet):
    x = torch.rand(8, 1, 8, 8, dtype=torch.float64, generator=_generator(9))
    return F.cross_entropy(supernet(x), torch.arange(8) % 3)


@torch.no_grad()
def _take_weights(cell, full, names):
    """Copy the weights of all edges computed together into one module a candidate."""
    cell.preprocess0.load_state_dict(full.preprocess0.state_dict())
    cell.preprocess1.load_state_dict(full.preprocess1.state_dict())
    convs = [i for i, name in enumerate(names) if OPERATIONS[name].kind == "conv"]
    convs.sort(key=lambda i: -OPERATIONS[names[i]].repeats)
    for node in range(cell.nodes):
        for source in range(node + 2):
            edges, own = full.sources[source], cell.edges[edge_row(node, source)]
            edge = node - max(source - 1, 0)
            part = slice(edge * edges.channels, (edge + 1) * edges.channels)
            for place, column in enumerate(convs):
                for stage in range(OPERATIONS[names[column]].repeats):
                    depthwise = (edges.depthwise1, edges.depthwise2)[stage][place]
                    pointwise = (edges.pointwise1, edges.pointwise2)[stage][place * edges.edges + edge]
                    own[column].get_parameter(f"depthwise{stage}").copy_(depthwise[part])
                    own[column].get_parameter(f"pointwise{stage}").copy_(pointwise[:, :, None, None])
            if "skip_connect" in names and edges.stride == 2:
                skip = own[names.index("skip_connect")]
                for half, weight in ((skip.even, edges.halves_even), (skip.odd, edges.halves_odd)):
                    half.weight.copy_(weight[edge][:, :, None, None])


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (11, 10)], ids=str)
@pytest.mark.parametrize(("reduces", "before"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("space", "share"), [(DSARA, 1), (DARTS, 1), (DSARA, 2)])
def test_it_is_the_full_cell_with_one_hot_weights(size, reduces, before, space, share):
    """Values, and the gradients of inputs, weights and gates (the mixing weight of the computed candidate)."""
    names, sizes = space.operations, {"reduces": reduces, "previous_reduces": before}
    torch.manual_seed(0)
    if share == 1:
        full = MixedCell(names, 3, (8, 8), 4, **sizes).double()
    else:
        full = PartialCell(names, 3, (8, 8), 4, **sizes, share=share).double()
    cell = SampledCell(names, 3, (8, 8), 4, **sizes, share=share).double()
    _take_weights(cell, full, names)
    large = (2 * size[0], 2 * size[1]) if before else size
    batch = 6 if size == (11, 10) else 8  # the native kernels take multiples of 4 only: both ways are compared
    x = [torch.randn(batch, 8, *s, dtype=torch.float64, requires_grad=True) for s in (large, size)]
    for draw in range(3):
        choice = torch.randint(len(names), (9,), generator=_generator(draw))
        one_hot = F.one_hot(choice, len(names)).double().requires_grad_()
        gates = torch.ones(9, dtype=torch.float64, requires_grad=True)
        reference, ours = full(*x, one_hot), cell(*x, gates.unbind(), choice.tolist())
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(cell(*x, None, choice.tolist()), ours, rtol=1e-12, atol=1e-12)
        direction = torch.randn(reference.shape, dtype=torch.float64, generator=_generator(draw))
        theirs = torch.autograd.grad((reference * direction).sum(), [*x, one_hot])
        mine = torch.autograd.grad((ours * direction).sum(), [*x, gates])
        torch.testing.assert_close(mine[:2], theirs[:2], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(mine[2], theirs[2].gather(1, choice[:, None])[:, 0], rtol=1e-8, atol=1e-9)


def test_gates_are_one_and_their_gradient_is_that_of_the_straight_through_softmax():
    """Against autograd of the dense expression onehot - p.detach() + p, against its formula and finite differences."""
    torch.manual_seed(0)
    alpha = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    noise, temperature = torch.randn(5, 7, dtype=torch.float64), 0.7
    index = (alpha + noise).argmax(1).detach()
    gates = Sample(tuple(index.tolist()), index, noise, temperature).gates(alpha)
    assert torch.equal(gates, torch.ones(5, dtype=torch.float64))
    arriving = torch.randn(5, dtype=torch.float64)
    (ours,) = torch.autograd.grad((gates * arriving).sum(), alpha)

    p = torch.softmax((alpha + noise) / temperature, 1)
    chosen = F.one_hot(index, 7).double()
    weights = chosen - p.detach() + p
    (dense,) = torch.autograd.grad((weights * chosen * arriving[:, None]).sum(), alpha)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-14)
    p = p.detach()
    chosen_p = p.gather(1, index[:, None])
    torch.testing.assert_close(ours, arriving[:, None] * chosen_p * (chosen - p) / temperature, rtol=1e-12, atol=1e-14)

    def value(a):
        return float((torch.softmax((a + noise) / temperature, 1).gather(1, index[:, None])[:, 0] * arriving).sum())

    for edge, column in ((0, int(index[0])), (1, (int(index[1]) + 1) % 7), (4, 2)):
        step = torch.zeros(5, 7, dtype=torch.float64)
        step[edge, column] = 1e-5
        slope = (value(alpha.detach() + step) - value(alpha.detach() - step)) / 2e-5
        assert float(ours[edge, column]) == pytest.approx(slope, abs=1e-8)


def test_candidates_are_drawn_by_their_probability():
    """argmax(a + Gumbel noise) falls on i with probability softmax(a)_i."""
    supernet, generator = _supernet(), _generator()
    with torch.no_grad():
        supernet.alpha["robust"].copy_(torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, 0.0, -3.0]))
    draws = 400
    counts = torch.zeros(7, dtype=torch.float64)
    for _ in range(draws):
        supernet.draw(generator, 1.0)
        counts += torch.bincount(supernet.samples["robust"].index, minlength=7)
    expected = torch.softmax(supernet.alpha["robust"][0].detach(), 0) * draws * 14
    # Chi square of 6 degrees of freedom: above 22.5 by chance once in a thousand.
    assert float(((counts - expected).square() / expected).sum()) < 22.5


def test_only_the_sampled_candidates_are_computed():
    supernet = _supernet()
    supernet.draw(_generator(3), 1.0)
    gradients = torch.autograd.grad(_loss(supernet), supernet.weight_parameters(), allow_unused=True)
    used = {id(p) for p, g in zip(supernet.weight_parameters(), gradients, strict=True) if g is not None}
    for kind, cell in zip(supernet.kinds, supernet.cells, strict=True):
        for edge, pick in zip(cell.edges, supernet.samples[kind].choice, strict=True):
            for column, module in enumerate(edge):
                assert all((id(p) in used) == (column == pick) for p in module.parameters())
                counted = [m.num_batches_tracked for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
                assert all(int(count) == (column == pick) for count in counted)


def test_one_sample_serves_all_passes_until_the_next():
    supernet = _supernet()
    supernet.draw(_generator(3), 1.0)
    first, picks = float(_loss(supernet).detach()), {k: s.choice for k, s in supernet.samples.items()}
    with torch.no_grad():
        for alpha in supernet.alpha.values():
            alpha.add_(3 * torch.randn(alpha.shape, generator=_generator(5), dtype=alpha.dtype))
    assert float(_loss(supernet).detach()) == first, "the sample does not follow alpha by itself"
    supernet.draw(_generator(4), 1.0)
    assert {k: s.choice for k, s in supernet.samples.items()} != picks
    supernet.settle()
    for kind, alpha in supernet.alpha.items():
        assert supernet.samples[kind].choice == tuple(alpha.argmax(1).tolist())


def test_every_kind_of_cell_has_an_architecture_gradient():
    """Also where all sampled candidates are "none", which give zeros."""
    supernet = _supernet(DARTS)
    supernet.draw(_generator(1), 2.0)
    for gradient in torch.autograd.grad(_loss(supernet), supernet.architecture_parameters()):
        assert float(gradient.abs().max()) > 0
        assert float(gradient.sum(1).abs().max()) < 1e-12
    with torch.no_grad():
        for alpha in supernet.alpha.values():
            alpha[:, DARTS.operations.index("none")] = 100
    supernet.settle()
    assert len(torch.autograd.grad(_loss(supernet), supernet.architecture_parameters())) == 2


def test_mixing_weights_remain_the_probabilities():
    supernet = _supernet()
    supernet.draw(_generator(1), 0.1)
    for kind, alpha in supernet.alpha.items():
        torch.testing.assert_close(supernet.mixing_weights()[kind], torch.softmax(alpha, 1))


def test_candidates_have_no_affine_normalisation():
    """A scale there would undo the architecture parameters."""
    norms = [m for m in _supernet().modules() if isinstance(m, nn.BatchNorm2d)]
    in_cells = [m for m in norms if m.weight is None]
    assert len(norms) - len(in_cells) <= 1, "the stem's alone"
