"""The fast minimum-norm attack."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.gradient import input_gradient, per_image
from nas.attacks.losses import right
from nas.attacks.penalty import Found
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class FastMinimumNorm:
    """Fast minimum-norm attack (FMN): ascends the margin in a ball that shrinks to the nearest misclassified image.

    Pintor et al., NeurIPS 2021, arXiv 2102.12827, algorithm 1. While none was found, the radius is where the linearised
    margin vanishes; afterwards a misclassified iterate shrinks the ball by the factor 1 - gamma, one that is not lets
    it grow by 1 + gamma. Steps are of Euclidean length ``step_size`` (in pixel units) along the gradient; both fall by
    half a cosine. Of the misclassified iterates the nearest is kept.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 200
    step_size: float = 1.0
    final_step_size: float = 0.001
    gamma: float = 0.05
    final_gamma: float = 0.001

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"attack steps must be at least 1, not {self.steps}")
        if not 0 < self.final_step_size <= self.step_size < float("inf"):
            raise InputError(
                f"step sizes must satisfy 0 < final_step_size <= step_size, not {self.final_step_size} and "
                f"{self.step_size}"
            )
        if not 0 < self.final_gamma <= self.gamma < 1:
            raise InputError(
                f"factors must satisfy 0 < final_gamma <= gamma < 1, not {self.final_gamma} and {self.gamma}"
            )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """``nearest``, projected into the threat model; draws nothing."""
        return self.threat_model.project(self.nearest(model, x, y, generator=generator), x)

    def nearest(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The nearest misclassified images found [N, C, H, W], within the pixel bounds at whatever distance.

        A sample that is misclassified already, or for which none was found, comes back as it was.
        """
        del generator
        lower, upper, geometry = self.threat_model.lower, self.threat_model.upper, self.threat_model.geometry
        result = x.clone()
        with crafting(model):
            with torch.no_grad():
                rows = right(model(x), y).nonzero().squeeze(1)
            if len(rows) == 0:
                return result
            x, y = x[rows], y[rows]
            x_adv, found, everyone = (
                x,
                Found(x, y, self.threat_model.distance, 0.0),
                torch.arange(len(x), device=x.device),
            )
            radius = torch.zeros_like(found.sizes)
            for step in range(self.steps + 1):
                gradient, margins, logits = input_gradient(model, x_adv, y, "margin", None)
                broken = found.see(x_adv, logits, everyone)
                if step == self.steps:
                    break
                fall = (1 + math.cos(math.pi * step / self.steps)) / 2
                gamma = self.final_gamma + (self.gamma - self.final_gamma) * fall
                length = self.final_step_size + (self.step_size - self.final_step_size) * fall
                slope = (gradient * geometry.steepest(gradient)).flatten(1).sum(1).clamp_min(1e-12)
                grown = radius * (1 + gamma)
                # Where the linearised margin leads nowhere, the ball still grows.
                vanishes = geometry.size(x_adv - x) + margins.abs() / slope
                grown = torch.where(found.sizes.isinf(), torch.maximum(vanishes, grown), grown)
                radius = torch.where(broken, torch.minimum(radius * (1 - gamma), found.sizes), grown)
                # Not beyond what the pixel bounds allow, and never nothing: a ball is a ball.
                radius = radius.clamp(1e-6, float(geometry.size(torch.full_like(x[:1], upper - lower))))
                delta = x_adv + length * _euclidean(gradient) - x
                scale = per_image(radius, x)
                x_adv = (x + geometry.shrink(delta / scale, 1.0) * scale).clamp(lower, upper)
        result[rows] = found.images
        return result

    def __str__(self) -> str:
        return (
            f"FMN-{self.steps}, {self.threat_model}, steps {self.step_size:.6g} to {self.final_step_size:.6g}, "
            f"factor {self.gamma:.6g} to {self.final_gamma:.6g}"
        )


def _euclidean(gradient: Tensor) -> Tensor:
    """Of Euclidean length one."""
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / per_image(gradient.flatten(1).abs().amax(1).clamp_min(tiny), gradient)
    return scaled / per_image(scaled.flatten(1).norm(dim=1).clamp_min(tiny), gradient)


PLUGIN = FastMinimumNorm
