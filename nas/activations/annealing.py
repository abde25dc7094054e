"""Activations that harden while a network is trained: they begin as a rectifier and end as what they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.activations.activation import Placed

BY = 0.5
"""Share of the training over which they harden."""


class Annealed(Placed):
    """Base of modules with a buffer ``level`` from 0 (a rectifier) to 1 (as described), which ``anneal`` sets."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))


def anneal(model: nn.Module, epoch: int, epochs: int) -> bool:
    """Set the levels for ``epoch`` (from 0) of a training of ``epochs``; whether all are 1, as of a finished network.

    Follows from the epoch alone, so that a resumed training does the same; the last epoch is always at 1. A level never
    falls: what is fine-tuned stays as it is.
    """
    level = 1.0 if epoch + 1 >= epochs else min(1.0, epoch / (BY * (epochs - 1)))
    modules = [module for module in model.modules() if isinstance(module, Annealed)]
    for module in modules:
        module.level.clamp_min_(level)
    return all(float(module.level) == 1.0 for module in modules)
