"""The candidate operations of cell spaces: a name, what it computes, and its module in a discrete cell.

``OPERATIONS`` describes each as data (kind, kernel, dilation, repeats); ``build`` makes the module of one
operation, and the supernet (mixed.py) computes all operations leaving a node together from the same data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.layers import DepthwiseConv2d, PointwiseConv2d, avg_pool, max_pool, offset_halves
from search_spaces.native.cells import DEPTHWISE, HALVES, POINTWISE, Part, evaluate, pool, single, skip, staged


@dataclass(frozen=True)
class Operation:
    """A candidate operation.

    kind: "conv" ([ReLU, depthwise, 1x1, BN] repeated), "max_pool", "avg_pool", "skip" or "none" (zero).
    """

    kind: str
    kernel: int = 0
    dilation: int = 1
    repeats: int = 1

    @property
    def parameter_free(self) -> bool:
        """Whether it has no weights at stride 1. Searches that collapse fill cells with such operations."""
        return self.kind != "conv"


OPERATIONS: dict[str, Operation] = {
    "none": Operation("none"),
    "max_pool_3x3": Operation("max_pool", 3),
    "avg_pool_3x3": Operation("avg_pool", 3),
    "skip_connect": Operation("skip"),
    "sep_conv_3x3": Operation("conv", 3, repeats=2),
    "sep_conv_5x5": Operation("conv", 5, repeats=2),
    "dil_conv_3x3": Operation("conv", 3, dilation=2),
    "dil_conv_5x5": Operation("conv", 5, dilation=2),
}


class SeparableConv(nn.Sequential):
    """[ReLU, depthwise K x K, 1x1, BN], ``repeats`` times; the stride is in the first depthwise convolution."""

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int, repeats: int) -> None:
        stages: list[nn.Module] = []
        for index in range(repeats):
            stages += [
                nn.ReLU(),
                DepthwiseConv2d(channels, kernel, stride if index == 0 else 1, dilation),
                PointwiseConv2d(channels, channels),
                nn.BatchNorm2d(channels),
            ]
        super().__init__(*stages)

    def part(self) -> Part | None:
        """This operation for the native kernels; None where its layers are not such as they know."""
        modules: list[Any] = list(self)
        kinds = (nn.ReLU, DepthwiseConv2d, PointwiseConv2d, nn.BatchNorm2d)
        if not all(isinstance(module, kinds[i % 4]) for i, module in enumerate(modules)):
            return None
        stages = range(0, len(modules), 4)
        # Compression may have taken channels away: the kernels want as many after each repeat.
        depthwise, channels = modules[1], modules[2].out_channels
        if any(modules[i + 2].out_channels != channels for i in stages):
            return None
        source = single(
            DEPTHWISE, depthwise.in_channels, channels, depthwise.stride[0], kernel=depthwise.kernel_size[0],
            dilation=depthwise.dilation[0], repeats=len(stages),
        )  # fmt: skip
        weights = [((modules[i + 1], "weight"), (modules[i + 2], "weight")) for i in stages]
        return staged(source, [(pair, modules[i + 3]) for pair, i in zip(weights, stages, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        y = evaluate(self.part, x, self)
        return super().forward(x) if y is None else y


class MaxPool(nn.Module):
    """3x3 max pooling."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def part(self, channels: int) -> Part:
        """This operation on ``channels`` filters for the native kernels."""
        return Part(pool("max_pool", channels, self.stride))

    def forward(self, x: Tensor) -> Tensor:
        # Compression may have taken channels away.
        fits = x.shape[1] == self.channels
        y = evaluate(lambda: self.part(self.channels), x, self) if fits else None
        return max_pool(x, self.stride) if y is None else y


