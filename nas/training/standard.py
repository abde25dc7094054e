"""Standard training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import InputError
from nas.objective import Batch, Metrics, State


@dataclass(frozen=True)
class Standard:
    """Standard training: cross-entropy on clean images, no robustness intended.

    label_smoothing: share of each label that is spread over all classes.
    """

    label_smoothing: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the batch."""
        del state
        logits = model(batch.x)
        loss = F.cross_entropy(logits, batch.y, label_smoothing=self.label_smoothing)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


def check_label_smoothing(share: float) -> None:
    """Raise ``InputError`` for what is no share."""
    if not 0 <= share < 1:
        raise InputError(f"label_smoothing is a share of at least 0 and below 1, about 0.1 to 0.2, not {share}")


PLUGIN = Standard
