"""Measures of a cell against brute force, networkx and the published ARNAS cells."""

import itertools
import random
import subprocess
import sys
from collections import Counter

import networkx as nx
import pytest

from search_spaces import graph
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Cell, Edge

OPERATIONS = ("sep_conv_3x3", "skip_connect", "max_pool_3x3")


def random_cell(seed):
    """Up to seven nodes with one to three incoming edges, parallel edges included."""
    draw = random.Random(seed)
    return Cell(
        tuple(
            tuple(Edge(draw.choice(OPERATIONS), draw.randrange(node)) for _ in range(draw.randint(1, 3)))
            for node in range(2, 2 + draw.randint(1, 7))
        )
    )


CELLS = [random_cell(seed) for seed in range(40)]


@pytest.mark.parametrize(
    ("kind", "depth", "input_edges", "antichain"), [("accurate", 3, 6, 2), ("robust", 4, 3, 1), ("reduction", 4, 3, 1)]
)
def test_published_arnas(kind, depth, input_edges, antichain):
    cell = load_genotype("arnas").cell[kind]
    assert (graph.depth(cell), graph.input_edges(cell)) == (depth, input_edges)
    assert graph.antichain_width(cell) == antichain


@pytest.mark.parametrize("cell", CELLS)
def test_antichain_is_the_largest_set_without_dependence(cell):
    nodes = graph.intermediate_nodes(cell)
    reachable = {node: nx.descendants(graph.cell_graph(cell), node) for node in nodes}

    def independent(chosen):
        return all(b not in reachable[a] and a not in reachable[b] for a, b in itertools.combinations(chosen, 2))

    subsets = (chosen for size in range(len(nodes) + 1) for chosen in itertools.combinations(nodes, size))
    assert graph.antichain_width(cell) == max(len(chosen) for chosen in subsets if independent(chosen))


@pytest.mark.parametrize("cell", CELLS)
def test_depth_is_the_longest_path(cell):
    whole = graph.cell_graph(cell)
    operations = whole.subgraph([node for node in whole if node != graph.OUTPUT])
    assert graph.depth(cell) == nx.dag_longest_path_length(operations)
    # The deepest node is joined to the output, so the whole graph is one edge longer.
    assert len(nx.dag_longest_path(whole)) - 1 == graph.depth(cell) + 1


@pytest.mark.parametrize("cell", CELLS)
def test_paths_and_edges_are_those_of_the_graph(cell):
    whole = graph.cell_graph(cell)
    paths = sum(len(list(nx.all_simple_edge_paths(whole, node, graph.OUTPUT))) for node in graph.INPUTS)
    assert graph.path_count(cell) == paths
    assert graph.input_edges(cell) == whole.out_degree(0) + whole.out_degree(1)
    operations = [operation for _, _, operation in whole.edges(data="operation") if operation != graph.CONCAT]
    assert graph.edge_count(cell) == len(operations)
    assert graph.operation_histogram(cell) == {name: operations.count(name) for name in set(operations)}


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_of_paths_and_places_of_operations_are_those_of_the_graph(cell):
    whole = graph.cell_graph(cell)
    found = [len(path) - 1 for node in graph.INPUTS for path in nx.all_simple_edge_paths(whole, node, graph.OUTPUT)]
    lengths = graph.path_lengths(cell)
    assert lengths == tuple(found.count(length) for length in range(1, max(found) + 1))
    assert len(lengths) == graph.depth(cell)
    edges = [edge for edge in whole.edges(data="operation") if edge[2] != graph.CONCAT]
    deep = {
        node: max(len(path) - 1 for source in graph.INPUTS for path in nx.all_simple_paths(whole, source, node))
        for node in graph.intermediate_nodes(cell)
        if any(nx.has_path(whole, source, node) for source in graph.INPUTS)
    }
    for depth, counts in enumerate(graph.operations_by_depth(cell), start=1):
        assert counts == Counter(operation for _, target, operation in edges if deep[target] == depth)
    by_source = graph.operations_by_source(cell)
    assert by_source["input"] == Counter(operation for source, _, operation in edges if source in graph.INPUTS)
    assert by_source["intermediate"] == Counter(operation for source, _, operation in edges if source > 1)


def test_a_chain_and_a_fan():
    chain = Cell(tuple((Edge("skip_connect", node + 1),) for node in range(5)))
    assert (graph.depth(chain), graph.antichain_width(chain), graph.path_count(chain)) == (5, 1, 5)
    fan = Cell(tuple((Edge("skip_connect", 0),) for _ in range(5)))
    assert (graph.depth(fan), graph.antichain_width(fan), graph.path_count(fan)) == (1, 5, 5)


def test_histogram_begins_with_the_most_frequent():
    cell = Cell(((Edge("b", 0), Edge("c", 1)), (Edge("c", 0), Edge("a", 1))))
    assert list(graph.operation_histogram(cell).items()) == [("c", 2), ("a", 1), ("b", 1)]


def test_graphs_need_no_torch():
    code = "import sys, search_spaces.graph; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("cell", CELLS)
def test_a_longest_path_is_a_path_of_that_length(cell):
    path = graph.longest_path(cell)
    assert len(path) == graph.depth(cell)
    assert path[0][0] in graph.INPUTS
    assert all(one[2] == other[0] for one, other in itertools.pairwise(path))
    edges = set(graph.cell_graph(cell).edges(data="operation"))
    assert all((source, target, operation) in edges for source, operation, target in path)


def test_edges_of_a_supernet_are_in_the_order_of_its_mixing_weights():
    from search_spaces.supernet import edge_row

    for row, (source, target) in enumerate(graph.supernet_edges(20)):
        assert edge_row(target - 2, source) == row
