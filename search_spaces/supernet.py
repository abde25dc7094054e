"""The weight-sharing network over a cell space: every candidate operation on every edge, mixed by weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from search_spaces.layers import Normalise
from search_spaces.layout import Layout
from search_spaces.mixed import MixedEdges
from search_spaces.native.cells import Part, Wiring, run
from search_spaces.network import Stem, cell_input
from search_spaces.operations import part_of

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
        sizes, index = [], []
        for source, edges in enumerate(self._sources()):
            rows = [edge_row(node, source) for node in range(max(source - 1, 0), nodes)]
            index += [row * len(operations) + column for row in rows for column in edges.columns]
            sizes.append(len(rows) * len(edges.columns))
        self.mixing_sizes = tuple(sizes)
        # All mixing weights that the sources need, source by source, as places in the flat table.
        self.register_buffer("mixing_index", torch.tensor(index, dtype=torch.long), persistent=False)

        # Values: both inputs, both brought to ``channels``, the nodes.
        writes = [tuple(range(4 + max(source - 1, 0), 4 + nodes)) for source in range(nodes + 1)]
        self.wiring = Wiring((0, 1, *range(2, nodes + 3)), ((2,), (3,), *writes), [*range(4, 4 + nodes)])

    mixing_index: Tensor

    def forward(self, input0: Tensor, input1: Tensor, weights: Tensor) -> Tensor:
        """Two inputs [N, C_i, H_i, W_i] and mixing weights [edges, operations] to [N, nodes * C, H', W']."""
        mixing = weights.flatten().index_select(0, self.mixing_index)
        y = self._natively(input0, input1, mixing)
        if y is not None:
            return y
        values, totals = [self.preprocess0(input0), self.preprocess1(input1)], [torch.zeros(())] * self.nodes
        parts = zip(self._sources(), mixing.split(self.mixing_sizes), strict=True)
        for index, (source, own) in enumerate(parts):
            if index >= 2:
                values.append(totals[index - 2])
            maps = source.mix(values[index], own.view(source.edges, -1))
            for node, map_ in zip(range(max(index - 1, 0), self.nodes), maps.unbind(0), strict=True):
                totals[node] = map_ if index == 0 else totals[node] + map_
        return torch.cat(totals, dim=1)

    def _natively(self, input0: Tensor, input1: Tensor, mixing: Tensor) -> Tensor | None:
        """The whole cell in one call of the native kernels, where they know everything in it."""
        return run(self.wiring, self._parts, [input0, input1], mixing, self)

    def _parts(self) -> list[Part] | None:
        parts = [part_of(module, 0) for module in (self.preprocess0, self.preprocess1)]
        if parts[0] is None or parts[1] is None:
            return None
        return [parts[0], parts[1], *(source.part() for source in self._sources())]

    def _sources(self) -> list[MixedEdges]:
        return [*self.sources]  # type: ignore[list-item]


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
        self.stem = Stem(input_shape, 3 * channels, layout.stem)
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
