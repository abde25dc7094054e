"""A cell as a graph: depth, width, largest antichain, paths. Torch-free, like the genotype it looks at.

Nodes are 0 and 1 (the cell's inputs), 2, 3, ... (intermediate) and "output", which concatenates all intermediate
nodes. Every edge carries the name of its operation; the edges into the output carry "concat".
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import networkx as nx

from search_spaces.genotype import Cell

INPUTS = (0, 1)
OUTPUT = "output"
CONCAT = "concat"


def cell_graph(cell: Cell) -> nx.MultiDiGraph:
    """The directed graph of ``cell``; edge attribute ``operation``. Two nodes may be joined more than once."""
    graph = nx.MultiDiGraph()
    graph.add_nodes_from(INPUTS)
    for node, incoming in enumerate(cell.nodes, start=len(INPUTS)):
        graph.add_node(node)
        for edge in incoming:
            graph.add_edge(edge.source, node, operation=edge.operation)
    graph.add_node(OUTPUT)
    for node in intermediate_nodes(cell):
        graph.add_edge(node, OUTPUT, operation=CONCAT)
    return graph


def intermediate_nodes(cell: Cell) -> range:
    """The numbers of the intermediate nodes: 2, 3, ..."""
    return range(len(INPUTS), len(INPUTS) + len(cell.nodes))


def node_depths(cell: Cell) -> dict[int, int]:
    """For each input and intermediate node the longest path to it from an input, in operations."""
    depths = dict.fromkeys(INPUTS, 0)
    for node, incoming in zip(intermediate_nodes(cell), cell.nodes, strict=True):
        # Sources are numbered below their node, so their depths are known.
        depths[node] = 1 + max(depths[edge.source] for edge in incoming)
    return depths


def depth(cell: Cell) -> int:
    """The longest path from an input to an intermediate node, in operations. ARNAS: accurate 3, robust 4."""
    return max(node_depths(cell).values())


def longest_path(cell: Cell) -> tuple[tuple[int, str, int], ...]:
    """One path of ``depth(cell)`` operations, from an input on: source, operation and target of each.

    Of several such paths it is the one whose nodes, seen from the output, have the lowest numbers.
    """
    depths = node_depths(cell)
    node = max(depths, key=lambda number: depths[number])
    steps = []
    while node not in INPUTS:
        edge = min(cell.nodes[node - len(INPUTS)], key=lambda edge: (-depths[edge.source], edge.source))
        steps.append((edge.source, edge.operation, node))
        node = edge.source
    return tuple(reversed(steps))


def supernet_edges(count: int) -> list[tuple[int, int]]:
    """Source and target of a supernet's first ``count`` edges in the order of its mixing weights.

    In a supernet every node reads all nodes before it.
    """
    targets = itertools.count(len(INPUTS))
    return list(itertools.islice(((source, target) for target in targets for source in range(target)), count))


def input_edges(cell: Cell) -> int:
    """How many operations read one of the two inputs, the "width" of a cell. ARNAS: accurate 6, robust 3."""
    return sum(edge.source in INPUTS for incoming in cell.nodes for edge in incoming)


def edge_count(cell: Cell) -> int:
    """How many operations the cell has."""
    return sum(len(incoming) for incoming in cell.nodes)


def antichain_width(cell: Cell) -> int:
    """The most intermediate nodes of which none reaches another: what can be computed side by side.

    By Dilworth's theorem this is the least number of chains that cover the nodes, which is their number less a
    maximum matching of the reachability relation (Fulkerson, 1956).
    """
    nodes = intermediate_nodes(cell)
    order = nx.transitive_closure_dag(nx.DiGraph(cell_graph(cell).subgraph(nodes)))
    bipartite = nx.Graph()
    above = [("above", node) for node in nodes]
    bipartite.add_nodes_from(above)
    bipartite.add_nodes_from(("below", node) for node in nodes)
    bipartite.add_edges_from((("above", source), ("below", target)) for source, target in order.edges)
    matching = nx.bipartite.hopcroft_karp_matching(bipartite, top_nodes=above)
    # The matching names each pair twice, once from either side.
    return len(nodes) - len(matching) // 2


def path_count(cell: Cell) -> int:
    """How many different paths lead from an input to the output; parallel operations make different paths."""
    return sum(path_lengths(cell))


def path_lengths(cell: Cell) -> tuple[int, ...]:
    """How many paths from an input to the output have 1, 2, ..., ``depth(cell)`` operations."""
    # paths[node][length]: ways to the node from an input in that many operations.
    paths: dict[int, tuple[int, ...]] = dict.fromkeys(INPUTS, (1,))
    for node, incoming in zip(intermediate_nodes(cell), cell.nodes, strict=True):
        paths[node] = (0, *_added(paths[edge.source] for edge in incoming))
    return _added(paths[node] for node in intermediate_nodes(cell))[1:]


def _added(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Sums place by place; a tuple that ends early counts as zeros."""
    return tuple(map(sum, itertools.zip_longest(*counts, fillvalue=0)))


def operation_histogram(cell: Cell) -> dict[str, int]:
    """How often each operation occurs, the most frequent first, then by name."""
    return most_frequent_first(edge.operation for incoming in cell.nodes for edge in incoming)


def operations_by_source(cell: Cell) -> dict[str, dict[str, int]]:
    """The operations that read an "input" of the cell and those that read an "intermediate" node, counted."""
    edges = [edge for incoming in cell.nodes for edge in incoming]
    return {
        "input": most_frequent_first(edge.operation for edge in edges if edge.source in INPUTS),
        "intermediate": most_frequent_first(edge.operation for edge in edges if edge.source not in INPUTS),
    }


def operations_by_depth(cell: Cell) -> tuple[dict[str, int], ...]:
    """The operations into nodes of depth 1, 2, ..., ``depth(cell)``, counted."""
    depths = node_depths(cell)
    at: list[list[str]] = [[] for _ in range(depth(cell))]
    for node, incoming in zip(intermediate_nodes(cell), cell.nodes, strict=True):
        at[depths[node] - 1] += [edge.operation for edge in incoming]
    return tuple(most_frequent_first(operations) for operations in at)


def most_frequent_first(operations: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, the most frequent first, then by name."""
    return dict(sorted(Counter(operations).items(), key=lambda item: (-item[1], item[0])))
