"""ThreatModel: what an attacker may do to an image, and the geometry of that set.

A norm is a value: attacks ask the threat model to project, to start and for the steepest direction, and never
ask which norm it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nas.errors import InputError, nearest


class Norm(Protocol):
    """Geometry of balls ||delta|| <= epsilon around each image of a batch; delta: [N, ...]."""

    def size(self, delta: Tensor) -> Tensor:
        """Norm of each perturbation: [N]."""
        ...

    def shrink(self, delta: Tensor, epsilon: float) -> Tensor:
        """The nearest perturbations of size at most ``epsilon``."""
        ...

    def steepest(self, gradient: Tensor) -> Tensor:
        """Directions of unit size along which a loss with this gradient rises fastest; 0 where it is 0."""
        ...

    def draw(self, like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        """Perturbations drawn uniformly from the ball."""
        ...


class LInf:
    """Largest change of a pixel."""

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().amax(1)

    def shrink(self, delta: Tensor, epsilon: float) -> Tensor:
        return delta.clamp(-epsilon, epsilon)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def draw(self, like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        return (2 * _uniform(like.shape, like, generator) - 1) * epsilon


class L2:
    """Euclidean length of the change."""

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).norm(dim=1)

    def shrink(self, delta: Tensor, epsilon: float) -> Tensor:
        size = self.size(delta).clamp_min(torch.finfo(delta.dtype).tiny)
        return delta * _per_image((epsilon / size).clamp_max(1.0), delta)

    def steepest(self, gradient: Tensor) -> Tensor:
        # Scaled first: squares of very small or large gradients (saturated logits) leave the range of the type.
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / _per_image(gradient.flatten(1).abs().amax(1).clamp_min(tiny), gradient)
        return scaled / _per_image(scaled.flatten(1).norm(dim=1).clamp_min(tiny), gradient)

    def draw(self, like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        normal = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        radius = _uniform((like.shape[0],), like, generator) ** (1 / like[0].numel())
        return self.steepest(normal) * _per_image(radius * epsilon, like)


NORMS: dict[str, Norm] = {"linf": LInf(), "l2": L2()}


@dataclass(frozen=True)
class ThreatModel:
    """Perturbations of at most ``epsilon`` in ``norm`` that keep pixels in [lower, upper].

    norm: "linf" or "l2";  epsilon in pixel units of [0, 1], e.g. 8/255.
    """

    norm: str = "linf"
    epsilon: float = 8 / 255
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise InputError(f"unknown norm '{self.norm}': {nearest(self.norm, NORMS)}")
        if not 0 <= self.epsilon < float("inf"):
            raise InputError(f"epsilon must be a number of at least 0, not {self.epsilon}")
        if not self.lower < self.upper:
            raise InputError(f"pixel bounds must satisfy lower < upper, not [{self.lower}, {self.upper}]")

    @property
    def geometry(self) -> Norm:
        """The geometry of the norm."""
        return NORMS[self.norm]

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``x_adv`` brought back into the ball around ``x`` and into the pixel bounds."""
        return (x + self.geometry.shrink(x_adv - x, self.epsilon)).clamp(self.lower, self.upper)

    def random_start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images drawn uniformly from the ball around ``x``, clipped to the pixel bounds."""
        return (x + self.geometry.draw(x, self.epsilon, generator)).clamp(self.lower, self.upper)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Size of each perturbation: [N]."""
        return self.geometry.size(x_adv - x)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which images [N] lie in the ball around ``x`` and within the pixel bounds, up to rounding (1e-6)."""
        flat = x_adv.flatten(1)
        in_bounds = (flat.amin(1) >= self.lower - 1e-6) & (flat.amax(1) <= self.upper + 1e-6)
        return in_bounds & (self.distance(x_adv, x) <= self.epsilon + 1e-6)

    def __str__(self) -> str:
        return f"{self.norm} {self.epsilon:.6g}"


def _uniform(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
