"""The two contracts everything else plugs into: an attack is a value, a training method is an objective.

A training method is no more than an ``Objective`` where it can be. What some need beyond that are contracts of their
own, each a method or two that the training loop looks for: gradients that are not those of one loss (``Gradients``),
something prepared before training (``Prepares``), a state that training goes on with after a crash (``Remembers``),
batches seen several times (``Replays``), other images to train on (``TrainsOn``), other weights to begin with
(``StartsFrom``), networks that predict as an ensemble (``Predicts``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nas.errors import InputError

if TYPE_CHECKING:
    from nas.data.image_data import ImageData
    from nas.data.split import Split
    from nas.prediction import Prediction

Metrics = dict[str, Tensor]
"""Names to detached scalars; reduced to floats once per epoch, so that no step waits for the device."""


@dataclass(frozen=True)
class Batch:
    """Images and labels on the device.

    x: [N, C, H, W] float in [0, 1];  y: [N] int64;  indices: [N] int64, rows of the data set they came from; those
    beyond its end are of extra images.
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


@runtime_checkable
class Gradients(Protocol):
    """An objective whose step is not along the gradient of its loss: several losses weighed, weights perturbed.

    ``objective.gradients(model, batch, state, parameters) -> (loss, gradients, metrics)``: a detached scalar to show,
    one gradient for each of ``parameters`` (None: unused), detached scalars. Leaves ``.grad``, weights and modes as
    found; running statistics are updated as by one pass in train mode.
    """

    def gradients(
        self, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None], Metrics]: ...


@dataclass(frozen=True)
class Setting:
    """What a training method may prepare itself from.

    model: the network with its initial weights, on the device, which ``prepare`` must not change;  data, split: on the
    device;  seed: of the training;  epochs, batch_size: of the training;  folder: where what took long to prepare may
    be kept, in files named after the method (None: nowhere).
    """

    model: nn.Module
    data: ImageData
    split: Split
    seed: int
    epochs: int
    batch_size: int
    folder: Path | None = None


@runtime_checkable
class Prepares(Protocol):
    """A training method that becomes an objective only once it knows model and data.

    ``method.prepare(setting) -> objective``. The same setting gives the same objective; a call that was cut off and is
    made again, in the same folder, comes to the same result.
    """

    def prepare(self, setting: Setting) -> Objective: ...


@runtime_checkable
class Remembers(Protocol):
    """A prepared objective with a state of its own: ``tree()`` for the checkpoint, ``restore(tree)`` from it."""

    def tree(self) -> Mapping[str, Any]: ...

    def restore(self, tree: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Replays(Protocol):
    """An objective that sees each batch ``replays`` times in a row."""

    @property
    def replays(self) -> int: ...


@runtime_checkable
class TrainsOn(Protocol):
    """A prepared objective with training images of its own: ``training_images() -> (x, y)``.

    x: [N, C, H, W] uint8;  y: [N] int64, on the device of the data set. Validation stays on images of the data set.
    """

    def training_images(self) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class StartsFrom(Protocol):
    """A prepared objective that fine-tunes: ``initial_weights() -> state of the model`` with which training begins."""

    def initial_weights(self) -> Mapping[str, Tensor]: ...


def kept_by(objective: object, contract: Any) -> Any:
    """The one of ``objective`` and those that it wraps (field ``objective``) that keeps a contract; None: none does."""
    while objective is not None and not isinstance(objective, contract):
        objective = getattr(objective, "objective", None)
    return objective


def prepared(objective: Objective, setting: Setting) -> Objective:
    """``objective``, prepared where it has to be; what wraps it then wraps what was prepared."""
    if isinstance(objective, Prepares):
        return objective.prepare(setting)
    inner = getattr(objective, "objective", None)
    if inner is None:
        return objective
    ready: Objective = replace(objective, objective=prepared(inner, setting))  # type: ignore[type-var]
    return ready


@runtime_checkable
class Predicts(Protocol):
    """A training method whose networks do not predict by one pass: ``prediction`` says how, None by one pass.

    It becomes part of the description of the trained network, which then is validated, attacked and judged in that
    form; the method itself is called with the ensemble, in train mode.
    """

    @property
    def prediction(self) -> Prediction | None: ...


def prediction_of(method: object) -> Prediction | None:
    """How networks trained by ``method`` predict."""
    known = kept_by(method, Predicts)
    return None if known is None else known.prediction


def gradients_of(
    objective: Objective, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, list[Tensor | None], Metrics]:
    """Loss (detached), gradients of the weights and metrics of any objective on a batch."""
    if isinstance(objective, Gradients):
        return objective.gradients(model, batch, state, parameters)
    own = kept_by(objective, Gradients)
    if own is not None:
        raise InputError(
            f"{type(own).__name__} has gradients of its own and cannot be wrapped by {type(objective).__name__}: leave "
            "one of them out"
        )
    loss, metrics = objective(model, batch, state)
    return loss.detach(), [*torch.autograd.grad(loss, [*parameters], allow_unused=True)], metrics
