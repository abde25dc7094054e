"""The topology of a discovered architecture: depth, width and operations of each kind of cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search_spaces import graph
from search_spaces.genotype import AnyGenotype, Cell, Genotype


@dataclass(frozen=True)
class CellTopology:
    """What one kind of cell looks like.

    depth: longest path from an input, in operations;  input_edges: operations that read an input (the width);
    edges: operations;  antichain: most intermediate nodes of which none reaches another;
    paths: ways from an input to the output;  operations: how often each occurs.
    """

    kind: str
    depth: int
    input_edges: int
    edges: int
    antichain: int
    paths: int
    operations: Mapping[str, int]

    def to_data(self) -> dict[str, Any]:
        """Plain values, as written to JSON."""
        return {
            "kind": self.kind,
            "depth": self.depth,
            "input_edges": self.input_edges,
            "edges": self.edges,
            "antichain": self.antichain,
            "paths": self.paths,
            "operations": dict(self.operations),
        }


def topology(genotype: AnyGenotype) -> tuple[CellTopology, ...]:
    """The topology of every kind of cell, in the order of the layout.

    Empty for a ``StageGenotype``: a chain of layers has no cells, and its depths and widths say all there is.
    """
    if not isinstance(genotype, Genotype):
        return ()
    return tuple(cell_topology(kind, cell) for kind, cell in genotype.cells)


def cell_topology(kind: str, cell: Cell) -> CellTopology:
    """The topology of one cell."""
    return CellTopology(
        kind=kind,
        depth=graph.depth(cell),
        input_edges=graph.input_edges(cell),
        edges=graph.edge_count(cell),
        antichain=graph.antichain_width(cell),
        paths=graph.path_count(cell),
        operations=graph.operation_histogram(cell),
    )
