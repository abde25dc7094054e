"""Facts of the published spaces, the rule that turns mixing weights into a genotype, and random genotypes."""

import dataclasses
import itertools

import pytest
import torch
from scipy import stats

from search_spaces.catalogue import load_genotype, published, space_of, spaces
from search_spaces.cell_space import CellSpace
from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.genotype import Cell, Edge, Genotype, GenotypeError
from search_spaces.layout import Layout
from search_spaces.network import parameter_count
from search_spaces.supernet import edge_row

RGB = {"input_shape": (3, 32, 32), "classes": 10, "mean": (0.5,) * 3, "std": (0.25,) * 3}


def _arnas_parameters(channels, ratio):
    arnas = load_genotype("arnas")
    genotype = Genotype("dsara", Layout(arnas.layout.sections, ratio), arnas.cells)
    with torch.device("meta"):  # sizes only
        return parameter_count(DSARA.build(genotype, channels=channels, cells=20, **RGB))


def test_arnas_has_its_published_size():
    assert _arnas_parameters(64, (1, 2, 2)) == 4_520_394
    assert _arnas_parameters(36, (1, 2, 2)) / 1e6 == pytest.approx(1.53, abs=0.005)
    assert _arnas_parameters(64, (1, 2, 4)) / 1e6 == pytest.approx(9.64, abs=0.005), "without the halved last section"


def test_the_auxiliary_head_is_not_counted():
    sizes = {"channels": 4, "cells": 8, **RGB}
    network = DSARA.build(load_genotype("arnas"), **sizes, auxiliary=True)
    assert parameter_count(network) == parameter_count(DSARA.build(load_genotype("arnas"), **sizes))
    assert sum(parameter.numel() for parameter in network.auxiliary.parameters()) > 0


def test_the_supernet_has_its_published_size():
    supernet = DSARA.supernet(channels=24, cells=8, **RGB)
    assert sum(parameter.numel() for parameter in supernet.weight_parameters()) / 1e6 == pytest.approx(1.88, abs=0.005)
    assert [tuple(alpha.shape) for alpha in supernet.architecture_parameters()] == [(14, 7)] * 3
    assert sum(alpha.numel() for alpha in supernet.architecture_parameters()) == 294
    together = {id(p) for p in [*supernet.weight_parameters(), *supernet.architecture_parameters()]}
    assert together == {id(p) for p in supernet.parameters()}


def test_depths_shape_the_supernet_and_what_it_finds():
    space = dataclasses.replace(DSARA, layout=dataclasses.replace(DSARA.layout, depths=(1, 3, 2)))
    settings = {"channels": 2, "cells": 20, "input_shape": (1, 8, 8), "classes": 2, "mean": (0.5,), "std": (0.5,)}
    supernet = space.supernet(**settings)
    found = space.discretise(supernet.mixing_weights())
    assert found.layout == space.layout
    kinds = ("accurate", "reduction", "accurate", "accurate", "reduction", "robust")
    assert supernet.kinds == tuple(place.kind for place in found.layout.place(20, 2)) == kinds
    network = space.build(found, **settings, auxiliary=True)
    assert len(network.cells) == 6 and network.auxiliary_after == 4
    x = torch.rand(2, 1, 8, 8)
    assert network(x).shape == supernet(x).shape == (2, 2)


def test_edges_are_numbered_without_gaps():
    for space in (DSARA, DARTS):
        rows = [edge_row(node, source) for node in range(space.nodes) for source in range(node + 2)]
        assert rows == list(range(space.edges)) == list(range(14))


def _brute_force(space, table):
    """The top-2 rule by trying every ordered choice of edges and every operation on them."""
    names = space.operations
    nodes = []
    for node in range(space.nodes):
        choices = []
        for sources in itertools.permutations(range(node + 2), space.incoming):
            rows = [table[edge_row(node, source)] for source in sources]
            candidates = [[(-w, i) for i, w in enumerate(row) if names[i] != "none"] for row in rows]
            best = [min(options) for options in candidates]
            # Stronger edges first; among equals the lower source, among equal operations the earlier one.
            key = tuple((strength, source) for (strength, _), source in zip(best, sources, strict=True))
            edges = tuple(Edge(names[i], source) for (_, i), source in zip(best, sources, strict=True))
            choices.append((key, edges))
        nodes.append(min(choices)[1])
    return Cell(tuple(nodes))


@pytest.mark.parametrize("space", [DSARA, DARTS], ids=lambda space: space.name)
@pytest.mark.parametrize("levels", [2, 4, 10**6], ids=["many ties", "some ties", "no ties"])
def test_discretisation_is_the_top_two_rule(space, levels):
    generator = torch.Generator().manual_seed(levels)
    for _ in range(20):
        weights = {
            kind: torch.randint(levels, (14, len(space.operations)), generator=generator).double()
            for kind in space.layout.kinds
        }
        genotype = space.discretise(weights)
        space.check(genotype)
        for kind, cell in genotype.cells:
            assert cell == _brute_force(space, weights[kind].tolist())


def _uniform(space):
    return {kind: torch.full((14, len(space.operations)), 0.1) for kind in space.layout.kinds}


