"""The sampled path: each edge computes one candidate operation, drawn by its probability.

GDAS (Dong & Yang, CVPR 2019, arXiv 1910.04465, eq. 3-7): an edge with architecture parameters a and Gumbel noise o
computes candidate j = argmax(a + o). Its weight is the one-hot vector h forward and the softmax
p = softmax((a + o) / t) backward (straight-through); only the gradient that arrives at the computed candidate is
passed on, so that the others need not be computed: dL/da_i = <dL/dy, op_j(x)> p_j ([i = j] - p_i) / t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.layers import avg_pool, max_pool, padding_of
from search_spaces.native.cells import DEPTHWISE, Part, concatenate, evaluate, pool, single, staged
from search_spaces.network import cell_input
from search_spaces.operations import OPERATIONS, FactorisedReduce
from search_spaces.partial import added, bypass, joined, passing_channels
from search_spaces.supernet import Supernet, edge_row


class SampledCell(nn.Module):
    """A cell with all edges, of which each computes the candidate it is told; partial channels as in ``PartialCell``.

    Every candidate of every edge is a module of its own: weights and statistics of those that are not computed are not
    read, and have no gradient.
    """

    def __init__(
        self,
        operations: tuple[str, ...],
        nodes: int,
        in_channels: tuple[int, int],
        channels: int,
        *,
        reduces: bool,
        previous_reduces: bool,
        share: int = 1,
    ) -> None:
        super().__init__()
        self.nodes, self.passing = nodes, passing_channels(channels, share)
        self.preprocess0 = cell_input(in_channels[0], channels, halve=previous_reduces, affine=False)
        self.preprocess1 = cell_input(in_channels[1], channels, halve=False, affine=False)
        self.strides = [2 if reduces and source < 2 else 1 for source in range(nodes + 1)]
        self.edges = nn.ModuleList(
            nn.ModuleList(candidate(name, self.passing, self.strides[source]) for name in operations)
            for node in range(nodes)
            for source in range(node + 2)
        )

    def forward(self, input0: Tensor, input1: Tensor, gates: Sequence[Tensor] | None, choice: Sequence[int]) -> Tensor:
        """choice: the candidate of each edge;  gates: what its map is multiplied by, None for ones."""
        values = [self.preprocess0(input0), self.preprocess1(input1)]
        past = [bypass(value, self.passing, stride) for value, stride in zip(values, self.strides, strict=False)]
        edges: Any = self.edges
        for node in range(self.nodes):
            total: Tensor | None = None
            for source in range(node + 2):
                row = edge_row(node, source)
                map_ = edges[row][choice[row]](values[source][:, : self.passing])
                map_ = map_ if gates is None else map_ * gates[row]
                total = map_ if total is None else total + map_
            assert total is not None
            values.append(joined(total, added(past[: node + 2])))
            past.append(bypass(values[-1], self.passing, 1))
        return concatenate(values[2:])


@dataclass(frozen=True)
class Sample:
    """The candidates computed on the edges of one kind of cell, and what their gradient is made of.

    choice: candidate of each edge, also as a tensor [edges];  noise: [edges, operations];  temperature: t.
    """

    choice: tuple[int, ...]
    index: Tensor
    noise: Tensor
    temperature: float

    def gates(self, alpha: Tensor) -> Tensor:
        """[edges]: exactly 1, with the gradient of the straight-through softmax at the computed candidates."""
        # A sample made before the supernet moved follows it to its device and precision.
        probability = torch.softmax((alpha + self.noise.to(alpha)) / self.temperature, dim=1)
        probability = probability.gather(1, self.index.to(alpha.device).unsqueeze(1)).squeeze(1)
        return 1 + (probability - probability.detach())


class SampledSupernet(Supernet):
    """A supernet that computes one path at a time: the one drawn last, or settled on.

    One sample serves all cells of a kind, as they share alpha, and all passes until the next ``draw``. Without one, as
    at first, it is the most likely candidate of every edge.
    """

    def __init__(self, *args: Any, share: int = 1, **sizes: Any) -> None:
        super().__init__(*args, cell=partial(SampledCell, share=share), **sizes)
        self.samples: Mapping[str, Sample] = {}
        self.settle()

    def draw(self, generator: torch.Generator, temperature: float) -> None:
        """Sample every edge; ``generator`` is a CPU generator, so that all devices draw the same."""
        noise = {}
        for kind, alpha in self.alpha.items():
            uniform = torch.rand(alpha.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
            noise[kind] = -torch.log(-torch.log(uniform))
        self._choose(noise, temperature)

    def settle(self) -> None:
        """Compute the most likely candidate of every edge, as alpha now stands."""
        self._choose({kind: torch.zeros(alpha.shape, dtype=torch.float64) for kind, alpha in self.alpha.items()}, 1.0)

    def _choose(self, noise: Mapping[str, Tensor], temperature: float) -> None:
        samples = {}
        for kind, alpha in self.alpha.items():
            index = (alpha.detach().cpu().double() + noise[kind]).argmax(1)
            samples[kind] = Sample(tuple(index.tolist()), index.to(alpha.device), noise[kind].to(alpha), temperature)
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        gates: dict[str, Sequence[Tensor] | None] = {}
        for kind, alpha in self.alpha.items():
            # While an attack is crafted nobody asks for the gradient, and multiplying by 1 changes nothing.
            followed = torch.is_grad_enabled() and alpha.requires_grad
            gates[kind] = self.samples[kind].gates(alpha).unbind() if followed else None
        previous = current = self.stem(self.normalise(x))
        for kind, cell in zip(self.kinds, self.cells, strict=True):
            previous, current = current, cell(previous, current, gates[kind], self.samples[kind].choice)
        return self.classifier(current.mean((2, 3)))


class Separable(nn.Module):
    """[ReLU, depthwise K x K, 1x1, BN], once or twice; the stride is in the first depthwise convolution.

    Its weights are its own and not those of layers inside: a supernet has thousands of candidates, and each attack
    goes through all modules to set their state.
    """

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int, repeats: int) -> None:
        super().__init__()
        self.strides, self.dilation = (stride, 1)[:repeats], dilation
        self.source = single(
            DEPTHWISE, channels, channels, stride, kernel=kernel, dilation=dilation, repeats=repeats, affine=False
        )
        for stage in range(repeats):
            # Drawn as nn.Conv2d draws them.
            depthwise = torch.empty(channels, 1, kernel, kernel).uniform_(-1 / kernel, 1 / kernel)
            pointwise = torch.empty(channels, channels, 1, 1).uniform_(-(channels**-0.5), channels**-0.5)
            self.register_parameter(f"depthwise{stage}", nn.Parameter(depthwise))
            self.register_parameter(f"pointwise{stage}", nn.Parameter(pointwise))
            self.register_module(f"norm{stage}", nn.BatchNorm2d(channels, affine=False))

    def part(self) -> Part | None:
        """This operation for the native kernels."""
        stages = [
            (((self, f"depthwise{stage}"), (self, f"pointwise{stage}")), getattr(self, f"norm{stage}"))
            for stage in range(len(self.strides))
        ]
        return staged(self.source, stages)

    def forward(self, x: Tensor) -> Tensor:
        y = evaluate(self.part, x, self)
        if y is not None:
            return y
        for stage, stride in enumerate(self.strides):
            depthwise, pointwise = getattr(self, f"depthwise{stage}"), getattr(self, f"pointwise{stage}")
            padding = padding_of(depthwise.shape[-1], self.dilation)
            x = F.conv2d(torch.relu(x), depthwise, None, stride, padding, self.dilation, groups=x.shape[1])
            x = getattr(self, f"norm{stage}")(F.conv2d(x, pointwise))
        return x


class NormalisedPool(nn.BatchNorm2d):
    """3x3 max or average pooling and its normalisation."""

    def __init__(self, kind: str, channels: int, stride: int) -> None:
        super().__init__(channels, affine=False)
        self.kind, self.stride = kind, stride

    def forward(self, x: Tensor) -> Tensor:
        y = evaluate(lambda: Part(pool(self.kind, x.shape[1], self.stride)), x, self)
        if y is None:
            y = max_pool(x, self.stride) if self.kind == "max_pool" else avg_pool(x, self.stride)
        return super().forward(y)


class Nothing(nn.Module):
    """The candidate "none": zeros, at the size an edge of ``stride`` gives."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # A product, not new zeros: cells before one that computes nothing still have a gradient, of 0.
        return x[:, :, :: self.stride, :: self.stride] * 0


def candidate(name: str, channels: int, stride: int) -> nn.Module:
    """The module of candidate ``name``; normalisation has no affine part, as in ``MixedEdges``."""
    operation = OPERATIONS[name]
    if operation.kind == "conv":
        return Separable(channels, operation.kernel, stride, operation.dilation, operation.repeats)
    if operation.kind in ("max_pool", "avg_pool"):
        return NormalisedPool(operation.kind, channels, stride)
    if operation.kind == "skip":
        return nn.Identity() if stride == 1 else FactorisedReduce(channels, channels, affine=False)
    return Nothing(stride)
