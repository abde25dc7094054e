"""The Gaussian error linear unit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nas.activations.activation import PerPlace


@dataclass(frozen=True)
class Gelu(PerPlace):
    """GELU: x times the normal distribution function of x, smooth. Hendrycks & Gimpel, arXiv 1606.08415."""

    def module(self, channels: int) -> nn.Module:
        """``nn.GELU``."""
        del channels
        return nn.GELU()


PLUGIN = Gelu
