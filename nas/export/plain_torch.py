"""What exported source files are made of: layers in ordinary torch and a reader of weights.

source.py copies the text of these definitions into the files it writes. They are code here, not strings, so
that they are checked like the rest. They may use json, Path, torch, nn and Tensor, and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn


class ReluConvBn(nn.Module):
    """ReLU, 1x1 convolution, batch norm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(torch.relu(x)))


class FactorisedReduce(nn.Module):
    """Halves the map: ReLU, one 1x1 convolution of the even and one of the odd pixels side by side, batch norm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        odd = channels // 2
        self.even = nn.Conv2d(in_channels, channels - odd, 1, bias=False)
        self.odd = nn.Conv2d(in_channels, odd, 1, bias=False) if odd else None
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        # One row or column of zeros makes both halves the same size where the map is odd.
        x = nn.functional.pad(torch.relu(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        y = self.even(x[:, :, ::2, ::2])
        if self.odd is not None:
            y = torch.cat([y, self.odd(x[:, :, 1::2, 1::2])], dim=1)
        return self.bn(y)


class SeparableConv(nn.Module):
    """ReLU, depthwise K x K convolution, 1x1 convolution, batch norm."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(torch.relu(x))))


class ConvBnRelu(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def read_weights(path: str | Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have the names, types and shapes of ``expected``."""
    content = bytearray(Path(path).read_bytes())
    body = 8 + int.from_bytes(content[:8], "little")  # eight bytes: the length of the JSON header; header; tensors
    try:
        header = json.loads(content[8:body]) if body <= len(content) else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file, or it is cut short")
    header.pop("__metadata__", None)
    if header.keys() != expected.keys():
        example = min(header.keys() ^ expected.keys())
        raise ValueError(f"{path} holds the weights of another network (for example '{example[:80]}' is in one only)")
    if len(content) - body != sum(tensor.nbytes for tensor in expected.values()):
        raise ValueError(f"{path} has the wrong size: it is cut short or damaged")
    tensors = {}
    for name, like in expected.items():
        dtype = {torch.float32: "F32", torch.int64: "I64"}[like.dtype]
        entry = header[name] if isinstance(header[name], dict) else {}
        if (entry.get("dtype"), entry.get("shape")) != (dtype, list(like.shape)):
            raise ValueError(f"{path}: '{name}' is not {dtype} of shape {list(like.shape)}, as the network needs")
        match entry.get("data_offsets"):
            case [int(start), int(end)] if start >= 0 and end - start == like.nbytes and body + end <= len(content):
                data = content[body + start : body + end]
                tensors[name] = torch.frombuffer(data, dtype=like.dtype).view(like.shape)
            case _:
                raise ValueError(f"{path} is damaged: '{name}' does not lie inside the file")
    return tensors
