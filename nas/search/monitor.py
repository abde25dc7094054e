"""What a search looks like while it runs, and when it goes wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from search_spaces.genotype import Genotype
from search_spaces.operations import OPERATIONS

COLLAPSE_SHARE = 0.75
"""Share of parameter-free edges in a kind of cell from which on a search is called collapsed. The published ARNAS
cells have at most 3 of 8; differentiable searches that fail fill cells with skip connections or pools."""


def entropy(weights: Tensor) -> float:
    """Mean entropy of the mixing weights [edges, operations], as a share of its largest value (0 to 1)."""
    terms = torch.special.entr(weights.detach().double()).sum(1)
    return float(terms.mean() / torch.log(torch.tensor(float(weights.shape[1]))))


def by_operation(operations: Sequence[str], weights: Tensor) -> dict[str, list[float]]:
    """The mixing weights [edges, operations], four decimals of them, by the name of the operation."""
    columns = weights.detach().cpu().T.tolist()
    return {name: [round(value, 4) for value in column] for name, column in zip(operations, columns, strict=True)}


def parameter_free_edges(genotype: Genotype) -> dict[str, tuple[int, int]]:
    """For each kind of cell: edges whose operation has no weights, and all edges."""
    counts = {}
    for kind, cell in genotype.cells:
        edges = [edge for node in cell.nodes for edge in node]
        counts[kind] = (sum(OPERATIONS[edge.operation].parameter_free for edge in edges), len(edges))
    return counts


def collapsing(edges: Mapping[str, Sequence[int]]) -> list[str]:
    """How far each kind of cell that fills with skip connections or pools has; edges: ``parameter_free_edges``."""
    return [
        f"{free} of {total} edges of the {kind} cell"
        for kind, (free, total) in edges.items()
        if free / total >= COLLAPSE_SHARE
    ]


REMEDY = "lower the architecture learning rate, stop earlier, or use the unrolled gradient"
"""For a search that collapses."""


def collapse_warnings(genotype: Genotype, epoch: int) -> list[str]:
    """One line for each kind of cell that is filling with skip connections or pools."""
    return [
        f"epoch {epoch}: {part} are skips or pools; the search may be collapsing ({REMEDY})"
        for part in collapsing(parameter_free_edges(genotype))
    ]


def alpha_entropies(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Entropy of the mixing weights by kind of cell."""
    return {kind: entropy(table) for kind, table in weights.items()}
