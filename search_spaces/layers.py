"""The layers cells are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padding_of(kernel: int, dilation: int) -> int:
    """Zero padding that keeps the size of the map at stride 1."""
    return dilation * (kernel - 1) // 2


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise K x K convolution without bias: one kernel per channel, padded to keep the map at stride 1."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        padding = padding_of(kernel, dilation)
        super().__init__(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)


def max_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 max pooling, padding 1."""
    return F.max_pool2d(x, 3, stride, 1)


def avg_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 average pooling, padding 1, the padding not counted."""
    return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)


def offset_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd pixels of ``x`` [N, C, H, W], both [N, C, ceil(H/2), ceil(W/2)].

    Maps of odd size are padded by one row and column of zeros, so that both halves have the same size.
    """
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]


class Normalise(nn.Module):
    """Pixels in [0, 1] to zero mean and unit deviation per channel: (x - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
