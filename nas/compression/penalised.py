"""What draws weights to where a compression wants them while they train: a penalty beside the loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nas.compression.layers import Layer, deployed_layers
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


def carriers(steered: nn.Module, buffer: str) -> dict[str, Layer]:
    """The layers of a steered network that carry ``buffer``."""
    return {name: layer for name, layer in deployed_layers(steered).items() if hasattr(layer, buffer)}


def without(steered: nn.Module, buffers: Sequence[str], epoch: str) -> nn.Module:
    """A copy of a steered network without the buffers of its layers, and without its own, ``epoch``."""
    network = copy.deepcopy(steered)
    for layer in carriers(network, buffers[0]).values():
        for name in buffers:
            delattr(layer, name)
    delattr(network, epoch)
    return network


def apart(steered: nn.Module, target: str, dual: str) -> tuple[Tensor, Tensor]:
    """sum |W - Z + U|^2 over the layers that carry Z and U in these buffers, and |W - Z| / |W|, 0 where W is there."""
    layers = carriers(steered, target).values()
    weights = [layer.weight for layer in layers]
    gaps = [weight - layer.get_buffer(target) for weight, layer in zip(weights, layers, strict=True)]
    pulled = [(gap + layer.get_buffer(dual)).square().sum() for gap, layer in zip(gaps, layers, strict=True)]
    gap, size = (torch.stack([t.detach().square().sum() for t in some]).sum() for some in (gaps, weights))
    return torch.stack(pulled).sum(), (gap / size.clamp_min(1e-30)).sqrt()
