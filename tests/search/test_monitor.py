"""What a search says about itself."""

import math

import pytest
import torch

from nas.search import monitor
from search_spaces.catalogue import load_genotype
from search_spaces.dsara import SPACE as DSARA
from search_spaces.genotype import Cell, Edge, Genotype


def _all(operation, other=None, others=0):
    """A genotype with ``others`` edges of each cell replaced by ``other``."""
    edges = [Edge(other if i < others else operation, i % 2) for i in range(8)]
    cell = Cell(tuple(zip(edges[::2], edges[1::2], strict=True)))
    return Genotype("dsara", DSARA.layout, tuple((kind, cell) for kind in DSARA.layout.kinds))


def test_entropy_of_certainty_is_zero_and_of_ignorance_one():
    assert monitor.entropy(torch.full((14, 7), 1 / 7)) == pytest.approx(1)
    assert monitor.entropy(torch.eye(7)[torch.arange(14) % 7]) == 0
    assert monitor.entropy(torch.tensor([[0.5, 0.5, 0, 0]])) == pytest.approx(math.log(2) / math.log(4))
    half = torch.stack([torch.full((4,), 0.25), torch.tensor([1.0, 0, 0, 0])])
    assert monitor.entropy(half) == pytest.approx(0.5), "the mean over the edges"


def test_entropies_by_kind():
    tables = {"a": torch.full((2, 7), 1 / 7), "b": torch.eye(7)[:2]}
    assert monitor.alpha_entropies(tables) == {"a": pytest.approx(1), "b": 0}


def test_parameter_free_edges_of_arnas():
    assert monitor.parameter_free_edges(load_genotype("arnas")) == {
        "accurate": (3, 8), "reduction": (3, 8), "robust": (0, 8),
    }  # fmt: skip


def test_collapse_is_told_from_three_quarters_on():
    for operation in ("skip_connect", "max_pool_3x3", "avg_pool_3x3"):
        warnings = monitor.collapse_warnings(_all(operation), 7)
        assert len(warnings) == 3
        assert all("epoch 7" in warning and "8 of 8" in warning for warning in warnings)
        assert [kind in warning for kind, warning in zip(DSARA.layout.kinds, warnings, strict=True)] == [True] * 3
    assert len(monitor.collapse_warnings(_all("skip_connect", "sep_conv_3x3", 2), 0)) == 3
    assert monitor.collapse_warnings(_all("skip_connect", "sep_conv_3x3", 3), 0) == []
    assert monitor.collapse_warnings(load_genotype("arnas"), 0) == []
