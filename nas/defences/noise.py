"""Gaussian noise as a defence: on the image (randomised smoothing) or before convolutions (random self-ensemble)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nas.defences.particles import mean_prediction
from nas.errors import InputError
from nas.randomness import generator

ROWS = 512
"""Images that an ensemble passes together, at most, unless it is asked about more."""


class Noise(Protocol):
    """``noise.within(model, generator)``: a context in which the passes of ``model`` are noisy."""

    def within(self, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class ImageNoise:
    """Noise of deviation ``sigma`` (pixel units of [0, 1]) on the images; they are not clipped afterwards.

    Training with it is the Gaussian augmentation of Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918, and the
    mean prediction under it the smoothed classifier that ``nas.evaluation.certification`` certifies.
    """

    sigma: float = 0.25

    def __post_init__(self) -> None:
        if not self.sigma >= 0 or math.isinf(self.sigma):
            raise InputError(f"sigma of the noise must be a number of at least 0, not {self.sigma}")

    @contextmanager
    def within(self, model: nn.Module, generator: torch.Generator) -> Iterator[None]:
        """Passes within it see noisy images."""
        with _noisy({model: self.sigma}, generator):
            yield

    def __str__(self) -> str:
        return f"noise {self.sigma:g} on the image"


@dataclass(frozen=True)
class LayerNoise:
    """Noise before every 2-D convolution: of deviation ``first`` before the first one, ``inner`` before the others.

    Random self-ensemble (Liu, Cheng, Zhang & Hsieh, ECCV 2018, arXiv 1712.00673), which trains with the noise and
    averages predictions over it; the defaults are its setting for CIFAR-10, for MNIST it is 0.8 and 0.4. In units of
    what the convolutions see: that is, of normalised images before the first. First is the convolution registered
    first.
    """

    first: float = 0.2
    inner: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("inner", self.inner)):
            if not value >= 0 or math.isinf(value):
                raise InputError(f"'{name}' deviation of the noise must be a number of at least 0, not {value}")

    @contextmanager
    def within(self, model: nn.Module, generator: torch.Generator) -> Iterator[None]:
        """Passes within it are noisy. Raises ``InputError`` for a network without convolutions."""
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        if not convolutions:
            raise InputError("noise before every convolution needs a network with convolutions: use noise on the image")
        deviations: dict[nn.Module, float] = dict.fromkeys(convolutions, self.inner)
        deviations[convolutions[0]] = self.first
        with _noisy(deviations, generator):
            yield

    def __str__(self) -> str:
        return f"noise {self.first:g} before the first convolution, {self.inner:g} before the others"


class NoiseEnsemble(nn.Module):
    """A network whose prediction is averaged over ``draws`` of ``noise``: [N, C, H, W] to log mean softmax [N, K].

    In train mode it is the network alone: what noise it is trained with, and how, is up to the training method.

    In eval mode every call draws afresh, from streams that derive from ``seed``, ``stretch`` and the number of calls so
    far (``nas.prediction.begin`` sets both), so that the global random state plays no part. Gradients are those of
    the mean over the draws made: an attack on it averages over the noise (EOT) by itself, over as many draws as the
    ensemble has.
    """

    def __init__(self, network: nn.Module, noise: Noise, draws: int = 10, seed: int = 0) -> None:
        super().__init__()
        if draws < 1:
            raise InputError(f"an ensemble needs at least 1 draw of its noise, not {draws}")
        self.network, self.noise, self.draws, self.seed = network, noise, draws, seed
        self.stretch, self.calls = 0, 0
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            logits: Tensor = self.network(x)
            return logits
        stream = generator(self.seed, "noise ensemble", self.stretch, self.calls, device=x.device)
        self.calls += 1
        with self.noise.within(self.network, stream):
            return mean_prediction(torch.cat([self._drawn(x, number) for number in self._together(len(x))]))

    def _drawn(self, x: Tensor, number: int) -> Tensor:
        """Logarithms of the probabilities under ``number`` draws: [number, N, K]."""
        together: Tensor = self.network(x.repeat(number, 1, 1, 1))
        return together.log_softmax(1).unflatten(0, (number, len(x)))

    def _together(self, images: int) -> list[int]:
        """The draws, shared out among passes of about ``ROWS`` images: small passes cost more by the image."""
        most = max(1, ROWS // max(images, 1))
        return [min(most, self.draws - done) for done in range(0, self.draws, most)]


@contextmanager
def _noisy(deviations: dict[nn.Module, float], generator: torch.Generator) -> Iterator[None]:
    """Within it, each of these modules sees its input plus Gaussian noise of its deviation."""

    def hook(deviation: float) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            del module
            x, *others = inputs
            normal = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            return (x + deviation * normal, *others)

        return add

    handles = [module.register_forward_pre_hook(hook(value)) for module, value in deviations.items() if value]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
