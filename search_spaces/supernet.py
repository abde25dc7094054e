"""The weight-sharing network over a cell space: every candidate operation on every edge, mixed by weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from search_spaces import kernels
from search_spaces.layers import Normalise
from search_spaces.layout import Layout
from search_spaces.mixed import MixedEdges
from search_spaces.network import cell_input, stem

Relaxation = Callable[[Tensor], Tensor]
"""Architecture parameters [edges, operations] to mixing weights of the same shape."""


def softmax(alpha: Tensor) -> Tensor:
    """The relaxation of DARTS: each edge mixes its operations by a softmax."""
    return torch.softmax(alpha, dim=-1)


class MixedCell(nn.Module):
    """A cell with all edges: intermediate node i receives from all 2 + i earlier nodes."""

    def __init__(
        self,
        operations: tuple[str, ...],
        nodes: int,
        in_channels: tuple[int, int],
        channels: int,
        *,
        reduces: bool,
        previous_reduces: bool,
    ) -> None:
        super().__init__()
        self.nodes = nodes
        self.preprocess0 = cell_input(in_channels[0], channels, halve=previous_reduces, affine=False)
        self.preprocess1 = cell_input(in_channels[1], channels, halve=False, affine=False)
        # Node s reaches every intermediate node numbered above it; the last one reaches none.
        self.sources = nn.ModuleList(
            MixedEdges(operations, nodes - max(source - 1, 0), channels, 2 if reduces and source < 2 else 1)
            for source in range(nodes + 1)
        )
        for source in range(nodes + 1):
            rows = [edge_row(node, source) for node in range(max(source - 1, 0), nodes)]
            self.register_buffer(f"rows{source}", torch.tensor(rows), persistent=False)

    def forward(self, input0: Tensor, input1: Tensor, weights: Tensor) -> Tensor:
        values = [self.preprocess0(input0), self.preprocess1(input1)]
        totals: list[Tensor | None] = [None] * self.nodes
        for source, edges in enumerate(self.sources):
            if source >= 2:
                value = totals[source - 2]
                assert value is not None
                values.append(value)
            maps = edges(values[source], weights.index_select(0, getattr(self, f"rows{source}")))
            for node, map_ in zip(range(max(source - 1, 0), self.nodes), maps.unbind(0), strict=True):
                total = totals[node]
                totals[node] = map_ if total is None else total + map_
        return kernels.concatenate([total for total in totals if total is not None])


class Supernet(nn.Module):
    """All networks of a layout at once. Pixels [N, C, H, W] in [0, 1] to logits [N, classes].

    ``alpha[kind]`` [edges, operations] are the architecture parameters, one tensor shared by all cells of a kind;
    ``relaxation`` turns them into mixing weights at each forward pass. ``cell`` makes the cells, with the arguments
    and the call of ``MixedCell``.
    """

    def __init__(
        self,
        operations: tuple[str, ...],
        nodes: int,
        layout: Layout,
        *,
        channels: int,
        cells: int,
        input_shape: tuple[int, int, int],
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        relaxation: Relaxation = softmax,
        alpha_scale: float = 1e-3,
        cell: Callable[..., nn.Module] = MixedCell,
    ) -> None:
        super().__init__()
        placed = layout.place(cells, channels)
        self.relaxation = relaxation
        self.kinds = tuple(place.kind for place in placed)
        self.normalise = Normalise(mean, std)
        self.stem = stem(input_shape, 3 * channels, layout.stem)
        in_channels = (3 * channels, 3 * channels)
        previous_reduces = False
        self.cells = nn.ModuleList()
        for place in placed:
            self.cells.append(
                cell(
                    operations,
                    nodes,
                    in_channels,
                    place.channels,
                    reduces=place.reduces,
                    previous_reduces=previous_reduces,
                )
            )
            in_channels = (in_channels[1], nodes * place.channels)
            previous_reduces = place.reduces
        self.classifier = nn.Linear(in_channels[1], classes)
        edges = nodes * (nodes + 3) // 2
        self.alpha = nn.ParameterDict(
            {kind: alpha_scale * torch.randn(edges, len(operations)) for kind in layout.kinds}
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.mixing_weights()
        previous = current = self.stem(self.normalise(x))
        for kind, cell in zip(self.kinds, self.cells, strict=True):
            previous, current = current, cell(previous, current, weights[kind])
        return self.classifier(current.mean((2, 3)))

    def mixing_weights(self) -> Mapping[str, Tensor]:
        """The mixing weights [edges, operations] of each kind of cell."""
        return {kind: self.relaxation(alpha) for kind, alpha in self.alpha.items()}

    def architecture_parameters(self) -> list[nn.Parameter]:
        """The alpha tensors in the order of the layout's kinds."""
        return list(self.alpha.values())

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything that is trained but the architecture parameters."""
        architecture = {id(parameter) for parameter in self.alpha.values()}
        return [parameter for parameter in self.parameters() if id(parameter) not in architecture]


def edge_row(node: int, source: int) -> int:
    """Row of alpha for the edge from ``source`` to intermediate node ``node`` (0-based)."""
    return node * (node + 3) // 2 + source
