"""Where data go in one pass of a network: which layer takes what which layer has made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nas.compression.layers import deployed_layers
from nas.errors import InputError
from nas.model_state import evaluating
from nas.objective import Setting

SIDE = 32
"""Pixels of the images that a network is traced with where there are no data to ask."""


@dataclass(frozen=True)
class Step:
    """One step of a pass: a layer, by name, or an operation of torch, and the numbers of the values it takes and makes.

    Values are numbered as they appear; one that is changed in place gets a new number.
    """

    layer: str | None
    operation: str
    takes: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(frozen=True)
class DataFlow:
    """The steps of a pass in their order, and the numbers of the values that are its result."""

    steps: tuple[Step, ...]
    results: tuple[int, ...]

    def calls(self, layer: str) -> list[Step]:
        """The steps that are ``layer``."""
        return [step for step in self.steps if step.layer == layer]

    def maker(self, value: int) -> Step | None:
        """The step that makes ``value``; None for the images and for weights."""
        return next((step for step in self.steps if value in step.makes), None)

    def takers(self, value: int) -> list[Step | None]:
        """Every step that takes ``value``, as often as it does; None stands for the result of the network."""
        found: list[Step | None] = [step for step in self.steps for taken in step.takes if taken == value]
        return found + [None] * self.results.count(value)


def trace(model: nn.Module, images: Tensor, layers: Mapping[str, nn.Module]) -> DataFlow:
    """One pass of ``images`` [N, C, H, W] in eval mode, in which each of ``layers`` is one step.

    The model is left alone. Raises ``InputError`` where it cannot take such images.
    """
    recorder = _Recorder()
    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda module, given: recorder.enter()))
        handles.append(layer.register_forward_hook(lambda module, given, y, name=name: recorder.leave(name, given, y)))
    try:
        with evaluating(model), torch.no_grad(), recorder:
            y = model(images)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"this network cannot take images of {tuple(images.shape[1:])}: {reason}") from None
    finally:
        for handle in handles:
            handle.remove()
    return DataFlow(tuple(recorder.steps), recorder.numbers(y))


def example_images(model: nn.Module, setting: Setting | None, count: int = 2) -> Tensor:
    """Images [count, C, H, W] that ``model`` can be traced with: the first of the data set.

    Without data, grey images of ``SIDE`` pixels with the channels of its first convolution; a network that has none
    does not tell what it takes, which is an ``InputError``.
    """
    like = next(model.parameters(), torch.zeros(()))
    if setting is not None:
        pixels = setting.data.x_train[:count]
        return pixels.expand(count, *pixels.shape[1:]).to(like.device, like.dtype) / 255
    first = next((layer for layer in deployed_layers(model).values() if isinstance(layer, nn.Conv2d)), None)
    if first is None:
        raise InputError("a network without convolutions can only be traced with data: give the data set")
    return torch.full((count, first.in_channels, SIDE, SIDE), 0.5, device=like.device, dtype=like.dtype)


class _Recorder(TorchDispatchMode):
    """Writes down the operations of torch outside layers, and the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.depth = 0
        self.known: dict[int, int] = {}
        self.alive: list[Tensor] = []  # so that no two tensors are known by the same id
        self.values = 0

    def enter(self) -> None:
        self.depth += 1

    def leave(self, name: str, given: object, y: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._write(name, "layer", given, y)

    def numbers(self, tree: object, *, new: bool = False) -> tuple[int, ...]:
        """The numbers of the tensors in ``tree``; new: they have just been made."""
        return tuple(self._number(leaf, new) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

    def _number(self, tensor: Tensor, new: bool) -> int:
        if new or id(tensor) not in self.known:
            self.known[id(tensor)] = self.values
            self.values += 1
            self.alive.append(tensor)
        return self.known[id(tensor)]

    def _write(self, layer: str | None, operation: str, given: object, y: object) -> None:
        takes = self.numbers(given)
        self.steps.append(Step(layer, operation, takes, self.numbers(y, new=True)))

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if self.depth == 0:
            self._write(None, str(func.overloadpacket.__name__), (args, kwargs), y)
        return y
