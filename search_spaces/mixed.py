"""The continuous relaxation of a cell, computed node by node instead of edge by edge.

All candidate operations on all edges that leave a node see the same input. They are evaluated together: one
ReLU, each pool and its normalisation once, and the depthwise and 1x1 convolutions of every edge and operation
in a few batched products. This is the textbook sum over separate modules (a test compares them), without its
several hundred small calls.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import kernels
from search_spaces.layers import BatchNorm2d, KeepsDerived
from search_spaces.operations import OPERATIONS, FactorisedReduce


class MixedEdges(KeepsDerived):
    """The mixed operations of the E edges leaving one node: x [N, C, H, W], weights [E, K] -> E maps.

    Batch normalisation has no affine part, as is usual in weight-sharing supernets: a scale there would undo
    the mixing weights.
    """

    def __init__(self, operations: tuple[str, ...], edges: int, channels: int, stride: int) -> None:
        super().__init__()
        self.edges, self.channels, self.stride = edges, channels, stride
        kinds = [OPERATIONS[name].kind for name in operations]
        self.pools = tuple(kind for kind in ("max_pool", "avg_pool") if kind in kinds)
        self.has_skip = "skip" in kinds
        convs = [i for i, kind in enumerate(kinds) if kind == "conv"]
        if any(OPERATIONS[operations[i]].repeats > 2 for i in convs):
            raise ValueError("at most two repeats of a separable convolution are supported")
        # Twice repeated operations first, so that the second stage reads one contiguous block.
        convs.sort(key=lambda i: -OPERATIONS[operations[i]].repeats)
        self.convs = tuple(OPERATIONS[operations[i]] for i in convs)
        self.repeated = sum(operation.repeats == 2 for operation in self.convs)
        self.register_buffer("conv_columns", torch.tensor(convs, dtype=torch.long), persistent=False)
        shared = [kinds.index(kind) for kind in self.pools]
        shared += [kinds.index("skip")] if self.has_skip else []
        self.register_buffer("shared_columns", torch.tensor(shared, dtype=torch.long), persistent=False)

        self.pool_norms = nn.ModuleList(BatchNorm2d(channels, affine=False) for _ in self.pools)
        self.skips = nn.ModuleList(
            FactorisedReduce(channels, channels, affine=False)
            for _ in range(edges if self.has_skip and stride > 1 else 0)
        )
        self.depthwise1 = nn.ParameterList(_depthwise(edges * channels, op.kernel) for op in self.convs)
        self.depthwise2 = nn.ParameterList(
            _depthwise(edges * channels, op.kernel) for op in self.convs[: self.repeated]
        )
        self.pointwise1 = nn.Parameter(_pointwise(len(self.convs) * edges, channels))
        self.pointwise2 = nn.Parameter(_pointwise(self.repeated * edges, channels))
        self.norm1 = BatchNorm2d(len(self.convs) * edges * channels, affine=False) if self.convs else None
        self.norm2 = BatchNorm2d(self.repeated * edges * channels, affine=False) if self.repeated else None

    conv_columns: Tensor
    shared_columns: Tensor

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The mixed maps of all edges, stacked: [E, N, C, H', W'] (strides carry the memory order)."""
        edges, channels = self.edges, self.channels
        batch, _, height, width = x.shape
        out_height, out_width = -(-height // self.stride), -(-width // self.stride)
        total: Tensor | None = None
        fast = kernels.matrix_form(x)
        if self.convs:
            total = self._convolutions(x, weights) if not fast else self._convolutions_as_matrices(x, weights)
        # Pools and, at stride 1, the skip connection are the same for every edge: mix them by one product.
        shared = [
            norm(kernels.max_pool(x, self.stride) if kind == "max_pool" else kernels.avg_pool(x, self.stride))
            for kind, norm in zip(self.pools, self.pool_norms, strict=True)
        ]
        if self.has_skip and self.stride == 1:
            shared.append(x)
        if shared:
            columns = weights.index_select(1, self.shared_columns[: len(shared)])
            rows = torch.stack([kernels.channel_major(map_) if fast else map_ for map_ in shared])
            mixed = (columns @ rows.view(len(shared), -1)).view(edges, *rows.shape[1:])
            total = _add(total, mixed.transpose(1, 2) if fast else mixed)
        if self.skips:
            column = int(self.shared_columns[-1])
            reduced = torch.stack([skip(x) * weights[e, column] for e, skip in enumerate(self.skips)])
            total = _add(total, reduced)
        if total is None:
            total = x.new_zeros(edges, batch, channels, out_height, out_width)
        return total

    def _convolutions_as_matrices(self, x: Tensor, weights: Tensor) -> Tensor:
        edges, channels, count = self.edges, self.channels, len(self.convs)
        batch, _, height, width = x.shape
        rows = torch.relu(kernels.channel_major(x)).view(channels, batch, height * width)
        out_height, out_width = -(-height // self.stride), -(-width // self.stride)
        pixels = out_height * out_width
        joint, second = self._matrices(height, width)
        y = torch.bmm(rows, joint).view(channels, batch, count * edges, pixels)
        y = y.permute(2, 0, 1, 3).reshape(count * edges, channels, batch * pixels)
        y = self._normalised(self.norm1, torch.bmm(self.pointwise1, y), batch, out_height, out_width)
        if self.repeated:
            groups = self.repeated * edges
            repeated = torch.relu(y[:groups]).view(groups * channels, batch, pixels)
            z = torch.bmm(repeated, second).view(groups, channels, batch * pixels)
            z = self._normalised(self.norm2, torch.bmm(self.pointwise2, z), batch, out_height, out_width)
            y = torch.cat([z, y[groups:]])
        mixing = weights.index_select(1, self.conv_columns)
        y = y.view(count, edges, -1).transpose(0, 1)
        mixed = torch.bmm(mixing.unsqueeze(1), y).view(edges, channels, batch, out_height, out_width)
        return mixed.transpose(1, 2)

    def _matrices(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The depthwise convolutions of both stages as matrices on maps of height x width.

        First stage: [C, H*W, K*E*H'*W'], so that one product per channel serves every operation of every edge.
        Second stage: [K2*E*C, H'*W', H'*W'] for the K2 twice repeated operations.
        """
        key = (height, width)
        if self.kept is not None and key in self.kept:
            first, second = self.kept[key]
            return first, second
        edges, channels, count = self.edges, self.channels, len(self.convs)
        out_height, out_width = -(-height // self.stride), -(-width // self.stride)
        parts = [
            kernels.depthwise_matrices(weight, height, width, operation.dilation, self.stride)[0]
            for operation, weight in zip(self.convs, self.depthwise1, strict=True)
        ]
        first = torch.stack(parts).view(count, edges, channels, height * width, out_height * out_width)
        first = first.permute(2, 3, 0, 1, 4).reshape(channels, height * width, -1)
        second = first.new_zeros(0)
        if self.repeated:
            second = torch.cat(
                [
                    kernels.depthwise_matrices(weight, out_height, out_width, operation.dilation, 1)[0]
                    for operation, weight in zip(self.convs, self.depthwise2, strict=False)
                ]
            )
        if self.kept is not None:
            self.kept[key] = (first, second)
        return first, second

    def _normalised(self, norm: BatchNorm2d | None, y: Tensor, batch: int, height: int, width: int) -> Tensor:
        assert norm is not None
        # Channels of all groups in one normalisation: [G, C, N*H*W] is the memory order of [N, G*C, H, W].
        maps = y.view(-1, batch, height, width).transpose(0, 1)
        return kernels.channel_major(norm(maps)).view(y.shape)

    def _convolutions(self, x: Tensor, weights: Tensor) -> Tensor:
        edges, channels, count = self.edges, self.channels, len(self.convs)
        batch = x.shape[0]
        copies = torch.relu(x).repeat(1, edges, 1, 1)
        y = torch.cat(
            [
                kernels.depthwise(copies, weight, stride=self.stride, dilation=operation.dilation)
                for operation, weight in zip(self.convs, self.depthwise1, strict=True)
            ],
            dim=1,
        )
        assert self.norm1 is not None
        y = self.norm1(_grouped_pointwise(y, self.pointwise1))
        if self.norm2 is not None:
            groups = self.repeated * edges * channels
            parts = torch.relu(y[:, :groups]).split(edges * channels, dim=1)
            z = torch.cat(
                [
                    kernels.depthwise(part, weight, stride=1, dilation=operation.dilation)
                    for part, operation, weight in zip(parts, self.convs, self.depthwise2, strict=False)
                ],
                dim=1,
            )
            z = self.norm2(_grouped_pointwise(z, self.pointwise2))
            y = torch.cat([z, y[:, groups:]], dim=1)
        height, width = y.shape[2:]
        mixing = weights.index_select(1, self.conv_columns).t().reshape(count, edges, 1, 1, 1)
        # [N, K, E, C, H, W] summed over the operations.
        mixed = (y.view(batch, count, edges, channels, height, width) * mixing).sum(1)
        return mixed.transpose(0, 1)


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _grouped_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolutions of the G groups of ``x`` [N, G*C, H, W] with ``weight`` [G, C, C]."""
    groups, channels, _ = weight.shape
    return F.conv2d(x, weight.reshape(groups * channels, channels, 1, 1), groups=groups)


def _depthwise(channels: int, kernel: int) -> nn.Parameter:
    """Kernels [channels, 1, K, K] drawn as nn.Conv2d draws them."""
    bound = 1 / kernel
    return nn.Parameter(torch.empty(channels, 1, kernel, kernel).uniform_(-bound, bound))


def _pointwise(groups: int, channels: int) -> Tensor:
    """Weights [groups, channels, channels] drawn as nn.Conv2d draws them."""
    bound = 1 / math.sqrt(channels)
    return torch.empty(groups, channels, channels).uniform_(-bound, bound)
