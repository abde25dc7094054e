"""Auxiliary-head loss as a wrapper around any objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.objective import Batch, Metrics, Objective, State
from nas.prediction import networks_in


@dataclass(frozen=True)
class WithAuxiliary:
    """``objective`` plus ``weight`` times the cross-entropy of the auxiliary head.

    The head sees exactly the inputs the objective passes through the network in train mode (adversarial ones under
    adversarial training); over several passes its loss is averaged. The released ARNAS code feeds it clean images
    instead, which hides a natural loss inside adversarial training.
    """

    objective: Objective
    weight: float

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The objective's loss with the auxiliary term added, and its value among the metrics."""
        losses: list[Tensor] = []

        def collect(module: nn.Module, inputs: object, logits: Tensor) -> None:
            del module, inputs
            if torch.is_grad_enabled():
                labels = batch.y.repeat(len(logits) // len(batch.y))  # clean and adversarial images in one pass
                losses.append(F.cross_entropy(logits, labels))

        heads = [network.get_submodule("auxiliary") for network in networks_in(model).values()]
        handles = [head.register_forward_hook(collect) for head in heads]
        try:
            loss, metrics = self.objective(model, batch, state)
        finally:
            for handle in handles:
                handle.remove()
        if not losses:
            raise RuntimeError("the objective made no pass in train mode that reached the auxiliary head")
        auxiliary = torch.stack(losses).mean()
        return loss + self.weight * auxiliary, {**metrics, "auxiliary_loss": auxiliary.detach()}
