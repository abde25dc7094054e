"""Standard training."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nas.objective import Batch, Metrics, State


@dataclass(frozen=True)
class Standard:
    """Standard training: cross-entropy on clean images, no robustness intended."""

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the batch."""
        del state
        logits = model(batch.x)
        loss = F.cross_entropy(logits, batch.y)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


PLUGIN = Standard
