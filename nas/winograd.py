"""3x3 convolutions with constant weights on the CPU, by minimal filtering (winograd.cpp), and their input gradient.

A quarter of the multiplications of the direct form: F(4x4, 3x3) of Lavin and Gray, arXiv 1509.09308. In float32 the
relative error is of the order of 1e-6, that of the direct form of 1e-7.

The kernels are compiled for this machine at first use and kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.native import library

CHANNELS = 16
"""Channels must be a multiple of this: the lanes of the widest registers."""

BLOCK = 64
"""Tiles a thread computes at a time, at most: enough to reuse the weights, few enough to stay in its cache."""

FEWEST_TILES = 32
"""Below this many 4x4 tiles in a batch, reading the four times larger weights costs more than is saved."""


def suits(convolution: nn.Conv2d, weight: Tensor) -> bool:
    """Whether ``convolution`` with ``weight`` [K, C, 3, 3] has this form: 3x3, stride 1, padding 1, K and C many."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and tuple(weight.shape[2:]) == (3, 3)
        and convolution.stride == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.padding in ((1, 1), "same")
        and convolution.padding_mode == "zeros"
        and convolution.groups == 1
        and weight.shape[0] % CHANNELS == 0
        and weight.shape[1] % CHANNELS == 0
    )


def pays(x: Tensor) -> bool:
    """Whether a batch ``x`` [N, C, H, W] has enough tiles, and these enough pixels, to be faster than directly."""
    if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    batch, _, height, width = x.shape
    tiles = -(-height // 4) * -(-width // 4)
    return batch * tiles >= FEWEST_TILES and height * width >= 0.6 * 16 * tiles


class Convolution:
    """A 3x3 convolution with the constants ``weight`` [K, C, 3, 3] and ``bias`` [K] or None, stride 1, padding 1.

    rectifies: whether a ReLU is part of it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rectifies: bool = False) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach().contiguous()
        self.rectifies = rectifies
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[N, K, H, W] of ``x`` [N, C, H, W], channels last in memory; differentiable with respect to ``x``.

        Only for an ``x`` for which it ``pays``.
        """
        y: Tensor = _Differentiable.apply(x, self)
        return y

    def value(self, x: Tensor) -> Tensor:
        """The convolution itself."""
        if self._forward is None:
            self._forward = _packed(self.weight)
        return _convolved(x, None, self._forward, self.bias, self.weight.shape[0], self.rectifies)

    def gradient(self, gradient: Tensor, y: Tensor | None) -> Tensor:
        """That of the input [N, C, H, W] for that of the output ``y`` [N, K, H, W]: with turned kernels."""
        if self._backward is None:
            self._backward = _packed(self.weight.transpose(0, 1).flip(2, 3))
        return _convolved(gradient, y, self._backward, None, self.weight.shape[1], False)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: Convolution) -> Tensor:
        ctx.convolution = convolution
        y = convolution.value(x)
        if convolution.rectifies:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors or (None,)
        if torch.is_grad_enabled():  # it is going to be differentiated again: the same in torch's own operations
            gradient = gradient if y is None else gradient * (y > 0)
            return torch.conv_transpose2d(gradient, ctx.convolution.weight, padding=1), None
        return ctx.convolution.gradient(gradient, y), None


def _packed(weight: Tensor) -> Tensor:
    """``weight`` [K, C, 3, 3] at the 36 points, in the order the kernel reads it."""
    taps = weight.permute(2, 3, 1, 0).contiguous()
    packed = torch.empty(36 * weight.shape[0] * weight.shape[1])
    loaded = kernels()
    assert loaded is not None
    loaded.winograd_pack(taps.data_ptr(), *weight.shape[:2], packed.data_ptr(), torch.get_num_threads())
    return packed


def _convolved(
    x: Tensor, gate: Tensor | None, packed: Tensor, bias: Tensor | None, outputs: int, rectified: bool
) -> Tensor:
    batch, inputs, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(batch, outputs, height, width, memory_format=torch.channels_last)
    tiles, threads = batch * -(-height // 4) * -(-width // 4), torch.get_num_threads()
    rounds = -(-tiles // (threads * BLOCK))
    block = -(-tiles // (threads * rounds))  # every thread gets the same number of tiles
    loaded = kernels()
    assert loaded is not None
    tensors = [0 if tensor is None else tensor.data_ptr() for tensor in (x, gate, packed, bias, y)]
    if loaded.winograd_convolve(*tensors, int(rectified), batch, height, width, inputs, outputs, block, threads):
        raise MemoryError("no memory for the convolution")
    return y


@lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had (``library.why_not``)."""
    loaded = library.load(Path(__file__).with_name("winograd.cpp"))
    if loaded is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.winograd_pack.argtypes = [pointer, size, size, pointer, ctypes.c_int]
    loaded.winograd_pack.restype = None
    loaded.winograd_convolve.argtypes = [pointer] * 5 + [ctypes.c_int] + [size] * 6 + [ctypes.c_int]
    loaded.winograd_convolve.restype = ctypes.c_int
    return loaded
