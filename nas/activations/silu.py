"""The sigmoid-weighted linear unit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nas.activations.activation import PerPlace


@dataclass(frozen=True)
class Silu(PerPlace):
    """SiLU (Swish): x sigmoid(x), smooth.

    Elfwing et al., arXiv 1702.03118; smooth activations in adversarial training: Xie et al., arXiv 2006.14536.
    """

    def module(self, channels: int) -> nn.Module:
        """``nn.SiLU``."""
        del channels
        return nn.SiLU()


PLUGIN = Silu
