"""Models that answer at random: attacked and judged by the mean of many answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Expectation(nn.Module):
    """The mean of the logits of ``draws`` passes: gradients of it are those of expectation over transformation.

    Athalye et al., arXiv 1802.00420, section 4.1.2. Any attack on it is an attack by expectation, and its answer hardly
    depends on luck. Passes run one after another: memory of a gradient grows with ``draws``.
    """

    def __init__(self, model: nn.Module, draws: int = 20) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, not {draws}")
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.model(x) for _ in range(self.draws)]).mean(0)
