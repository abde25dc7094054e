"""How far apart two cells are: a metric from 0 (alike) to 1 (nothing in common). Torch-free.

A cell has five profiles, each a multiset of words, from what it is made of to how it is wired:

1. operations: the operation of every edge;
2. reading: the operation and what it reads: input 0, input 1 or an intermediate node;
3. position: the operation and the depth of the node it leads into;
4. sequences: every two operations of which one feeds the other;
5. wiring: the colours of every node in all rounds of colour refinement (Weisfeiler and Leman, 1968; Shervashidze et
   al., JMLR 12, 2011) over incoming and outgoing edges with their operations, until no colour can divide further.

In each profile two cells are as far apart as their multisets have too little in common, 1 - |A and B| / |A or B|
(Jaccard, with the smaller and the larger multiplicities), and the distance of the cells is the mean over the profiles.
That is a metric on profiles, because each term is one; it does not depend on how intermediate nodes are numbered; and
it is zero if and only if all profiles are equal. Cells that colour refinement cannot tell apart are at distance zero
without being the same: rare among cells with operations, and none of the cells of up to three nodes with two operands
(a test goes through them). 1 - distance is a positive definite kernel, since it is so for the Jaccard similarity of
multisets, so that the energy statistic of a comparison is never negative.

Exact graph edit distance was not taken: its time grows with the factorial of the nodes, and it gives no such kernel.
This takes microseconds a pair: the multisets of all cells are made once and intersected word by word.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nas.errors import InputError
from search_spaces import graph
from search_spaces.genotype import Cell, Genotype

PROFILES = ("operations", "reading", "position", "sequences", "wiring")


def profiles(cell: Cell) -> Mapping[str, Counter[str]]:
    """The multisets of words by which a cell is compared, by the names of ``PROFILES``."""
    depths = graph.node_depths(cell)
    incoming = dict(zip(graph.intermediate_nodes(cell), cell.nodes, strict=True))
    edges = [(edge.operation, edge.source, node) for node, into in incoming.items() for edge in into]
    return {
        "operations": Counter(operation for operation, _, _ in edges),
        "reading": Counter(f"{operation} of {_source(source)}" for operation, source, _ in edges),
        "position": Counter(f"{operation} into depth {depths[node]}" for operation, _, node in edges),
        "sequences": Counter(
            f"{before.operation} then {operation}"
            for operation, source, _ in edges
            for before in incoming.get(source, ())
        ),
        "wiring": Counter(_colours(edges, len(cell.nodes))),
    }


def cell_distance(first: Cell, second: Cell) -> float:
    """The distance of two cells, from 0 to 1."""
    return float(distance_matrix([first, second])[0, 1])


def distance_matrix(cells: Sequence[Cell]) -> NDArray[np.float64]:
    """The distances of all pairs of ``cells``, [N, N]: symmetric, zero on the diagonal."""
    described = [profiles(cell) for cell in cells]
    total = np.zeros((len(cells), len(cells)))
    for name in PROFILES:
        total += _jaccard([profile[name] for profile in described])
    return total / len(PROFILES)


def genotype_distances(genotypes: Sequence[Genotype]) -> NDArray[np.float64]:
    """The distances of all pairs of architectures, [N, N]: the mean over kinds of cell; layouts are not compared.

    Raises ``InputError`` unless all have cells of the same kinds.
    """
    kinds = list(genotypes[0].cell)
    for other in genotypes:
        if set(other.cell) != set(kinds):
            raise InputError(
                f"cells of kind {', '.join(kinds)} cannot be compared with cells of kind {', '.join(other.cell)}: "
                "give architectures whose cells are of the same kinds"
            )
    total = np.zeros((len(genotypes), len(genotypes)))
    for kind in kinds:
        total += distance_matrix([genotype.cell[kind] for genotype in genotypes])
    return total / len(kinds)


def _jaccard(multisets: Sequence[Counter[str]]) -> NDArray[np.float64]:
    """1 - |A and B| / |A or B| of all pairs of multisets; 0 where both are empty."""
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for index, multiset in enumerate(multisets):
        for word in multiset:
            holders[word].append(index)
    common = np.zeros((len(multisets), len(multisets)))
    for word, having in holders.items():
        # Most words of a large population are those of few cells.
        counts = np.array([multisets[index][word] for index in having])
        common[np.ix_(having, having)] += np.minimum.outer(counts, counts)
    sizes = np.array([multiset.total() for multiset in multisets])
    union = sizes[:, None] + sizes[None, :] - common
    return np.where(union > 0, 1 - common / np.maximum(union, 1), 0.0)


def _source(node: int) -> str:
    return f"input {node}" if node in graph.INPUTS else "node"


def _colours(edges: Sequence[tuple[str, int, int]], nodes: int) -> list[str]:
    """The colours of the ``nodes`` intermediate nodes in every round, equal for nodes not told apart so far."""
    numbers = range(len(graph.INPUTS), len(graph.INPUTS) + nodes)
    colours = {node: _source(node) for node in (*graph.INPUTS, *numbers)}
    seen: list[str] = []
    # Each round divides a class of nodes or changes nothing more, so that as many rounds as nodes are enough.
    for _ in numbers:
        around: defaultdict[int, list[str]] = defaultdict(list)
        for operation, source, target in edges:
            around[target].append(f"from {colours[source]} by {operation}")
            around[source].append(f"to {colours[target]} by {operation}")
        colours = {node: _digest(colour, *sorted(around[node])) for node, colour in colours.items()}
        seen += [colours[node] for node in numbers]
    return seen


def _digest(*words: str) -> str:
    # Without it colours would grow to all walks of the graph.
    return hashlib.blake2b("\n".join(words).encode(), digest_size=12).hexdigest()
