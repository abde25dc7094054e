"""The two contracts everything else plugs into: an attack is a value, a training method is an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]
"""Names to detached scalars; reduced to floats once per epoch, so that no step waits for the device."""


@dataclass(frozen=True)
class Batch:
    """Images and labels on the device.

    x: [N, C, H, W] float in [0, 1];  y: [N] int64;  indices: [N] int64, rows of the data set they came from.
    places: [N, H, W] int64, only where it was asked for: the pixel (row * W + column) of the unaugmented image that
    each pixel came from, -1 for one that augmentation put in.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    places: Tensor | None = None


@dataclass(frozen=True)
class State:
    """What an objective may know beside the batch: where training stands and its own random streams.

    progress runs from 0 to 1 over the whole training.
    """

    epoch: int
    step: int
    progress: float
    attack_generator: torch.Generator
    method_generator: torch.Generator


@runtime_checkable
class Attack(Protocol):
    """Finds adversarial inputs: ``attack(model, x, y, generator=g) -> x_adv`` with the shape of ``x``.

    Stays inside its threat model, differentiates with respect to the input only, and leaves parameters,
    gradients, buffers, train/eval mode and the global random state as it found them.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class Objective(Protocol):
    """What is minimised on a batch: ``objective(model, batch, state) -> (loss, metrics)``.

    Never calls backward or step: the loop does. The model arrives in train mode and is left in it.
    """

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]: ...
