"""The network of a cell genotype: stem, placed cells, global pooling, classifier, optional auxiliary head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import operations
from search_spaces.genotype import Cell, Genotype
from search_spaces.layers import Normalise
from search_spaces.native.cells import Part, Wiring, concatenate, hooked, in_pieces, run, suits
from search_spaces.native.functions import batch_last
from search_spaces.operations import FactorisedReduce, ReluConvBn, part_of


class DiscreteCell(nn.Module):
    """One cell: two inputs brought to ``channels``, the chosen operations, concatenated intermediate nodes.

    Input 0 is the output of the cell before the previous one, input 1 that of the previous one.
    """

    def __init__(
        self,
        cell: Cell,
        in_channels: tuple[int, int],
        channels: int,
        *,
        reduces: bool,
        previous_reduces: bool,
    ) -> None:
        super().__init__()
        self.preprocess0 = cell_input(in_channels[0], channels, halve=previous_reduces)
        self.preprocess1 = cell_input(in_channels[1], channels, halve=False)
        self.cell = cell
        self.operations = nn.ModuleList(
            operations.build(edge.operation, channels, 2 if reduces and edge.source < 2 else 1)
            for node in cell.nodes
            for edge in node
        )

        # Values: both inputs, both brought to ``channels``, the nodes.
        nodes = range(4, 4 + len(cell.nodes))
        edges = [(edge.source + 2, node) for node, incoming in zip(nodes, cell.nodes, strict=True) for edge in incoming]
        self.wiring = Wiring((0, 1, *(x for x, _ in edges)), ((2,), (3,), *((node,) for _, node in edges)), [*nodes])

    def forward(self, input0: Tensor, input1: Tensor) -> Tensor:
        y = self._natively(input0, input1)
        if y is not None:
            return y
        nodes = [self.preprocess0(input0), self.preprocess1(input1)]
        modules = iter(self.operations)
        for incoming in self.cell.nodes:
            total = next(modules)(nodes[incoming[0].source])
            for edge in incoming[1:]:
                total = total + next(modules)(nodes[edge.source])
            nodes.append(total)
        return concatenate(nodes[2:])

    def _natively(self, input0: Tensor, input1: Tensor) -> Tensor | None:
        """The whole cell in one call of the native kernels, where they know everything in it."""
        return run(self.wiring, self._parts, [input0, input1], None, self)

    def _parts(self) -> list[Part] | None:
        parts: list[Part] = []
        # Of each value: compression may have taken channels away.
        channels: dict[int, int] = {}
        modules = (self.preprocess0, self.preprocess1, *self.operations)
        for module, read, (written,) in zip(modules, self.wiring.reads, self.wiring.writes, strict=True):
            part = part_of(module, channels.get(read, 0))
            if part is None or channels.setdefault(written, part.source.out_channels) != part.source.out_channels:
                return None
            parts.append(part)
        return parts


class AuxiliaryHead(nn.Module):
    """A second classifier on the map where the last section begins; used in training only."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x.contiguous()).flatten(1))


class CellNetwork(nn.Module):
    """A network of cells: pixels [N, C, H, W] in [0, 1] to logits [N, classes]. Normalisation is inside.

    With an auxiliary head, ``auxiliary`` also runs in train mode; its output goes to whoever hooks it
    (nas.training.auxiliary), never into the logits.
    """

    def __init__(
        self,
        genotype: Genotype,
        *,
        channels: int,
        cells: int,
        input_shape: tuple[int, int, int],
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        placed = genotype.layout.place(cells, channels)
        self.normalise = Normalise(mean, std)
        self.stem = Stem(input_shape, 3 * channels, genotype.layout.stem)
        in_channels = (3 * channels, 3 * channels)
        previous_reduces = False
        self.cells = nn.ModuleList()
        for place in placed:
            cell = genotype.cell[place.kind]
            self.cells.append(
                DiscreteCell(
                    cell, in_channels, place.channels, reduces=place.reduces, previous_reduces=previous_reduces
                )
            )
            in_channels = (in_channels[1], len(cell.nodes) * place.channels)
            previous_reduces = place.reduces
        reductions = [index for index, place in enumerate(placed) if place.reduces]
        self.auxiliary_after = reductions[-1] if reductions and auxiliary else None
        if self.auxiliary_after is not None:
            place = placed[self.auxiliary_after]
            nodes = len(genotype.cell[place.kind].nodes)
            self.auxiliary = AuxiliaryHead(nodes * place.channels, classes)
        self.classifier = nn.Linear(in_channels[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            pieces = in_pieces(self, x, self.stem.pixels)
            if len(pieces) > 1:
                return torch.cat([self._pass(piece) for piece in pieces])
        return self._pass(x)

    def _pass(self, x: Tensor) -> Tensor:
        previous = current = self.stem(self.normalise(x))
        for index, cell in enumerate(self.cells):
            previous, current = current, cell(previous, current)
            if self.training and index == self.auxiliary_after:
                self.auxiliary(current)
        return self.classifier(current.mean((2, 3)))


def cell_input(in_channels: int, channels: int, *, halve: bool, affine: bool = True) -> nn.Module:
    """What brings an input of a cell to ``channels`` filters and, after a reduction, to half the map."""
    if halve:
        return FactorisedReduce(in_channels, channels, affine)
    return ReluConvBn(in_channels, channels, affine)


class Stem(nn.Sequential):
    """3x3 convolutions and BN to ``channels`` filters, halving until the shorter side is at most ``largest``."""

    def __init__(self, input_shape: tuple[int, int, int], channels: int, largest: int) -> None:
        in_channels, height, width = input_shape
        halvings = 0
        while min(height, width) > largest << halvings:
            halvings += 1
        layers: list[nn.Module] = []
        for _ in range(halvings - 1):
            half = (channels + 1) // 2
            layers += [nn.Conv2d(in_channels, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()]
            in_channels = half
        layers += [
            nn.Conv2d(in_channels, channels, 3, 2 if halvings else 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        super().__init__(*layers)
        self.pixels = -(-height // 2**halvings) * -(-width // 2**halvings)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, channels, H', W'], in memory as the cells want it."""
        if not suits(x) or hooked(self):
            y: Tensor = super().forward(x)
            return y
        # Both inputs of the first cell and one of the second are this map: put in order once, not by each of them.
        return batch_last(self._folded(x) if self._constant() else super().forward(x)).permute(3, 0, 1, 2)

    def _constant(self) -> bool:
        """Whether running statistics are used and nobody wants the gradient of a weight."""
        wanted = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        norms = [layer for layer in self if isinstance(layer, nn.BatchNorm2d)]
        plain = all(type(layer) in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU) for layer in self)
        plain &= not any(isinstance(layer, nn.Conv2d) and layer.bias is not None for layer in self)
        return plain and not wanted and not any(norm.training or norm.running_var is None for norm in norms)

    def _folded(self, x: Tensor) -> Tensor:
        """The same with each normalisation in the convolution before it: half the work of its backward pass."""
        for convolution, norm in zip(self, [*self][1:], strict=False):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None and norm.running_var is not None
                scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
                weight, shift = convolution.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
                x = F.conv2d(x, weight, shift, convolution.stride, convolution.padding)
            elif isinstance(convolution, nn.ReLU):
                x = torch.relu(x)
        return x


def parameter_count(model: nn.Module) -> int:
    """Weights of the network as deployed: without the auxiliary head, which exists in training only."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith("auxiliary.") and torch.is_floating_point(parameter)
    )
