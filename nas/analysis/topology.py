"""The topology of a discovered architecture: depth, width, paths and operations of each kind of cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from search_spaces import graph
from search_spaces.genotype import AnyGenotype, Cell, Genotype
from search_spaces.operations import OPERATIONS, Operation

STATISTICS: Mapping[str, str] = {
    "depth": "operations on the longest path",
    "input edges": "operations that read an input of the cell",
    "antichain": "most nodes of which none reaches another",
    "paths": "paths from an input to the output",
    "path length": "mean operations on a path",
    "reach": "side of the field that the output sees, in pixels",
    "parameter-free": "share of skips and poolings among the operations",
    "parameter-free at inputs": "the same among the operations that read an input",
    "skips": "share of skips among the operations",
    "dilated": "share of dilated convolutions among the operations",
}
"""What cells are compared by. Every cell has a value of each, and none follows from the others."""


@dataclass(frozen=True)
class CellTopology:
    """What one kind of cell looks like.

    depth: longest path from an input, in operations;  input_edges: operations that read an input (the width);
    edges: operations;  antichain: most intermediate nodes of which none reaches another;
    paths: ways from an input to the output;  path_lengths: those of 1, 2, ... operations;
    operations: how often each occurs;  by_depth: the same among the operations into nodes of depth 1, 2, ...;
    by_source: the same among the operations that read an "input" or an "intermediate" node;
    reach: side of the square of input pixels that can matter to a pixel of the output, all strides taken as 1.
    """

    kind: str
    depth: int
    input_edges: int
    edges: int
    antichain: int
    paths: int
    path_lengths: tuple[int, ...]
    operations: Mapping[str, int]
    by_depth: tuple[Mapping[str, int], ...]
    by_source: Mapping[str, Mapping[str, int]]
    reach: int

    @property
    def parameter_free(self) -> float:
        """Share of skips and poolings among all operations."""
        return _share(self.operations, _is_parameter_free)

    @property
    def path_length(self) -> float:
        """Mean number of operations on a path from an input to the output."""
        return sum(length * count for length, count in enumerate(self.path_lengths, start=1)) / self.paths

    @property
    def statistics(self) -> dict[str, float]:
        """The numbers cells are compared by, in the order of ``STATISTICS``."""
        return {
            "depth": float(self.depth),
            "input edges": float(self.input_edges),
            "antichain": float(self.antichain),
            "paths": float(self.paths),
            "path length": self.path_length,
            "reach": float(self.reach),
            "parameter-free": self.parameter_free,
            # The first intermediate node has nothing but inputs to read, so that these are never none.
            "parameter-free at inputs": _share(self.by_source["input"], _is_parameter_free),
            "skips": _share(self.operations, lambda operation: operation.kind == "skip"),
            "dilated": _share(self.operations, lambda operation: operation.dilation > 1),
        }

    def to_data(self) -> dict[str, Any]:
        """Plain values, as written to JSON."""
        return {
            "kind": self.kind,
            "depth": self.depth,
            "input_edges": self.input_edges,
            "edges": self.edges,
            "antichain": self.antichain,
            "paths": self.paths,
            "path_lengths": list(self.path_lengths),
            "operations": dict(self.operations),
            "by_depth": [dict(counts) for counts in self.by_depth],
            "by_source": {source: dict(counts) for source, counts in self.by_source.items()},
            "parameter_free": self.parameter_free,
            "reach": self.reach,
        }


def topology(genotype: AnyGenotype) -> tuple[CellTopology, ...]:
    """The topology of every kind of cell, in the order of the layout.

    Empty for a ``StageGenotype``: a chain of layers has no cells, and its depths and widths say all there is.
    """
    if not isinstance(genotype, Genotype):
        return ()
    return tuple(cell_topology(kind, cell) for kind, cell in genotype.cells)


def cell_topology(kind: str, cell: Cell) -> CellTopology:
    """The topology of one cell, whose operations are those of ``search_spaces.operations``."""
    return CellTopology(
        kind=kind,
        depth=graph.depth(cell),
        input_edges=graph.input_edges(cell),
        edges=graph.edge_count(cell),
        antichain=graph.antichain_width(cell),
        paths=graph.path_count(cell),
        path_lengths=graph.path_lengths(cell),
        operations=graph.operation_histogram(cell),
        by_depth=graph.operations_by_depth(cell),
        by_source=graph.operations_by_source(cell),
        reach=_reach(cell),
    )


def differences(genotype: Genotype) -> dict[str, float]:
    """Each statistic of the cell near the input less that of the cell near the output: accurate less robust.

    Empty where the first and the last section are of one kind.
    """
    first, last = genotype.layout.sections[0], genotype.layout.sections[-1]
    if first == last:
        return {}
    near, far = (cell_topology(kind, genotype.cell[kind]).statistics for kind in (first, last))
    return {name: near[name] - far[name] for name in STATISTICS}


def _reach(cell: Cell) -> int:
    """The receptive field of the output on the inputs: along each path every K x K kernel adds dilation * (K - 1)."""
    fields = dict.fromkeys(graph.INPUTS, 1)
    for node, incoming in zip(graph.intermediate_nodes(cell), cell.nodes, strict=True):
        fields[node] = max(fields[edge.source] + _growth(OPERATIONS[edge.operation]) for edge in incoming)
    return max(fields.values())


def _growth(operation: Operation) -> int:
    return operation.repeats * operation.dilation * (operation.kernel - 1) if operation.kernel else 0


def _is_parameter_free(operation: Operation) -> bool:
    return operation.parameter_free


def _share(counts: Mapping[str, int], chosen: Callable[[Operation], bool]) -> float:
    return sum(count for name, count in counts.items() if chosen(OPERATIONS[name])) / sum(counts.values())
