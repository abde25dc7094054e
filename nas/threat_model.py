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

    def project(self, x_adv: Tensor, x: Tensor, epsilon: float, lower: float, upper: float) -> Tensor:
        """Images of the ball around ``x`` and within the pixel bounds, near ``x_adv``."""
        ...

    def edge(self, like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        """Random perturbations of size ``epsilon``; drawn on the generator's device."""
        ...

    def dual(self, gradient: Tensor) -> Tensor:
        """How much a loss with this gradient rises at most along a perturbation of size 1: [N]."""
        ...

    def onto_plane(self, x: Tensor, normal: Tensor, height: Tensor, lower: float, upper: float) -> Tensor:
        """The smallest perturbations d with <normal, d> = -``height`` [N] that keep ``x`` within the pixel bounds.

        Where there is none, the one that comes nearest to it. Algorithm of section 3 of arXiv 1907.02044 (FAB).
        """
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

    def project(self, x_adv: Tensor, x: Tensor, epsilon: float, lower: float, upper: float) -> Tensor:
        """The nearest image."""
        return (x + self.shrink(x_adv - x, epsilon)).clamp(lower, upper)

    def edge(self, like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        cube = torch.rand(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
        return _scaled(2 * cube - 1, self, epsilon)

    def dual(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1).abs().sum(1)

    def onto_plane(self, x: Tensor, normal: Tensor, height: Tensor, lower: float, upper: float) -> Tensor:
        # Every pixel moves by the same amount, or as far as it can.
        weight, amount, sign, room = _plane(x, normal, height, lower, upper)
        move = _level(weight, room, amount).unsqueeze(1).minimum(room)
        return (sign * move).view_as(x)


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

    def project(self, x_adv: Tensor, x: Tensor, epsilon: float, lower: float, upper: float) -> Tensor:
        """Shrunk into the ball, then clipped: not always the nearest image."""
        return (x + self.shrink(x_adv - x, epsilon)).clamp(lower, upper)

    def edge(self, like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        return _scaled(_normal(like, generator), self, epsilon)

    def dual(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1).norm(dim=1)

    def onto_plane(self, x: Tensor, normal: Tensor, height: Tensor, lower: float, upper: float) -> Tensor:
        # Every pixel moves in proportion to its weight, or as far as it can.
        weight, amount, sign, room = _plane(x, normal, height, lower, upper)
        square = weight.square()
        level = _level(square, torch.where(square > 0, room / weight, 0.0), amount).unsqueeze(1)
        return (sign * (level * weight).minimum(room)).view_as(x)


class L1:
    """Sum of the changes of all pixels."""

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().sum(1, dtype=torch.float64).to(delta.dtype)

    def shrink(self, delta: Tensor, epsilon: float) -> Tensor:
        return _nearest_in_l1(delta, None, epsilon)

    def steepest(self, gradient: Tensor) -> Tensor:
        # The dual norm is the largest entry: the whole step goes to one pixel.
        flat = gradient.flatten(1)
        place = flat.abs().argmax(1, keepdim=True)
        direction = torch.zeros_like(flat).scatter_(1, place, flat.gather(1, place).sign())
        return direction.view_as(gradient)

    def draw(self, like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        # Independent Laplace variables over the sum of their sizes are uniform on the surface of the ball.
        sizes = torch.empty(like.shape, device=like.device, dtype=like.dtype).exponential_(generator=generator)
        signs = (_uniform(like.shape, like, generator) < 0.5).to(like.dtype) * 2 - 1
        radius = _uniform((like.shape[0],), like, generator) ** (1 / like[0].numel())
        return sizes * signs * _per_image(radius * epsilon / sizes.flatten(1).sum(1), like)

    def project(self, x_adv: Tensor, x: Tensor, epsilon: float, lower: float, upper: float) -> Tensor:
        """The nearest image; clipping what was shrunk would leave much of epsilon unused on pixels at the bounds.

        Croce and Hein, "Mind the box", ICML 2021, arXiv 2103.01208, section 3.1.
        """
        delta = x_adv - x
        room = torch.where(delta > 0, upper - x, x - lower)
        return (x + _nearest_in_l1(delta, room, epsilon)).clamp(lower, upper)

    def edge(self, like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        return _scaled(_normal(like, generator), self, epsilon)

    def dual(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1).abs().amax(1)

    def onto_plane(self, x: Tensor, normal: Tensor, height: Tensor, lower: float, upper: float) -> Tensor:
        # Pixels of the largest weights move as far as they can until it is enough.
        weight, amount, sign, room = _plane(x, normal, height, lower, upper)
        heavy, order = weight.sort(1, descending=True)
        room = room.gather(1, order)
        before = (heavy * room).cumsum(1) - heavy * room
        left = (amount.unsqueeze(1) - before).clamp_min(0)
        move = torch.where(heavy > 0, (left / heavy).minimum(room), 0.0)
        return (sign * torch.zeros_like(move).scatter(1, order, move)).view_as(x)


NORMS: dict[str, Norm] = {"linf": LInf(), "l2": L2(), "l1": L1()}


@dataclass(frozen=True)
class ThreatModel:
    """Perturbations of at most ``epsilon`` in ``norm`` that keep pixels in [lower, upper].

    norm: "linf", "l2" or "l1";  epsilon in pixel units of [0, 1], e.g. 8/255.
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
        return self.geometry.project(x_adv, x, self.epsilon, self.lower, self.upper)

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


def _nearest_in_l1(delta: Tensor, room: Tensor | None, epsilon: float) -> Tensor:
    """The nearest perturbations [N, ...] whose entries sum to at most ``epsilon`` and are at most ``room`` in size.

    They are sign(delta) clamp(|delta| - t, 0, room). Their sum falls with t, linearly between the values |delta| and
    |delta| - room of t, at which it is added up; t is found between two of them.
    """
    epsilon = epsilon * (1 - 8 * torch.finfo(delta.dtype).eps)  # what rounding adds stays inside
    size = delta.flatten(1).abs().double()
    bound = torch.full_like(size, torch.inf) if room is None else room.flatten(1).double()
    needs = size.minimum(bound).sum(1) > epsilon
    threshold = torch.zeros(len(size), 1, device=size.device, dtype=size.dtype)
    if bool(needs.any()):
        threshold[needs] = _threshold(size[needs], None if room is None else bound[needs], epsilon)
    nearest = (size - threshold).clamp_min(0).minimum(bound)
    return (nearest.view_as(delta) * delta.sign()).to(delta.dtype)


def _threshold(size: Tensor, bound: Tensor | None, epsilon: float) -> Tensor:
    """t [N, 1] where sum of clamp(size - t, 0, bound) is ``epsilon``, which it exceeds at t = 0. size: [N, D]."""
    places, slopes = size, torch.ones_like(size)
    if bound is not None:
        places = torch.cat([size, (size - bound).clamp_min(0)], 1)
        slopes = torch.cat([slopes, -slopes], 1)
    places, order = places.sort(1, descending=True)
    slopes = slopes.gather(1, order).cumsum(1)  # pixels between the two bounds, for t below each place
    below = torch.cat([places[:, 1:], torch.zeros_like(places[:, :1])], 1)
    sums = (slopes * (places - below)).cumsum(1)  # at t = below
    last = (sums < epsilon).sum(1, keepdim=True).clamp_max(places.shape[1] - 1)
    return (below.gather(1, last) + (sums.gather(1, last) - epsilon) / slopes.gather(1, last)).clamp_min(0)


def _scaled(noise: Tensor, norm: Norm, epsilon: float) -> Tensor:
    return noise * _per_image(epsilon / norm.size(noise).clamp_min(torch.finfo(noise.dtype).tiny), noise)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return drawn.to(like.device)


def _plane(
    x: Tensor, normal: Tensor, height: Tensor, lower: float, upper: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The way to a plane, pixel by pixel: weights [N, D], what they have to add up to [N], directions, room."""
    flat, normal = x.flatten(1), normal.flatten(1)
    normal = torch.where((height >= 0).unsqueeze(1), normal, -normal)
    # Scaled first: squares of very small or large gradients leave the range of the type.
    scale = normal.abs().amax(1).clamp_min(torch.finfo(normal.dtype).tiny)
    room = torch.where(normal > 0, flat - lower, upper - flat).clamp_min(0)
    return normal.abs() / scale.unsqueeze(1), height.abs() / scale, -normal.sign(), room


def _level(weight: Tensor, room: Tensor, amount: Tensor) -> Tensor:
    """The level t [N] with sum of weight min(t, room) = ``amount``; where that cannot be reached, the largest room.

    The sum is concave in t: Newton's steps rise to the solution and end, as each passes at least one room.
    """
    reachable = amount < (weight * room).sum(1)
    level = torch.zeros_like(amount)
    open_ = weight
    for _ in range(weight.shape[1]):
        filled = ((weight - open_) * room).sum(1)
        level = torch.where(reachable, (amount - filled) / open_.sum(1), level)
        below = torch.where(room > level.unsqueeze(1), weight, 0.0)
        if torch.equal(below, open_):
            break
        open_ = below
    return torch.where(reachable, level, room.amax(1))