def test_discretisation_by_hand():
    weights = _uniform(DSARA)
    table = weights["robust"]
    table[edge_row(3, 4), 6] = 0.9  # dil_conv_5x5 from node 4 into the last node: the strongest
    table[edge_row(3, 1), 3] = 0.8  # sep_conv_3x3 from input 1
    table[edge_row(3, 0), 2] = 0.7
    table[edge_row(0, 1), 4] = 0.2
    genotype = DSARA.discretise(weights)
    assert genotype.cell["robust"].nodes[3] == (Edge("dil_conv_5x5", 4), Edge("sep_conv_3x3", 1))
    assert genotype.cell["robust"].nodes[0] == (Edge("sep_conv_5x5", 1), Edge("max_pool_3x3", 0))
    first = (Edge("max_pool_3x3", 0), Edge("max_pool_3x3", 1))
    assert genotype.cell["robust"].nodes[1] == first, "ties go to the lower source and the earlier operation"
    assert genotype.cell["accurate"].nodes == (first,) * 4


def test_none_is_never_kept_and_does_not_count_as_strength():
    weights = _uniform(DARTS)
    table = weights["normal"]
    assert DARTS.operations[0] == "none"
    table[:, 0] = 0.99
    table[edge_row(2, 3), 4] = 0.2
    table[edge_row(2, 2), 5] = 0.15
    table[edge_row(2, 0), 0] = 1.0
    genotype = DARTS.discretise(weights)
    assert genotype.cell["normal"].nodes[2] == (Edge("sep_conv_3x3", 3), Edge("sep_conv_5x5", 2))
    assert "none" not in {edge.operation for _, cell in genotype.cells for node in cell.nodes for edge in node}


@pytest.mark.parametrize("space", [DSARA, DARTS], ids=lambda space: space.name)
def test_random_genotypes_are_valid_and_uniform(space):
    """Chi-square tests over the operations of every edge position and the pairs of sources of every node."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name in space.operations if name != "none"]
    draws = [space.random(generator) for _ in range(500)]
    for genotype in draws:
        space.check(genotype)
        assert genotype.layout == space.layout
        for _, cell in genotype.cells:
            assert [len(node) for node in cell.nodes] == [2] * 4
            assert all(node[0].source < node[1].source for node in cell.nodes)
    for kind in space.layout.kinds:
        for node in range(4):
            incoming = [genotype.cell[kind].nodes[node] for genotype in draws]
            for position in range(2):
                counts = [sum(edges[position].operation == name for edges in incoming) for name in names]
                assert stats.chisquare(counts).pvalue > 1e-4
            pairs = list(itertools.combinations(range(node + 2), 2))
            counts = [sum((a.source, b.source) == pair for a, b in incoming) for pair in pairs]
            assert sum(counts) == len(draws)
            assert len(pairs) == 1 or stats.chisquare(counts).pvalue > 1e-4
    assert len({genotype.digest for genotype in draws}) == len(draws)


def test_random_genotypes_depend_on_the_generator_only():
    first = DSARA.random(torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    assert first == DSARA.random(torch.Generator().manual_seed(5))
    assert first != DSARA.random(torch.Generator().manual_seed(6))


def test_a_space_refuses_operations_that_are_not_its_own():
    layout = Layout(("normal",), (1,))

    def with_operation(name):
        return Genotype("darts", layout, (("normal", Cell(((Edge(name, 0),),))),))

    DARTS.check(with_operation("sep_conv_3x3"))
    for name in ("none", "conv_7x7", "", "skip_connect "):
        with pytest.raises(GenotypeError):
            DARTS.check(with_operation(name))


def test_catalogue():
    assert {"dsara", "darts", "plain"} <= set(spaces())
    for name in published():
        genotype = load_genotype(name)
        assert genotype == load_genotype(name.upper())
        assert space_of(genotype).name == genotype.space
    with pytest.raises(GenotypeError, match="arnas"):
        load_genotype("no such genotype")
    stranger = Genotype("elsewhere", Layout(("a",), (1,)), (("a", Cell(((Edge("x", 0),),))),))
    with pytest.raises(GenotypeError, match="elsewhere"):
        space_of(stranger)


def test_published_arnas_is_the_table_of_the_paper():
    short = {"skip": "skip_connect", "avg": "avg_pool_3x3"}
    short |= {f"{a}{k}": f"{a}_conv_{k}x{k}" for a in ("sep", "dil") for k in (3, 5)}
    table = {
        "accurate": "skip0 skip1 sep5:0 sep3:1 sep5:3 sep3:1 sep5:4 skip0",
        "reduction": "avg1 avg0 dil5:2 avg0 dil5:3 dil5:2 dil5:4 dil5:3",
        "robust": "dil5:0 dil5:1 dil5:1 dil5:2 dil3:3 dil5:2 dil3:4 dil3:3",
    }
    for kind, text in table.items():
        edges = [Edge(short[entry[:-1].rstrip(":")], int(entry[-1])) for entry in text.split()]
        assert load_genotype("arnas").cell[kind].nodes == tuple(zip(edges[::2], edges[1::2], strict=True))


def test_parameter_free_operations():
    assert DSARA.parameter_free().tolist() == [True, True, True, False, False, False, False]
    assert DARTS.parameter_free().tolist() == [True, True, True, True, False, False, False, False]


def test_a_small_space_of_another_shape_builds():
    space = CellSpace("dsara", DSARA.operations, Layout(("a", "b"), (1, 3)), nodes=2, incoming=1)
    genotype = space.random(torch.Generator().manual_seed(0))
    assert [len(node) for _, cell in genotype.cells for node in cell.nodes] == [1] * 6
    network = space.build(genotype, channels=2, cells=4, **RGB)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
