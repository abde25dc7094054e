"""The weight-sharing network over a cell space: every candidate operation on every edge, mixed by weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from search_spaces.layers import Normalise
from search_spaces.layout import Layout
from search_spaces.mixed import MixedEdges
from search_spaces.native import functions, norms
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
        sizes, index = [], []
        for source, edges in enumerate(self._sources()):
            rows = [edge_row(node, source) for node in range(max(source - 1, 0), nodes)]
            index += [row * len(operations) + column for row in rows for column in edges.columns]
            sizes.append(len(rows) * len(edges.columns))
        self.mixing_sizes = tuple(sizes)
        # All mixing weights that the sources need, source by source, as places in the flat table.
        self.register_buffer("mixing_index", torch.tensor(index, dtype=torch.long), persistent=False)

    mixing_index: Tensor

    def forward(self, input0: Tensor, input1: Tensor, weights: Tensor) -> Tensor:
        """Two inputs [N, C_i, H_i, W_i] and mixing weights [edges, operations] to [N, nodes * C, H', W']."""
        value0, value1 = self.preprocess0(input0), self.preprocess1(input1)
        mixing = weights.flatten().index_select(0, self.mixing_index)
        if not norms.runs(value0) or norms.hooked(self.sources):
            return self._by_torch(value0, value1, mixing)
        sources = self._sources()
        found = [norms.statistics(source.norms(), value0) for source in sources]
        if any(statistics is None for statistics in found):
            return self._by_torch(value0, value1, mixing)
        parameters = [parameter for source in sources for parameter in source.weights()]

        def reference(first: Tensor, second: Tensor, mixing: Tensor, *given: Tensor) -> Tensor:
            if any(a is not b for a, b in zip(given, parameters, strict=True)):
                raise RuntimeError("a second derivative of a cell needs its parameters to be leaves of the graph")
            return self._by_torch(first, second, mixing, record=False)

        run = functions.Run(found, reference)  # type: ignore[arg-type]
        out = functions.Cell.apply(tuple(source.source for source in sources), run, value0, value1, mixing, *parameters)
        for source, statistics in zip(sources, found, strict=True):
            assert statistics is not None
            norms.record(source.norms(), statistics, out.shape[0] * out.shape[2] * out.shape[3])
        return out

    def _by_torch(self, value0: Tensor, value1: Tensor, mixing: Tensor, record: bool = True) -> Tensor:
        values, totals = [value0, value1], [torch.zeros(())] * self.nodes
        parts = zip(self._sources(), mixing.split(self.mixing_sizes), strict=True)
        for index, (source, own) in enumerate(parts):
            if index >= 2:
                values.append(totals[index - 2])
            maps = source.mix(values[index], own.view(source.edges, -1), record)
            for node, map_ in zip(range(max(index - 1, 0), self.nodes), maps.unbind(0), strict=True):
                totals[node] = map_ if index == 0 else totals[node] + map_
        return torch.cat(totals, dim=1)

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
