"""The rectifier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nas.activations.activation import PerPlace


@dataclass(frozen=True)
class Relu(PerPlace):
    """Rectifier: max(x, 0), what networks have unless they say otherwise."""

    def module(self, channels: int) -> nn.Module:
        """``nn.ReLU``, which native kernels know."""
        del channels
        return nn.ReLU()


PLUGIN = Relu
