"""The few tensor operations every cell is made of, each computed in the form that is fastest for its shape.

On a CPU, convolutions over feature maps of at most 8x8 pixels are dominated by call overhead and by slow
depthwise kernels, above all backward. There a depthwise convolution is a small matrix per channel, a 1x1
convolution one matrix product and batch normalisation a reduction over rows, if the activations lie in memory
channel by channel ([C, N, H, W]). Tensors keep their logical shape [N, C, H, W] throughout: the memory order
is carried by the strides, so every function here accepts and returns ordinary tensors, and both forms compute
the same function (tests compare them in float64).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

MATRIX_FORM_PIXELS = 64
"""Largest feature map (H*W) computed in matrix form. At 10x10 both forms take the same time, above it the
convolution wins: its cost grows with H*W, that of the matrix with (H*W)^2."""


def matrix_form(x: Tensor) -> bool:
    """Whether operations on ``x`` [N, C, H, W] run in matrix form."""
    return x.device.type == "cpu" and x.shape[2] * x.shape[3] <= MATRIX_FORM_PIXELS and not _tracing()


def _tracing() -> bool:
    return torch.compiler.is_exporting() or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def channel_major(x: Tensor) -> Tensor:
    """[C, N, H, W], contiguous; free of charge where ``x`` [N, C, H, W] already lies channel by channel."""
    return x.transpose(0, 1).contiguous()


def padding_of(kernel: int, dilation: int) -> int:
    """Zero padding that keeps the size of the map at stride 1."""
    return dilation * (kernel - 1) // 2


@lru_cache(maxsize=128)
def tap_basis(
    height: int, width: int, kernel: int, dilation: int, stride: int, dtype: torch.dtype
) -> tuple[Tensor, int, int]:
    """The linear map from kernel taps to the matrix of a depthwise convolution.

    Returns B [K*K, H*W * H'*W'] of zeros and ones, H' and W': ``taps [C, K*K] @ B``, viewed as
    [C, H*W, H'*W'], holds for each channel the matrix M with ``flat(output) = flat(input) @ M``.
    """
    padding = padding_of(kernel, dilation)
    out_height, out_width = -(-height // stride), -(-width // stride)
    # It outlives this call: no inference tensor, and on the CPU whatever the default device is.
    with torch.inference_mode(False):
        basis = torch.zeros(kernel, kernel, height, width, out_height, out_width, dtype=dtype, device="cpu")
    for out_y in range(out_height):
        for out_x in range(out_width):
            for tap_y in range(kernel):
                for tap_x in range(kernel):
                    y = out_y * stride + tap_y * dilation - padding
                    x = out_x * stride + tap_x * dilation - padding
                    if 0 <= y < height and 0 <= x < width:
                        basis[tap_y, tap_x, y, x, out_y, out_x] = 1
    return basis.view(kernel * kernel, -1), out_height, out_width


def depthwise_matrices(weight: Tensor, height: int, width: int, dilation: int, stride: int) -> tuple[Tensor, int, int]:
    """Matrices [C, H*W, H'*W'] of the depthwise kernels ``weight`` [C, K, K] on a map of H x W, and H', W'."""
    kernel = weight.shape[-1]
    basis, out_height, out_width = tap_basis(height, width, kernel, dilation, stride, weight.dtype)
    matrices = weight.reshape(-1, kernel * kernel) @ basis
    return matrices.view(-1, height * width, out_height * out_width), out_height, out_width


def depthwise(x: Tensor, weight: Tensor, *, stride: int, dilation: int) -> Tensor:
    """Depthwise convolution of ``x`` [N, C, H, W] with ``weight`` [C, 1, K, K], padded to keep H x W at stride 1."""
    kernel = weight.shape[-1]
    if not matrix_form(x):
        padding = padding_of(kernel, dilation)
        return F.conv2d(x, weight, None, stride, padding, dilation, groups=weight.shape[0])
    channels, batch, height, width = channel_major(x).shape
    matrices, out_height, out_width = depthwise_matrices(weight, height, width, dilation, stride)
    y = torch.bmm(channel_major(x).view(channels, batch, height * width), matrices)
    return y.view(channels, batch, out_height, out_width).transpose(0, 1)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution of ``x`` [N, C, H, W] with ``weight`` [C', C, 1, 1]."""
    if not matrix_form(x):
        return F.conv2d(x, weight)
    batch, channels, height, width = x.shape
    y = weight.view(-1, channels) @ channel_major(x).view(channels, batch * height * width)
    return y.view(-1, batch, height, width).transpose(0, 1)


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    training: bool,
    momentum: float,
    epsilon: float,
) -> Tensor:
    """Batch normalisation over all axes of ``x`` [N, C, H, W] but the channels."""
    if not matrix_form(x):
        return F.batch_norm(x, mean, variance, scale, shift, training, momentum, epsilon)
    batch, channels, height, width = x.shape
    rows = channel_major(x).view(1, channels, batch * height * width)
    y = F.batch_norm(rows, mean, variance, scale, shift, training, momentum, epsilon)
    return y.view(channels, batch, height, width).transpose(0, 1)


def max_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 max pooling, padding 1."""
    if not matrix_form(x):
        return F.max_pool2d(x, 3, stride, 1)
    return F.max_pool2d(channel_major(x), 3, stride, 1).transpose(0, 1)


def avg_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 average pooling, padding 1, the padding not counted."""
    if not matrix_form(x):
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    return F.avg_pool2d(channel_major(x), 3, stride, 1, count_include_pad=False).transpose(0, 1)


def concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenation along the channels of [N, C_i, H, W]."""
    if not matrix_form(tensors[0]):
        return torch.cat(tensors, dim=1)
    return torch.cat([channel_major(tensor) for tensor in tensors], dim=0).transpose(0, 1)


def offset_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd pixels of ``x`` [N, C, H, W], both [N, C, ceil(H/2), ceil(W/2)].

    Maps of odd size are padded by one row and column of zeros, so that both halves have the same size.
    """
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]
