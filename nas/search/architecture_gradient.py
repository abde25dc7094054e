"""Gradients of objectives with respect to the architecture parameters: first order, or through one weight step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from nas.errors import InputError
from search_spaces.supernet import Supernet

Loss = Callable[[], Tensor]
"""Evaluates a scalar loss of the supernet as it stands."""


Mean = Callable[[Callable[[], Sequence[Tensor]]], list[Tensor]]
"""Evaluates something for each part of the batches that the losses are of, and gives the mean."""


def whole(work: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """The ``Mean`` over batches that are one part."""
    return [*work()]


@dataclass(frozen=True)
class WeightStep:
    """The step the weight optimiser would take: learning rate, momentum, weight decay and momentum buffers."""

    learning_rate: float
    momentum: float
    weight_decay: float
    buffers: Sequence[Tensor | None]


@dataclass(frozen=True)
class FirstOrder:
    """Gradient at the present weights, which are treated as if they did not depend on the architecture."""

    def __call__(
        self, supernet: Supernet, weight_loss: Loss, objectives: Sequence[Loss], step: WeightStep, mean: Mean = whole
    ) -> list[Tensor]:
        """One flat gradient [architecture parameters] per objective."""
        del weight_loss, step
        architecture = supernet.architecture_parameters()
        return [_flat(mean(partial(_gradients, objective, architecture))) for objective in objectives]


@dataclass(frozen=True)
class Unrolled:
    """Gradient through one virtual weight step w' = w - lr (momentum b + grad L_w + decay w).

    DARTS (arXiv 1806.09055, eq. 6-8) as in the released ARNAS code, except that the virtual step, which is the same
    for all objectives, is computed once. hessian: "finite_difference" evaluates the mixed second derivative
    from two weight gradients at w +- e v with e = radius / |v| (eq. 8); "exact" differentiates twice.
    """

    hessian: Literal["finite_difference", "exact"] = "finite_difference"
    radius: float = 0.01

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise InputError(f"the finite-difference radius must be above 0, not {self.radius}")

    def __call__(
        self, supernet: Supernet, weight_loss: Loss, objectives: Sequence[Loss], step: WeightStep, mean: Mean = whole
    ) -> list[Tensor]:
        """One flat gradient [architecture parameters] per objective."""
        weights, architecture = supernet.weight_parameters(), supernet.architecture_parameters()
        # A space without (twice repeated) convolutions has weights of no elements, which no loss uses.
        gradients = mean(partial(_gradients, weight_loss, weights, materialize_grads=True))
        virtual = []
        for weight, gradient, buffer in zip(weights, gradients, step.buffers, strict=True):
            update = gradient + step.weight_decay * weight.detach()
            if buffer is not None:
                update = update + step.momentum * buffer
            virtual.append(-step.learning_rate * update)
        direct, vectors = [], []
        with _shifted(weights, virtual):
            for objective in objectives:
                both = mean(partial(_gradients, objective, [*architecture, *weights], materialize_grads=True))
                direct.append(_flat(both[: len(architecture)]))
                vectors.append(both[len(architecture) :])
        return [
            gradient - step.learning_rate * self._mixed_product(weight_loss, weights, architecture, vector, mean)
            for gradient, vector in zip(direct, vectors, strict=True)
        ]

    def _mixed_product(
        self,
        loss: Loss,
        weights: list[nn.Parameter],
        architecture: list[nn.Parameter],
        vector: Sequence[Tensor],
        mean: Mean,
    ) -> Tensor:
        """d/d(architecture) of (grad_w loss . vector), at the present weights."""
        if self.hessian == "exact":

            def along() -> Tensor:
                gradients = torch.autograd.grad(loss(), weights, create_graph=True, materialize_grads=True)
                return torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()

            return _flat(mean(partial(_gradients, along, architecture)))
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(vector))))
        if length == 0:
            return torch.zeros(sum(p.numel() for p in architecture), device=length.device, dtype=length.dtype)
        radius = self.radius / length
        with _shifted(weights, [radius * v for v in vector]):
            ahead = _flat(mean(partial(_gradients, loss, architecture)))
        with _shifted(weights, [-radius * v for v in vector]):
            behind = _flat(mean(partial(_gradients, loss, architecture)))
        return (ahead - behind) / (2 * radius)


@contextmanager
def _shifted(weights: list[nn.Parameter], shift: Sequence[Tensor]) -> Iterator[None]:
    """Within it, the weights are moved by ``shift``; afterwards they are exactly as before."""
    originals = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        torch._foreach_add_([*weights], [*shift])
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_([*weights], originals)


def _gradients(loss: Loss, parameters: Sequence[Tensor], *, materialize_grads: bool = False) -> Sequence[Tensor]:
    return torch.autograd.grad(loss(), parameters, materialize_grads=materialize_grads)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