class AvgPool(nn.Module):
    """3x3 average pooling that does not count the padding."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def part(self, channels: int) -> Part:
        """This operation on ``channels`` filters for the native kernels."""
        return Part(pool("avg_pool", channels, self.stride))

    def forward(self, x: Tensor) -> Tensor:
        # Compression may have taken channels away.
        fits = x.shape[1] == self.channels
        y = evaluate(lambda: self.part(self.channels), x, self) if fits else None
        return avg_pool(x, self.stride) if y is None else y


class FactorisedReduce(nn.Module):
    """Halves the map without losing pixels: ReLU, two 1x1 convolutions on offset halves, concatenated, BN."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool = True) -> None:
        super().__init__()
        first = (out_channels + 1) // 2
        self.activation = nn.ReLU()
        self.even = PointwiseConv2d(in_channels, first)
        # A single output channel leaves nothing for the odd pixels.
        self.odd = PointwiseConv2d(in_channels, out_channels - first) if out_channels > first else None
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def part(self) -> Part | None:
        """This operation for the native kernels; None where a layer was exchanged for one they do not know."""
        plain = isinstance(self.activation, nn.ReLU) and isinstance(self.bn, nn.BatchNorm2d)
        if not (plain and isinstance(self.even, PointwiseConv2d) and isinstance(self.odd, PointwiseConv2d)):
            return None
        channels = self.even.out_channels + self.odd.out_channels
        if self.even.out_channels != (channels + 1) // 2:
            return None
        source = single(HALVES, self.even.in_channels, channels, 2, affine=self.bn.affine)
        return staged(source, [(((self.even, "weight"), (self.odd, "weight")), self.bn)])

    def forward(self, x: Tensor) -> Tensor:
        y = evaluate(self.part, x, self)
        if y is not None:
            return y
        even, odd = offset_halves(self.activation(x))
        halves = [self.even(even)]
        if self.odd is not None:
            halves.append(self.odd(odd))
        return self.bn(torch.cat(halves, dim=1))


class ReluConvBn(nn.Sequential):
    """ReLU, 1x1 convolution, BN: brings an input of a cell to its number of channels."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool = True) -> None:
        norm = nn.BatchNorm2d(out_channels, affine=affine)
        super().__init__(nn.ReLU(), PointwiseConv2d(in_channels, out_channels), norm)

    def part(self) -> Part | None:
        """This operation for the native kernels; None where a layer was exchanged for one they do not know."""
        modules: list[Any] = list(self)
        kinds = (nn.ReLU, PointwiseConv2d, nn.BatchNorm2d)
        if not all(isinstance(module, kind) for module, kind in zip(modules, kinds, strict=True)):
            return None
        source = single(POINTWISE, modules[1].in_channels, modules[1].out_channels, 1, affine=modules[2].affine)
        return staged(source, [(((modules[1], "weight"),), modules[2])])

    def forward(self, x: Tensor) -> Tensor:
        y = evaluate(self.part, x, self)
        return super().forward(x) if y is None else y


def part_of(module: nn.Module, channels: int) -> Part | None:
    """What a module that takes ``channels`` filters is for the native kernels, None where they do not know it."""
    if isinstance(module, nn.Identity):
        return Part(skip(channels))
    if isinstance(module, MaxPool | AvgPool):
        return module.part(channels)
    if isinstance(module, SeparableConv | FactorisedReduce | ReluConvBn):
        return module.part()
    return None


def build(name: str, channels: int, stride: int) -> nn.Module:
    """The module of operation ``name`` on ``channels`` filters, for a discrete cell ("none" has no module)."""
    operation = OPERATIONS[name]
    if operation.kind == "conv":
        return SeparableConv(channels, operation.kernel, stride, operation.dilation, operation.repeats)
    if operation.kind == "max_pool":
        return MaxPool(channels, stride)
    if operation.kind == "avg_pool":
        return AvgPool(channels, stride)
    if operation.kind == "skip":
        return nn.Identity() if stride == 1 else FactorisedReduce(channels, channels)
    raise ValueError(f"operation '{name}' has no module: it removes its edge")
