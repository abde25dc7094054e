"""The supernet as a function of its architecture parameters."""

import pytest
import torch

from search_spaces.cell_space import CellSpace
from search_spaces.dsara import SPACE as DSARA
from search_spaces.layout import Layout

SMALL = {"channels": 2, "cells": 4, "input_shape": (1, 8, 8), "classes": 3, "mean": (0.5,), "std": (0.3,)}


def _supernet(space=DSARA, seed=0, **sizes):
    torch.manual_seed(seed)
    return space.supernet(**{**SMALL, **sizes}).double()


def test_mixing_weights_are_a_softmax_of_alpha_and_one_tensor_serves_all_cells_of_a_kind():
    supernet = _supernet()
    assert list(supernet.alpha) == ["accurate", "reduction", "robust"]
    for kind, alpha in supernet.alpha.items():
        weights = supernet.mixing_weights()[kind]
        torch.testing.assert_close(weights, alpha.exp() / alpha.exp().sum(1, keepdim=True))
        assert float(alpha.detach().abs().max()) < 0.01, "a search starts undecided"
    assert supernet.kinds == ("accurate", "reduction", "reduction", "robust")


def test_adding_a_constant_to_an_edge_changes_nothing():
    supernet, x = _supernet().eval(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    before = supernet(x)
    with torch.no_grad():
        supernet.alpha["robust"][3] += 5
    torch.testing.assert_close(supernet(x), before, rtol=1e-10, atol=1e-12)


def test_every_architecture_parameter_matters():
    """A softmax has no gradient along constants, so each row of the gradient sums to 0 but is not 0."""
    supernet, x = _supernet(), torch.rand(8, 1, 8, 8, dtype=torch.float64)
    loss = torch.nn.functional.cross_entropy(supernet(x), torch.arange(8) % 3)
    for gradient in torch.autograd.grad(loss, supernet.architecture_parameters()):
        assert float(gradient.sum(1).abs().max()) < 1e-12
        assert float(gradient.abs().amax(1).min()) > 1e-9


def test_another_relaxation_can_be_put_in():
    supernet = _supernet(relaxation=lambda alpha: torch.full_like(alpha, 0.25))
    assert bool((supernet.mixing_weights()["robust"] == 0.25).all())
    assert bool(torch.isfinite(supernet(torch.rand(2, 1, 8, 8, dtype=torch.float64))).all())


SUBSETS = [
    ("skip_connect",),
    ("none", "max_pool_3x3"),
    ("dil_conv_3x3", "dil_conv_5x5"),
    ("sep_conv_3x3",),
    ("avg_pool_3x3", "skip_connect", "sep_conv_5x5"),
]


@pytest.mark.parametrize("names", SUBSETS, ids=str)
def test_a_supernet_over_any_candidates_runs(names):
    """Spaces are data: an ablation may take operations away, down to a single one."""
    space = CellSpace("dsara", names, Layout(("a", "b"), (1, 2)), nodes=2)
    supernet = _supernet(space)
    for shape in ((8, 8), (12, 10)):
        logits = supernet(torch.rand(4, 1, *shape, dtype=torch.float64))
        assert logits.shape == (4, 3)
        assert bool(torch.isfinite(logits).all())


def test_state_dict_round_trip():
    first, second = _supernet(seed=0), _supernet(seed=1)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    first(x)
    assert not torch.equal(first.eval()(x), second.eval()(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
