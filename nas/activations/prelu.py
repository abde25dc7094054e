"""The rectifier with a learnt slope."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.activations.activation import PerPlace, Placed
from nas.errors import InputError


@dataclass(frozen=True)
class Prelu(PerPlace):
    """PReLU: x above 0, a learnt slope of the channel times x below. He et al., ICCV 2015, arXiv 1502.01852."""

    slope: float = 0.25

    def __post_init__(self) -> None:
        if not -10 <= self.slope <= 10:
            raise InputError(f"the initial slope of prelu must be from -10 to 10, not {self.slope}")

    def module(self, channels: int) -> nn.Module:
        """With ``channels`` slopes."""
        return Slopes(channels, self.slope)


class Slopes(Placed):
    """PReLU of maps, vectors or tokens; ``nn.PReLU`` would take tokens for channels."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), slope))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(0) - self.weight.view(along(x)) * (-x).clamp_min(0)


def along(x: Tensor) -> list[int]:
    """The shape in which a vector of one number per channel broadcasts over ``x``."""
    return [-1] if x.dim() in (2, 3) else [-1, *[1] * (x.dim() - 2)]


PLUGIN = Prelu
