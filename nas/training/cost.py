"""What a training method costs: passes of the network and memory, counted on one real step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nas.data.batches import batch_count, batches
from nas.data.image_data import ImageData
from nas.data.split import Split
from nas.objective import Objective, Replays, Setting, State, TrainsOn, gradients_of, kept_by, prepared
from nas.prediction import networks_in
from nas.randomness import generator
from nas.training.loop import Training


@dataclass
class Passes:
    """Images that went through a network, and those that gradients went back through it for."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.forward + self.backward


@contextmanager
def counted(model: nn.Module) -> Iterator[Passes]:
    """Counts passes of ``model``, or of each network of an ensemble, and of copies made of it meanwhile.

    A gradient of a gradient is two passes: back through the backward pass, and through the forward pass again. Other
    networks (a teacher, a generator) and passes through parts of the model alone are not counted.
    """
    passes = Passes()

    def again(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    def back(gradient: Tensor) -> None:
        passes.backward += len(gradient)
        if gradient.requires_grad:
            gradient.register_hook(again)

    def after(module: nn.Module, inputs: object, output: Any) -> None:
        del module, inputs
        passes.forward += len(output)
        if output.requires_grad:
            output.register_hook(back)

    handles = [network.register_forward_hook(after) for network in networks_in(model).values()]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Cost:
    """What training with a method takes.

    forward, backward: passes of the network for each image of a step;  images: a step sees;  steps: an epoch has;
    preparation: passes of single images before the first step;  memory: bytes that a step takes at its peak beyond
    network and images, None where that cannot be told.
    """

    forward: float
    backward: float
    images: int
    steps: int
    preparation: int
    memory: int | None

    @property
    def epoch(self) -> float:
        """Passes of single images in an epoch, forwards and backwards."""
        return (self.forward + self.backward) * self.images * self.steps

    def passes(self, epochs: int) -> float:
        """Passes of single images in a training of so many epochs, preparation included."""
        return self.preparation + self.epoch * epochs

    def epochs_for(self, passes: float) -> int:
        """The epochs, at least 1, that come nearest to so many passes."""
        return max(1, round((passes - self.preparation) / self.epoch))


def measure(
    model: nn.Module,
    data: ImageData,
    split: Split,
    objective: Objective,
    training: Training,
    *,
    seed: int,
    folder: Path | None = None,
) -> Cost:
    """The cost of ``training`` with ``objective``, from one step in the middle of it. ``model`` is spoilt by it.

    folder: that of the training, which finds there what took long to prepare.
    The step is carried out twice: the first, not counted, makes what is made once.
    """
    with counted(model) as passes:
        setting = Setting(model, data, split, seed, training.epochs, training.batch_size, folder)
        objective = prepared(objective, setting)
    preparation = passes.total
    x, y, indices = data.x_train, data.y_train, split.training.to(data.x_train.device)
    own, again = kept_by(objective, TrainsOn), kept_by(objective, Replays)
    if own is not None:
        x, y = own.training_images()
        indices = torch.arange(len(y), device=y.device)
    batch = next(batches(x, y, indices, batch_size=training.batch_size, drop_last=True))
    replays = 1 if again is None else again.replays
    steps = replays * batch_count(len(indices), training.batch_size, True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    epoch = training.epochs // 2

    def step() -> None:
        attack = generator(seed, "attack", epoch, device=x.device)
        method = generator(seed, "method", epoch, device=x.device)
        state = State(epoch, epoch * steps, epoch / training.epochs, attack, method)
        gradients_of(objective, model, batch, state, parameters)

    model.train()
    step()
    with counted(model) as passes, _peak_memory(x.device) as memory:
        step()
    images = len(batch.y)
    return Cost(passes.forward / images, passes.backward / images, images, steps, preparation, memory[0])


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Bytes taken at most within it beyond those taken before, in a list of one when it is left."""
    result: list[int | None] = [None]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        torch.cuda.synchronize(device)
        result[0] = torch.cuda.max_memory_allocated(device) - before
        return
    with _Tensors() as tensors:
        yield result
    result[0] = tensors.peak


class _Tensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and alive; those that were there before are not counted.

    What the process has resident would be less to the point: memory that was freed is kept for later, and a system may
    page out what is idle. Room that an operation takes and gives back inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, object] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out an operation and count what it made."""
        self._meet((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._meet(result, made=True)
        return result

    def _meet(self, values: Any, *, made: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                storage = value.untyped_storage()
                if (key := storage._cdata) not in self._known:
                    size = storage.nbytes() if made else 0
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]
