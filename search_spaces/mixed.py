"""The continuous relaxation of a cell, computed node by node instead of edge by edge.

All candidate operations on all edges that leave a node see the same input. They are evaluated together: one
ReLU, each pool and its normalisation once, and the convolutions of every edge and operation in a few batched
calls, on the CPU in one native kernel. This is the textbook sum over separate modules (a test compares
them), without its several hundred small calls.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.layers import avg_pool, max_pool, offset_halves, padding_of
from search_spaces.native.cells import Part, Place
from search_spaces.native.program import DEPTHWISE, HALVES, Convolution, Slot, Source
from search_spaces.operations import OPERATIONS


class MixedEdges(nn.Module):
    """The mixed operations of the E edges leaving one node: x [N, C, H, W], weights [E, K] -> E maps.

    Batch normalisation has no affine part, as is usual in weight-sharing supernets: a scale there would undo
    the mixing weights. At stride 2 the skip connection halves the map (a 1x1 convolution on the even pixels beside
    one on the odd pixels), so it has weights.
    """

    def __init__(self, operations: tuple[str, ...], edges: int, channels: int, stride: int) -> None:
        super().__init__()
        self.edges, self.channels, self.stride = edges, channels, stride
        kinds = [OPERATIONS[name].kind for name in operations]
        self.pools = tuple(kind for kind in ("max_pool", "avg_pool") if kind in kinds)
        convs = [i for i, kind in enumerate(kinds) if kind == "conv"]
        if any(OPERATIONS[operations[i]].repeats > 2 for i in convs):
            raise ValueError("at most two repeats of a separable convolution are supported")
        # Twice repeated operations first, so that the second stage reads one contiguous block.
        convs.sort(key=lambda i: -OPERATIONS[operations[i]].repeats)
        self.convs = tuple(OPERATIONS[operations[i]] for i in convs)
        self.repeated = sum(operation.repeats == 2 for operation in self.convs)
        self.skips = "skip" in kinds and stride == 1
        self.halves = "skip" in kinds and stride > 1
        skip = [kinds.index("skip")] if "skip" in kinds else []
        pools = [kinds.index(pool) for pool in self.pools]
        columns = [*convs, *skip, *pools] if self.halves else [*convs, *pools, *skip]
        self.columns = tuple(columns)
        self.register_buffer("column_index", torch.tensor(columns, dtype=torch.long), persistent=False)

        self.pool_norms = nn.ModuleList(nn.BatchNorm2d(channels, affine=False) for _ in self.pools)
        self.depthwise1 = nn.ParameterList(_depthwise(edges * channels, op.kernel) for op in self.convs)
        self.depthwise2 = nn.ParameterList(
            _depthwise(edges * channels, op.kernel) for op in self.convs[: self.repeated]
        )
        self.pointwise1 = nn.Parameter(_pointwise(len(self.convs) * edges, channels, channels))
        self.pointwise2 = nn.Parameter(_pointwise(self.repeated * edges, channels, channels))
        even = (channels + 1) // 2
        self.halves_even = nn.Parameter(_pointwise(edges, even, channels)) if self.halves else None
        self.halves_odd = nn.Parameter(_pointwise(edges, channels - even, channels)) if self.halves else None
        self.norm1 = _norm(len(self.convs) * edges * channels)
        self.norm2 = _norm(self.repeated * edges * channels)
        self.halves_norm = _norm(edges * channels if self.halves else 0)
        self.source = self._source()

    column_index: Tensor

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The mixed maps of all edges, stacked: [E, N, C, H', W']."""
        return self.mix(x, weights.index_select(1, self.column_index))

    def mix(self, x: Tensor, mixing: Tensor, record: bool = True) -> Tensor:
        """``forward`` from mixing weights [E, columns] in the order of ``columns``.

        record: update the running statistics of batch normalisation in train mode.
        """
        edges, channels = self.edges, self.channels
        batch, _, height, width = x.shape
        out_height, out_width = -(-height // self.stride), -(-width // self.stride)
        total = x.new_zeros(edges, batch, channels, out_height, out_width)
        by_column = mixing.t()
        if self.convs:
            # [N, K, E, C, H, W] summed over the operations.
            y = self._convolutions(x, record).view(batch, -1, edges, channels, out_height, out_width)
            total = (y * by_column[: len(self.convs)].reshape(-1, edges, 1, 1, 1)).sum(1).transpose(0, 1)
        position = len(self.convs)
        if self.halves:
            total = total + self._halves(x, record) * by_column[position].view(edges, 1, 1, 1, 1)
            position += 1
        # Pools and, at stride 1, the skip connection are the same for every edge: mix them by one product.
        shared = [
            _normalised(norm, max_pool(x, self.stride) if kind == "max_pool" else avg_pool(x, self.stride), record)
            for kind, norm in zip(self.pools, self.pool_norms, strict=True)
        ]
        if self.skips:
            shared.append(x)
        if shared:
            rows = torch.stack(shared).view(len(shared), -1)
            total = total + (mixing[:, position:] @ rows).view(edges, batch, channels, out_height, out_width)
        return total

    def norms(self) -> list[nn.BatchNorm2d]:
        """The normalisations in the order of ``source``'s statistics."""
        optional = [norm for norm in (self.norm1, self.norm2, self.halves_norm) if norm is not None]
        return [*optional, *self.pool_norms]  # type: ignore[list-item]

    def weights(self) -> list[Place]:
        """Where the parameters are, in the order of ``source``'s slots."""
        lists = (self.depthwise1, self.depthwise2)
        depthwise: list[Place] = [(kernels, str(i)) for kernels in lists for i in range(len(kernels))]
        names = ("pointwise1", "pointwise2", *(("halves_even", "halves_odd") if self.halves else ()))
        return [*depthwise, *((self, name) for name in names)]

    def part(self) -> Part:
        """These edges for the native kernels."""
        return Part(self.source, self.weights(), self.norms(), lambda x, mixing: self.mix(x, mixing, record=False))

    def _source(self) -> Source:
        """This module as the native kernels see it."""
        count, group = len(self.convs), self.edges * self.channels
        matrices = group * self.channels
        convolutions = []
        for index, op in enumerate(self.convs):
            twice = index < self.repeated
            convolutions.append(
                Convolution(
                    DEPTHWISE,
                    Slot(count + self.repeated, index * matrices),
                    Slot(0, index * group),
                    op.kernel,
                    op.dilation,
                    depthwise1=Slot(index),
                    depthwise2=Slot(count + index) if twice else None,
                    pointwise2=Slot(count + self.repeated + 1, index * matrices) if twice else None,
                    norm2=Slot(1, index * group) if twice else None,
                )
            )
        norms = bool(count) + bool(self.repeated)
        if self.halves:
            first = count + self.repeated + 2
            convolutions.append(Convolution(HALVES, Slot(first), Slot(norms), odd1=Slot(first + 1)))
            norms += 1
        pool_norms = tuple(range(norms, norms + len(self.pools)))
        return Source(
            self.edges, self.channels, self.channels, self.stride, tuple(convolutions), self.pools, pool_norms,
            self.skips, count + self.repeated + 2 + 2 * self.halves,
        )  # fmt: skip

    def _convolutions(self, x: Tensor, record: bool) -> Tensor:
        """All convolutions of all edges [N, K*E*C, H', W']."""
        edges, channels = self.edges, self.channels
        copies = torch.relu(x).repeat(1, edges, 1, 1)
        y = torch.cat(
            [
                _depthwise_convolution(copies, weight, self.stride, operation.dilation)
                for operation, weight in zip(self.convs, self.depthwise1, strict=True)
            ],
            dim=1,
        )
        assert self.norm1 is not None
        y = _normalised(self.norm1, _grouped_pointwise(y, self.pointwise1), record)
        if self.norm2 is not None:
            groups = self.repeated * edges * channels
            parts = torch.relu(y[:, :groups]).split(edges * channels, dim=1)
            z = torch.cat(
                [
                    _depthwise_convolution(part, weight, 1, operation.dilation)
                    for part, operation, weight in zip(parts, self.convs, self.depthwise2, strict=False)
                ],
                dim=1,
            )
            z = _normalised(self.norm2, _grouped_pointwise(z, self.pointwise2), record)
            y = torch.cat([z, y[:, groups:]], dim=1)
        return y

    def _halves(self, x: Tensor, record: bool) -> Tensor:
        """The halving skip connections of all edges [E, N, C, H', W']."""
        even, odd = offset_halves(torch.relu(x))
        assert self.halves_even is not None and self.halves_odd is not None
        maps = [
            F.conv2d(half, weight.reshape(-1, self.channels, 1, 1)).unflatten(1, (self.edges, -1))
            for half, weight in ((even, self.halves_even), (odd, self.halves_odd))
        ]
        assert self.halves_norm is not None
        y = _normalised(self.halves_norm, torch.cat(maps, dim=2).flatten(1, 2), record)
        return y.unflatten(1, (self.edges, self.channels)).transpose(0, 1)


def _normalised(norm: nn.Module, x: Tensor, record: bool) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    if record or not norm.training:
        y: Tensor = norm(x)
        return y
    return F.batch_norm(x, None, None, None, None, True, 0.0, norm.eps)


def _norm(channels: int) -> nn.BatchNorm2d | None:
    return nn.BatchNorm2d(channels, affine=False) if channels else None


def _depthwise_convolution(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    padding = padding_of(weight.shape[-1], dilation)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=weight.shape[0])


def _grouped_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolutions of the G groups of ``x`` [N, G*C, H, W] with ``weight`` [G, C, C]."""
    groups, channels, _ = weight.shape
    return F.conv2d(x, weight.reshape(groups * channels, channels, 1, 1), groups=groups)


def _depthwise(channels: int, kernel: int) -> nn.Parameter:
    """Kernels [channels, 1, K, K] drawn as nn.Conv2d draws them."""
    bound = 1 / kernel
    return nn.Parameter(torch.empty(channels, 1, kernel, kernel).uniform_(-bound, bound))


def _pointwise(groups: int, out_channels: int, in_channels: int) -> Tensor:
    """Weights [groups, out_channels, in_channels] drawn as nn.Conv2d draws them."""
    bound = 1 / math.sqrt(in_channels)
    return torch.empty(groups, out_channels, in_channels).uniform_(-bound, bound)
