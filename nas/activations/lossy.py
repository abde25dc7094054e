"""Activations that lose information on purpose: small changes of what comes in change nothing of what goes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nas.activations.annealing import Annealed
from nas.errors import InputError, nearest

KINDS = ("clip-quant", "dead-zone", "binary", "sigmoid-steep", "topk")
Backward = Literal["straight-through", "identity", "sigmoid", "true", "relu"]
BACKWARDS: tuple[Backward, ...] = ("straight-through", "identity", "sigmoid", "true", "relu")


@dataclass(frozen=True)
class Lossy:
    """Lossy compression of hidden features: a many-to-one map that swallows small perturbations. Masks gradients.

    Reconstruction after Shen et al., arXiv 2011.14045, of which the abstract alone was read. With c = clip(z, 0, u), by
    ``kind``: "clip-quant" D round(c / D), D = u / levels; "dead-zone" clip(z - t, 0, u), 0 below t; "binary" 1 where
    z > t; "sigmoid-steep" u sigmoid(b (z - t)), b = steepness; "topk" the share ``keep`` of the largest positive values
    of an image in a layer (k-winners-take-all, Xiao et al., arXiv 1905.10510). t = threshold u.
    bound: u, or 0 for the 99th percentile of max(z, 0), which is followed while the activation hardens and then stays;
    learned: u is trained instead (PACT, Choi et al., arXiv 1805.06085), from ``bound`` or that of the normal
    distribution.
    first: so many layers, counted from the image, have it and the others their rectifier; 0 for all.
    Over the first half of training it hardens from a rectifier (``nas.activations.annealing``). Backwards, the gradient
    goes straight through: 1 inside [0, u], 0 outside; ``backward`` exchanges that for attacks (``nas.attacks.bpda``).
    """

    kind: str = "clip-quant"
    levels: int = 8
    threshold: float = 0.0
    steepness: float = 50.0
    keep: float = 0.2
    bound: float = 0.0
    learned: bool = False
    first: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown kind '{self.kind[:40]}' of a lossy activation: {nearest(self.kind, KINDS)}")
        if not 1 <= self.levels <= 65536:
            raise InputError(f"levels of a lossy activation must be from 1 to 65536, not {self.levels}")
        if not 0 <= self.threshold < 1:
            raise InputError(f"threshold is a share of u of at least 0 and below 1, not {self.threshold}")
        if not 1 <= self.steepness <= 1e4:
            raise InputError(f"steepness must be from 1 to 10000, not {self.steepness}")
        if not 0 < self.keep <= 1:
            raise InputError(f"keep is a share above 0 and at most 1, not {self.keep}")
        if not 0 <= self.bound <= 1e6:
            raise InputError(f"bound must be from 0 (found from the data) to 1e6, not {self.bound}")
        if not 0 <= self.first <= 10000:
            raise InputError(f"first must be from 0 (all layers) to 10000, not {self.first}")

    def module(self, channels: int) -> nn.Module:
        """The same for any number of channels."""
        del channels
        return LossyMap(self)

    def key(self, group: str, channels: int) -> str | None:
        """None: u belongs to the layer."""
        del group, channels
        return None


TYPICAL = 2.33
"""99th percentile of a standard normal distribution, which normalised features begin with."""

FOLLOWS = 0.1
"""Share of the way to the percentile of a batch that u goes at each step, as statistics of batch normalisation do."""

SAMPLE = 1_000_000
"""Values that a percentile is taken of at most."""


class LossyMap(Annealed):
    """The activation ``Lossy`` of one layer: any shape [N, ...] to the same.

    gradient: what its derivative is taken for, see ``backward``.
    """

    bound: Tensor

    def __init__(self, settings: Lossy) -> None:
        super().__init__()
        self.settings = settings
        bound = torch.tensor(settings.bound or TYPICAL)
        if settings.learned:
            self.bound = nn.Parameter(bound)
        else:
            self.register_buffer("bound", bound)
        self.gradient: Backward = "straight-through"

    @property
    def piecewise_constant(self) -> bool:
        """Whether its true derivative is 0 wherever there is one."""
        return self.settings.kind in ("clip-quant", "binary")

    @property
    def u(self) -> Tensor:
        """The bound in force, above 0."""
        return self.bound.clamp_min(1e-3)

    def forward(self, z: Tensor) -> Tensor:
        if self.gradient == "relu":
            return z.clamp_min(0)
        if self.training and not self.settings.learned and not self.settings.bound:
            self._follow(z)
        own = self.gradient == "true" or (self.gradient == "straight-through" and not self.piecewise_constant)
        if own or not torch.is_grad_enabled():
            return self.value(z)
        y: Tensor = _Instead.apply(self.value(z).detach(), self._surrogate(z))  # type: ignore[no-untyped-call]
        return y

    def value(self, z: Tensor) -> Tensor:
        """What goes out, with the derivative that it truly has."""
        settings, u, level = self.settings, self.u, self.level
        clipped = torch.minimum(z.clamp_min(0), u)
        t = settings.threshold * u
        if settings.kind == "clip-quant":
            cell = level * u / settings.levels
            rounded = cell * torch.round(clipped / cell.clamp_min(1e-12))
            return torch.where(cell > 0, rounded, clipped)
        if settings.kind == "dead-zone":
            return torch.minimum((z - level * t).clamp_min(0), u)
        if settings.kind == "binary":
            # Above t, however little, and not at t; unlike a comparison it has a derivative, which is 0.
            return (1 - level) * clipped + level * torch.ceil((z - t).clamp(0, 1))
        if settings.kind == "sigmoid-steep":
            return u * torch.sigmoid(settings.steepness**level * (z - t))
        positive = z.clamp_min(0)
        values = positive.flatten(1)
        share = 1 - level * (1 - settings.keep)
        last = (torch.ceil(values.shape[1] * share).long() - 1).clamp_min(0)
        least = values.detach().sort(1, descending=True).values.index_select(1, last.view(1))
        return torch.where(values >= least, values, 0).view_as(z)

    def margin(self, z: Tensor) -> Tensor:
        """How far each value of ``z`` is from the next place where the output jumps ("clip-quant" and "binary").

        As long as no value moves further, the output is the same to the bit.
        """
        if not self.piecewise_constant or float(self.level) < 1:
            raise InputError(f"kind '{self.settings.kind}' at level {float(self.level):g} does not jump: no margin")
        if self.settings.kind == "binary":
            return (z - self.settings.threshold * self.u).abs()
        cell = self.u / self.settings.levels
        # Jumps at D/2, 3D/2, ..., u - D/2.
        nearest = (torch.floor(z / cell).clamp(0, self.settings.levels - 1) + 0.5) * cell
        return (z - nearest).abs()

    def _surrogate(self, z: Tensor) -> Tensor:
        """A function whose derivative stands for that of ``value``."""
        u, t = self.u, self.settings.threshold * self.u
        height = 1 / u.detach() if self.settings.kind == "binary" else torch.ones_like(u)
        if self.gradient == "identity":
            return z * height
        if self.gradient == "sigmoid":
            if self.settings.kind == "clip-quant":
                # Stairs with rounded edges: inside a cell a sigmoid from one step to the next.
                cell = (u / self.settings.levels).detach()
                place = torch.minimum(z.clamp_min(0), u) / cell
                base = torch.floor(place.detach())
                return cell * (base + torch.sigmoid(4 * (place - base - 0.5)))
            return u * height * torch.sigmoid(4 * (z - t) / u.detach())
        return z.clamp(torch.zeros_like(u), u) * height

    def _follow(self, z: Tensor) -> None:
        with torch.no_grad():
            values = z.detach().reshape(-1)
            values = values[:: max(1, -(-values.numel() // SAMPLE))].clamp_min(0)
            if values.is_meta:
                return
            high = torch.quantile(values.float(), 0.99).to(self.bound.dtype)
            self.bound.copy_(torch.where(self.level < 1, torch.lerp(self.bound, high, FOLLOWS), self.bound))


class _Instead(torch.autograd.Function):
    """The first argument forwards, the second backwards."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        del ctx, surrogate
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        del ctx
        return None, gradients[0]


