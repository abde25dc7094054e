"""The smooth rectifier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nas.activations.activation import PerPlace
from nas.errors import InputError


@dataclass(frozen=True)
class Softplus(PerPlace):
    """Softplus: log(1 + exp(beta x)) / beta, smooth, at most log(2) / beta above ReLU."""

    beta: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1e6:
            raise InputError(f"softplus needs a beta above 0 and at most 1e6, not {self.beta}")

    def module(self, channels: int) -> nn.Module:
        """``nn.Softplus``."""
        del channels
        return nn.Softplus(self.beta)


PLUGIN = Softplus
