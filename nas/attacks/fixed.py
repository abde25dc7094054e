"""An attack already carried out: lets an objective be evaluated again on the same adversarial images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.attacks.gradient import Objective


@dataclass(frozen=True, eq=False)
class Fixed:
    """Returns images crafted before, whatever the model has become since."""

    x_adv: Tensor

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The stored images; ``x`` must be the batch they were crafted for."""
        del model, y, generator
        return self._stored(x)

    def maximise(self, model: nn.Module, objective: Objective, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """The stored images, too, whatever was climbed to find them."""
        del model, objective, generator
        return self._stored(x)

    def _stored(self, x: Tensor) -> Tensor:
        if x.shape != self.x_adv.shape:
            raise ValueError(f"crafted for a batch of shape {tuple(self.x_adv.shape)}, called with {tuple(x.shape)}")
        return self.x_adv