def lossy_maps(model: nn.Module) -> list[LossyMap]:
    """The lossy activations of a network."""
    return [module for module in model.modules() if isinstance(module, LossyMap)]


@contextmanager
def backward(model: nn.Module, gradient: Backward) -> Iterator[None]:
    """Within it the derivative of lossy activations is taken for another (BPDA, arXiv 1802.00420, section 4.1).

    "straight-through": 1 inside [0, u], 0 outside; "identity": 1 everywhere; "sigmoid": that of a smooth function of
    the same shape; "true": what it is, 0 almost everywhere for piecewise constant kinds; "relu": the network with
    rectifiers in their place, forwards too: what is found there has to transfer.
    """
    maps = lossy_maps(model)
    before = [module.gradient for module in maps]
    for module in maps:
        module.gradient = gradient
    try:
        yield
    finally:
        for module, old in zip(maps, before, strict=True):
            module.gradient = old


def stable_share(model: nn.Module, x: Tensor, margin: float) -> float:
    """The share of hidden values for images ``x`` that are further than ``margin`` from the next jump."""
    counts: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, LossyMap)
        counts.append((module.margin(inputs[0]) > margin).double().mean())

    handles = [module.register_forward_pre_hook(look) for module in lossy_maps(model) if module.piecewise_constant]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not counts:
        raise InputError("the network has no piecewise constant activation: no margin to speak of")
    return float(torch.stack(counts).mean())


PLUGIN = Lossy
