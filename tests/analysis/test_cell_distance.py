"""The distance of cells: a metric, blind to numbering, zero for what cannot be told apart."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest

from nas.analysis.cell_distance import PROFILES, cell_distance, distance_matrix, genotype_distances, profiles
from nas.errors import InputError
from search_spaces import graph
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Cell, Edge, Genotype
from search_spaces.layout import Layout

OPERATIONS = ("sep_conv_3x3", "skip_connect", "dil_conv_5x5")


def random_cell(draw, nodes):
    return Cell(
        tuple(
            tuple(Edge(draw.choice(OPERATIONS), draw.randrange(node)) for _ in range(draw.randint(1, 3)))
            for node in range(2, 2 + nodes)
        )
    )


def renumbered(cell, draw):
    """The same cell with its nodes in another topological order, and the edges into each node in another order."""
    waiting, order = set(graph.intermediate_nodes(cell)), []
    while waiting:
        ready = [node for node in waiting if all(edge.source not in waiting for edge in cell.nodes[node - 2])]
        order.append(draw.choice(sorted(ready)))
        waiting.remove(order[-1])
    number = {0: 0, 1: 1} | {node: place for place, node in enumerate(order, start=2)}
    return Cell(
        tuple(
            tuple(
                Edge(edge.operation, number[edge.source])
                for edge in draw.sample(cell.nodes[node - 2], len(cell.nodes[node - 2]))
            )
            for node in order
        )
    )


def same_graph(first, second):
    """Whether some renumbering of the nodes makes one cell the other, by trying all."""
    nodes = graph.intermediate_nodes(first)
    wanted = sorted((edge.operation, edge.source, node) for node in nodes for edge in second.nodes[node - 2])
    for order in itertools.permutations(nodes):
        number = {0: 0, 1: 1} | dict(zip(nodes, order, strict=True))
        moved = [(e.operation, number[e.source], number[node]) for node in nodes for e in first.nodes[node - 2]]
        if sorted(moved) == wanted:
            return True
    return False


def test_axioms_of_a_metric():
    draw = random.Random(0)
    cells = [random_cell(draw, draw.randint(1, 6)) for _ in range(60)]
    distances = distance_matrix(cells)
    assert (distances == distances.T).all() and (np.diagonal(distances) == 0).all()
    assert distances.min() >= 0 and distances.max() <= 1
    detours = distances[:, :, None] + distances[None, :, :]  # [i, k, j]
    assert (distances[:, None, :] <= detours + 1e-12).all()


def test_small_changes_are_nearer_than_great_ones():
    """Not only alike or not: one operation of eight exchanged, then all of them."""
    cell = load_genotype("arnas").cell["accurate"]
    steps = [cell]
    for node, edge in itertools.product(range(4), range(2)):
        nodes = [list(incoming) for incoming in steps[-1].nodes]
        nodes[node][edge] = Edge("max_pool_3x3", nodes[node][edge].source)
        steps.append(Cell(tuple(map(tuple, nodes))))
    distances = [cell_distance(cell, step) for step in steps]
    assert distances == sorted(distances) and len(set(distances)) == 9
    assert distances[1] < 0.5 and distances[-1] > 0.9


@pytest.mark.parametrize("seed", range(40))
def test_numbering_does_not_matter(seed):
    draw = random.Random(seed)
    cell = random_cell(draw, draw.randint(2, 7))
    assert cell_distance(cell, renumbered(cell, draw)) == 0


def test_which_input_is_read_matters():
    assert cell_distance(Cell(((Edge("a", 0),),)), Cell(((Edge("a", 1),),))) > 0


def test_one_node_read_twice_is_not_two_alike_read_once():
    """Both compute the same sums; only what becomes of a node tells them apart."""
    fan = ((Edge("a", 0),), (Edge("a", 0),))
    assert cell_distance(Cell((*fan, (Edge("b", 2), Edge("b", 3)))), Cell((*fan, (Edge("b", 2), Edge("b", 2))))) > 0


def test_zero_if_and_only_if_the_profiles_agree():
    draw = random.Random(1)
    cells = [random_cell(draw, draw.randint(1, 2)) for _ in range(120)]
    described = [profiles(cell) for cell in cells]
    distances = distance_matrix(cells)
    assert all((distances[i, j] == 0) == (described[i] == described[j]) for i in range(120) for j in range(120))
    assert (distances == 0).sum() > 120  # some of these few shapes occur twice


def test_zero_exactly_for_the_same_graph_among_all_tiny_cells():
    """All cells of two nodes with one or two operands and two operations, and every fifth of three nodes."""

    def into(node):
        edges = [Edge(operation, source) for operation in ("a", "b") for source in range(node)]
        return [*itertools.combinations_with_replacement(edges, 2)]

    two = [Cell(nodes) for nodes in itertools.product(into(2), into(3))]
    three = [Cell(nodes) for nodes in itertools.product(into(2), into(3), into(4))]
    for cells in (two, random.Random(2).sample(three, 300)):
        near = distance_matrix(cells) == 0
        for i, j in itertools.combinations(range(len(cells)), 2):
            # Different numbers of operations are no question; brute force decides the rest.
            if near[i, j] or graph.operation_histogram(cells[i]) == graph.operation_histogram(cells[j]):
                assert near[i, j] == same_graph(cells[i], cells[j]), (cells[i], cells[j])


def test_profiles_by_hand():
    cell = Cell(((Edge("a", 0), Edge("b", 1)), (Edge("a", 2), Edge("a", 0))))
    found = profiles(cell)
    assert tuple(found) == PROFILES
    assert found["operations"] == {"a": 3, "b": 1}
    assert found["reading"] == {"a of input 0": 2, "b of input 1": 1, "a of node": 1}
    assert found["position"] == {"a into depth 1": 1, "b into depth 1": 1, "a into depth 2": 2}
    assert found["sequences"] == {"a then a": 1, "b then a": 1}
    assert found["wiring"].total() == 2 * 2


def test_distance_by_hand():
    """Mean over the profiles of 1 - common / all; two cells of one node share one of two operations, not the input."""
    first, second = Cell(((Edge("a", 0), Edge("b", 0)),)), Cell(((Edge("a", 0), Edge("b", 1)),))
    # operations and position agree; reading shares one of three words; neither has a sequence; the colours differ.
    assert cell_distance(first, second) == pytest.approx((0 + 2 / 3 + 0 + 0 + 1) / 5)


def test_similarity_is_a_positive_definite_kernel():
    draw = random.Random(3)
    distances = distance_matrix([random_cell(draw, 4) for _ in range(80)])
    assert np.linalg.eigvalsh(1 - distances).min() > -1e-9


def test_distances_of_genotypes():
    layout = Layout(("accurate", "robust"), (1, 2))
    draw = random.Random(4)

    def genotype(accurate, robust, reduction):
        cells = {"accurate": accurate, "reduction": reduction, "robust": robust}
        return Genotype("dsara", layout, tuple(cells.items()))

    first, second = (genotype(*(random_cell(draw, 4) for _ in range(3))) for _ in range(2))
    matrix = genotype_distances([first, second, first])
    mean = sum(cell_distance(cell, second.cell[kind]) for kind, cell in first.cells) / 3
    assert matrix[0, 1] == pytest.approx(mean) and matrix[0, 2] == 0
    with pytest.raises(InputError, match="same kinds"):
        genotype_distances([first, Genotype("darts", Layout(("normal",), (1,)), (("normal", first.cells[0][1]),))])


def test_distances_need_no_torch():
    code = "import sys, nas.analysis.cell_distance; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
