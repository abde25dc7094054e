"""Ordinary convolution and normalisation modules that run on the shape-aware kernels of ``kernels.py``.

They are ``nn.Conv2d`` and ``nn.BatchNorm2d`` in every respect (parameters, names, hooks, export); only the
arithmetic is chosen by shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from search_spaces import kernels


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise K x K convolution without bias: one kernel per channel, padded to keep the map at stride 1."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        padding = kernels.padding_of(kernel, dilation)
        super().__init__(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.depthwise(x, self.weight, stride=self.stride[0], dilation=self.dilation[0])


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.pointwise(x, self.weight)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with a fixed momentum; batch statistics in train mode, running ones in eval mode."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        counted = self.training and self.track_running_stats
        if counted and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = not self.training or self.track_running_stats
        return kernels.batch_norm(
            x,
            self.running_mean if running else None,
            self.running_var if running else None,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum if self.momentum is not None else 0.1,
            epsilon=self.eps,
        )


class KeepsDerived(nn.Module):
    """A module that may keep tensors derived from its weights while these cannot change (see ``constant_weights``).

    kept: None outside of ``constant_weights``; within it a dictionary the module fills at its first pass.
    """

    kept: dict[tuple[int, ...], tuple[Tensor, ...]] | None = None


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Within it the weights of ``model`` must not change and need no gradients: what derives from them is kept.

    Modules with hooks inside are left out, so that every hook sees its own layer.
    """
    keepers = [
        module
        for module in model.modules()
        if isinstance(module, KeepsDerived) and module.kept is None and not _hooked_inside(module)
    ]
    for module in keepers:
        module.kept = {}
    try:
        yield
    finally:
        for module in keepers:
            module.kept = None


def _hooked_inside(module: nn.Module) -> bool:
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
        if part is not module
    )


def separable_stage(
    x: Tensor,
    activation: nn.Module,
    depthwise: DepthwiseConv2d,
    pointwise: PointwiseConv2d,
    norm: BatchNorm2d,
    kept: dict[tuple[int, ...], tuple[Tensor, ...]] | None,
    stage: int,
) -> Tensor:
    """[activation, depthwise, 1x1, BN] of ``x`` [N, C, H, W]; with ``kept``, from matrices derived once."""
    if kept is None or norm.training or not kernels.matrix_form(x):
        return norm(pointwise(depthwise(activation(x))))
    batch, channels, height, width = x.shape
    key = (stage, height, width)
    if key not in kept:
        stride, dilation = depthwise.stride[0], depthwise.dilation[0]
        matrices, *_ = kernels.depthwise_matrices(depthwise.weight, height, width, dilation, stride)
        kept[key] = (matrices, *folded(pointwise.weight.flatten(1), norm))
    matrices, weight, bias = kept[key]
    stride = depthwise.stride[0]
    rows = kernels.channel_major(activation(x)).view(channels, batch, height * width)
    y = torch.addmm(bias, weight, torch.bmm(rows, matrices).view(channels, -1))
    return y.view(-1, batch, -(-height // stride), -(-width // stride)).transpose(0, 1)


def folded(weight: Tensor, norm: BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [C', C] and bias [C', 1] of a 1x1 convolution followed by ``norm`` in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    return weight * scale.unsqueeze(1), bias.unsqueeze(1)


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
