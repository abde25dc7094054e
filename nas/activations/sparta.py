"""Spatially attentive activation: a gate that looks at a neighbourhood decides how much of each value passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.activations.activation import Placed
from nas.activations.prelu import along
from nas.errors import InputError

Kind = Literal["dw", "dw-pw", "shared", "pool", "pointwise"]
KINDS: tuple[Kind, ...] = ("dw", "dw-pw", "shared", "pool", "pointwise")


@dataclass(frozen=True)
class Sparta:
    """Spatially attentive activation: x sigmoid(g(x)), g a small convolution with parameters of its own (phi).

    Reconstruction after Guo et al., arXiv 2105.08269, of which the abstract alone was read: the form of g and all
    defaults are inferred.  g(x) = beta x + b + S(x) per channel, S by ``kind``: "dw" a depthwise convolution of
    ``kernel``; "dw-pw" a depthwise one, then 1x1 ones to C / reduction channels and back; "shared" one kernel, beta and
    b for all channels; "pool" a 3x3 average, then 1x1; "pointwise" a sum of kernel^2 tanh(x - c_j) per channel, which
    has as many parameters as "dw" and sees no neighbour: SiLU with matched capacity, for comparison.
    gate: "soft" as above; "relu" ReLU(x) 2 sigmoid(g(x)). S is 0 at first, so that training begins with SiLU, or ReLU.
    beta: its initial value, or 0 for the default: 1 for "soft"; a gate "relu" always begins with 0.
    share: one set of parameters per "stage" (or kind of cell) and width, "shared" per stage alone; or one per "place".
    """

    kind: str = "dw"
    kernel: int = 3
    gate: str = "soft"
    reduction: int = 8
    beta: float = 0.0
    share: str = "stage"

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("gate", ("soft", "relu")), ("share", ("stage", "place"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} of sparta must be one of {', '.join(known)}, not '{getattr(self, name)}'")
        if self.kernel not in range(1, 16, 2):
            raise InputError(f"kernel of sparta must be odd, from 1 to 15, not {self.kernel}")
        if not 1 <= self.reduction <= 4096:
            raise InputError(f"reduction of sparta must be from 1 to 4096, not {self.reduction}")
        if not 0 <= self.beta <= 1e3 or (self.beta and self.gate == "relu"):
            raise InputError(
                f"beta of sparta must be from 0 (default) to 1000, and 0 with gate 'relu', not {self.beta}"
            )

    @property
    def first(self) -> int:
        """All places."""
        return 0

    def module(self, channels: int) -> nn.Module:
        """A gate for ``channels`` channels."""
        return Gate(self, channels)

    def key(self, group: str, channels: int) -> str | None:
        """The stage and, but for kind "shared", the width."""
        if self.share == "place":
            return None
        return group if self.kind == "shared" else f"{group}-{channels}"


class Gate(Placed):
    """x sigmoid(g(x)) of maps [N, C, H, W], of vectors [N, C] as maps of one pixel, and of tokens [N, T, C].

    T tokens are a square map, read row by row; with one more, the first is a class token, a map of one pixel.
    """

    centres: Tensor

    def __init__(self, settings: Sparta, channels: int) -> None:
        super().__init__()
        self.kind, self.rectified, self.size = settings.kind, settings.gate == "relu", settings.kernel
        own = 1 if self.kind == "shared" else channels
        beta = 0.0 if self.rectified else settings.beta or 1.0
        self.beta = nn.Parameter(torch.full((own,), beta))
        self.bias = nn.Parameter(torch.zeros(own))
        area = self.size**2
        if self.kind in ("dw", "shared"):
            self.weight = nn.Parameter(torch.zeros(own, 1, self.size, self.size))
        elif self.kind == "dw-pw":
            # Only the last of three linear maps is 0: it has a gradient, and gives the others one.
            narrow = max(1, channels // settings.reduction)
            self.weight = nn.Parameter(torch.full((channels, 1, self.size, self.size), 1 / area))
            self.narrow = nn.Parameter(torch.randn(narrow, channels, 1, 1) / math.sqrt(channels))
            self.wide = nn.Parameter(torch.zeros(channels, narrow, 1, 1))
        elif self.kind == "pool":
            self.weight = nn.Parameter(torch.zeros(channels, channels, 1, 1))
        else:
            self.weight = nn.Parameter(torch.zeros(channels, area))
            self.register_buffer("centres", torch.linspace(-3, 3, area), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self._passed(x[:, :, None, None])[:, :, 0, 0]
        if x.dim() == 3:
            return self._tokens(x)
        return self._passed(x)

    def attention(self, x: Tensor) -> Tensor:
        """A = sigmoid(g(x)) in (0, 1) of maps [N, C, H, W]."""
        shape = along(x)
        return torch.sigmoid(self.beta.view(shape) * x + self.bias.view(shape) + self._around(x))

    def _passed(self, x: Tensor) -> Tensor:
        gate = self.attention(x)
        return x.clamp_min(0) * (2 * gate) if self.rectified else x * gate

    def _around(self, x: Tensor) -> Tensor:
        """S(x) [N, C, H, W]."""
        if self.kind == "dw":
            return F.conv2d(x, self.weight, None, 1, self.size // 2, groups=x.shape[1])
        if self.kind == "shared":
            weight = self.weight.expand(x.shape[1], -1, -1, -1)
            return F.conv2d(x, weight, None, 1, self.size // 2, groups=x.shape[1])
        if self.kind == "dw-pw":
            y = F.conv2d(x, self.weight, None, 1, self.size // 2, groups=x.shape[1])
            return F.conv2d(F.conv2d(y, self.narrow), self.wide)
        if self.kind == "pool":
            return F.conv2d(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), self.weight)
        y = torch.zeros_like(x)
        for weight, centre in zip(self.weight.unbind(1), self.centres, strict=True):
            y = y + weight.view(along(x)) * torch.tanh(x - centre)
        return y

    def _tokens(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        alone = 0 if math.isqrt(count) ** 2 == count else 1
        side = math.isqrt(count - alone)
        if side**2 != count - alone:
            raise InputError(
                f"sparta takes tokens for a square map, with or without a class token, not {count} of them"
            )
        maps = x[:, alone:].transpose(1, 2).unflatten(2, (side, side))
        y = self._passed(maps).flatten(2).transpose(1, 2)
        if not alone:
            return y
        first = self._passed(x[:, 0, :, None, None])[:, :, 0, 0]
        return torch.cat([first[:, None], y], 1)


SATURATED = 1e-3
"""Mean of A (1 - A) below which gates pass too little gradient for attacks that rely on it."""


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of a network, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gate)}


@contextmanager
def openness(model: nn.Module) -> Iterator[dict[str, float]]:
    """Within it, passes of ``model`` leave the mean of A (1 - A) of each gate in the dictionary; 1/4 at most.

    The least of its calls where a gate is called several times.
    """
    found: dict[str, float] = {}

    def watch(name: str, gate: Gate) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            maps = x.reshape(-1, x.shape[-1], 1, 1) if x.dim() == 3 else x if x.dim() == 4 else x[:, :, None, None]
            attention = gate.attention(maps)
            found[name] = min(found.get(name, 1.0), float((attention * (1 - attention)).mean()))

        return gate.register_forward_pre_hook(look)

    handles = [watch(name, gate) for name, gate in gates(model).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


PLUGIN = Sparta
