"""What draws weights to where a compression wants them while they train: a penalty beside the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nas.objective import Batch, Metrics, Objective, State, gradients_of


class Penalty(Protocol):
    """A pull on the weights of a steered network, which carries all that it depends on as buffers.

    ``begin_epoch(model, epoch)`` moves multipliers and targets, once an epoch however often it is called.
    ``penalty(model) -> (term, metrics)``: what is added to the loss of a batch.
    """

    def begin_epoch(self, model: nn.Module, epoch: int) -> None: ...

    def penalty(self, model: nn.Module) -> tuple[Tensor, Metrics]: ...


@dataclass(frozen=True)
class Penalised:
    """``objective`` plus the penalty of ``method``.

    The objective may have gradients of its own: those of the penalty are added to them.
    """

    objective: Objective
    method: Penalty

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The penalised loss."""
        self.method.begin_epoch(model, state.epoch)
        loss, metrics = self.objective(model, batch, state)
        penalty, more = self.method.penalty(model)
        return loss + penalty, {**metrics, **more}

    def gradients(
        self, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None], Metrics]:
        """Gradients of the objective, in its own way, plus those of the penalty."""
        self.method.begin_epoch(model, state.epoch)
        loss, gradients, metrics = gradients_of(self.objective, model, batch, state, parameters)
        penalty, more = self.method.penalty(model)
        if penalty.requires_grad:
            pulls = torch.autograd.grad(penalty, [*parameters], allow_unused=True)
            gradients = [
                pull if gradient is None else gradient if pull is None else gradient + pull
                for gradient, pull in zip(gradients, pulls, strict=True)
            ]
        return loss + penalty.detach(), gradients, {**metrics, **more}
