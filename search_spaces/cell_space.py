"""CellSpace: a search space of cells, as data; its supernet, its discretisation and its random members."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from search_spaces.genotype import AnyGenotype, Cell, Edge, Genotype, GenotypeError
from search_spaces.layout import Layout
from search_spaces.network import CellNetwork
from search_spaces.operations import OPERATIONS
from search_spaces.partial import PartialCell
from search_spaces.sampled import SampledSupernet
from search_spaces.supernet import MixedCell, Relaxation, Supernet, edge_row, softmax


@dataclass(frozen=True)
class CellSpace:
    """Candidate operations, intermediate nodes, edges kept per node, and the layout of the cells.

    "none" may be a candidate in the supernet but is never kept: it is left out when edges are ranked.
    """

    name: str
    operations: tuple[str, ...]
    layout: Layout
    nodes: int = 4
    incoming: int = 2

    @property
    def edges(self) -> int:
        """Edges of a cell of the supernet: sum over the nodes of 2 + i."""
        return self.nodes * (self.nodes + 3) // 2

    def supernet(
        self,
        *,
        channels: int,
        cells: int,
        input_shape: tuple[int, int, int],
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        relaxation: Relaxation = softmax,
        partial_channels: int = 1,
        sampled: bool = False,
    ) -> Supernet:
        """The weight-sharing network over this space.

        partial_channels: k lets only 1/k of the channels through the candidates (partial.py); sampled: each edge
        computes one sampled candidate only (sampled.py), which leaves ``relaxation`` nothing but to be reported.
        """
        cell: Callable[..., nn.Module] = MixedCell
        if partial_channels > 1:
            cell = partial(PartialCell, share=partial_channels)
        if sampled:
            return SampledSupernet(
                self.operations,
                self.nodes,
                self.layout,
                channels=channels,
                cells=cells,
                input_shape=input_shape,
                classes=classes,
                mean=mean,
                std=std,
                share=partial_channels,
            )
        return Supernet(
            self.operations,
            self.nodes,
            self.layout,
            channels=channels,
            cells=cells,
            input_shape=input_shape,
            classes=classes,
            mean=mean,
            std=std,
            relaxation=relaxation,
            cell=cell,
        )

    def build(
        self,
        genotype: AnyGenotype,
        *,
        channels: int,
        cells: int,
        input_shape: tuple[int, int, int],
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        auxiliary: bool = False,
    ) -> CellNetwork:
        """The network of ``genotype`` with ``cells`` cells and ``channels`` base channels."""
        self.check(genotype)
        assert isinstance(genotype, Genotype)
        return CellNetwork(
            genotype,
            channels=channels,
            cells=cells,
            input_shape=input_shape,
            classes=classes,
            mean=mean,
            std=std,
            auxiliary=auxiliary,
        )

    def check(self, genotype: AnyGenotype) -> None:
        """Raise ``GenotypeError`` unless ``genotype`` uses only this space's operations."""
        if not isinstance(genotype, Genotype):
            raise GenotypeError(f"space '{self.name}' is described by cells, not by depths and widths")
        known = [name for name in self.operations if name != "none"]
        for kind, cell in genotype.cells:
            for position, node in enumerate(cell.nodes):
                for edge in node:
                    if edge.operation not in known:
                        raise GenotypeError(
                            f"cell '{kind}', node {position + 2}: unknown operation '{edge.operation[:60]}'; "
                            f"space '{self.name}' has {', '.join(known)}"
                        )

    def discretise(self, weights: Mapping[str, Tensor]) -> Genotype:
        """The genotype of mixing weights [edges, operations] by kind.

        For each node the ``incoming`` edges whose best operation weighs most, strongest first, each with that
        operation (DARTS, section 2.4; ARNAS). Ties go to the lower source and the earlier operation.
        """
        eligible = [i for i, name in enumerate(self.operations) if name != "none"]
        cells = []
        for kind in self.layout.kinds:
            table = weights[kind].detach().double().cpu()[:, eligible].tolist()
            nodes = []
            for node in range(self.nodes):
                best = []
                for source in range(node + 2):
                    row = table[edge_row(node, source)]
                    strength = max(row)
                    best.append((-strength, source, self.operations[eligible[row.index(strength)]]))
                nodes.append(tuple(Edge(name, source) for _, source, name in sorted(best)[: self.incoming]))
            cells.append((kind, Cell(tuple(nodes))))
        return Genotype(self.name, self.layout, tuple(cells))

    def random(self, generator: torch.Generator) -> Genotype:
        """A genotype drawn uniformly: ``incoming`` different sources per node, any operation but "none"."""
        candidates = [name for name in self.operations if name != "none"]
        cells = []
        for kind in self.layout.kinds:
            nodes = []
            for node in range(self.nodes):
                sources = sorted(torch.randperm(node + 2, generator=generator)[: self.incoming].tolist())
                picks = torch.randint(len(candidates), (self.incoming,), generator=generator).tolist()
                nodes.append(tuple(Edge(candidates[p], s) for p, s in zip(picks, sources, strict=True)))
            cells.append((kind, Cell(tuple(nodes))))
        return Genotype(self.name, self.layout, tuple(cells))

    def parameter_free(self) -> Tensor:
        """[operations] bool: which candidates have no weights."""
        return torch.tensor([OPERATIONS[name].parameter_free for name in self.operations])
