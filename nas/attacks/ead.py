"""The elastic-net attack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nas.attacks.penalty import Found, Progress, nearest_by_weight, shortfall
from nas.errors import InputError
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class ElasticNet:
    """Elastic-net attack (EAD): the smallest beta |delta|_1 + |delta|_2^2 that is misclassified, by FISTA.

    Chen et al., AAAI 2018, arXiv 1709.04114, section 4: c h + beta |delta|_1 + |delta|_2^2 with the penalty h of
    Carlini and Wagner; every step of gradient descent on the smooth part, at a point extrapolated from the last two, is
    followed by soft thresholding of the change at beta, within the pixel bounds; step sizes fall with the root of the
    steps left. c is found by bisection. With beta = 0 it is the l_2 attack of Carlini and Wagner without tanh.

    rule: which misclassified iterate counts as the nearest, by the elastic net ("en") or by |delta|_1 ("l1"),
    whatever the norm of the threat model, into which the result is projected.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 200
    searches: int = 9
    learning_rate: float = 0.02
    beta: float = 0.01
    weight: float = 0.1
    confidence: float = 0.0
    rule: Literal["en", "l1"] = "en"

    def __post_init__(self) -> None:
        for name, count in (("steps", self.steps), ("searches", self.searches)):
            if count < 1:
                raise InputError(f"attack {name} must be at least 1, not {count}")
        for name, value in (("learning_rate", self.learning_rate), ("weight", self.weight)):
            if not 0 < value < float("inf"):
                raise InputError(f"{name} must be a number above 0, not {value}")
        for name, value in (("beta", self.beta), ("confidence", self.confidence)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} must be a number of at least 0, not {value}")
        if self.rule not in ("en", "l1"):
            raise InputError(f"the rule must be 'en' or 'l1', not '{self.rule}'")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """``nearest``, projected into the threat model; draws nothing."""
        return self.threat_model.project(self.nearest(model, x, y, generator=generator), x)

    def nearest(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The nearest misclassified images found [N, C, H, W] by the rule, within the pixel bounds at any distance.

        A sample that is misclassified already, or for which none was found, comes back as it was.
        """
        del generator
        found = Found(x, y, self._size, self.confidence)

        def minimise(found: Found, rows: Tensor, weights: Tensor) -> Tensor:
            return self._minimise(model, found, rows, weights)

        return nearest_by_weight(model, x, y, minimise, found, self.searches, self.weight)

    def _size(self, images: Tensor, x: Tensor) -> Tensor:
        delta = (images - x).flatten(1)
        absolute = delta.abs().sum(1)
        return absolute if self.rule == "l1" else self.beta * absolute + delta.square().sum(1)

    def _minimise(self, model: nn.Module, found: Found, rows: Tensor, weights: Tensor) -> Tensor:
        """FISTA on the images ``rows`` with one weight each: which were broken."""
        lower, upper = self.threat_model.lower, self.threat_model.upper
        broken = torch.zeros_like(rows, dtype=torch.bool)
        places, x, y = torch.arange(len(rows), device=rows.device), found.x[rows], found.y[rows]
        images, ahead, progress = x, x, Progress(found.sizes[rows], self.steps)
        for step in range(self.steps):
            with torch.enable_grad():
                point = ahead.detach().requires_grad_(True)
                logits = model(point)
                losses = weights * shortfall(logits, y, self.confidence)
                (gradient,) = torch.autograd.grad(losses.sum(), point)
            delta = (ahead - x).flatten(1)
            values = losses.detach() + delta.square().sum(1) + self.beta * delta.abs().sum(1)
            rate = self.learning_rate * (1 - step / self.steps) ** 0.5
            moved = ahead - rate * (gradient + 2 * (ahead - x))
            last, images = images, self._thresholded(moved, x).clamp(lower, upper)
            with torch.no_grad():
                broken[places] |= found.see(images, model(images), rows[places])
            ahead = images + step / (step + 3) * (images - last)
            left = ~progress.at_rest(step, values, found.sizes[rows[places]])
            if not bool(left.all()):
                progress.keep(left)
                places, x, y, weights = places[left], x[left], y[left], weights[left]
                images, ahead = images[left], ahead[left]
                if len(places) == 0:
                    break
        return broken

    def _thresholded(self, images: Tensor, x: Tensor) -> Tensor:
        delta = images - x
        return x + delta.sign() * (delta.abs() - self.beta).clamp_min(0)

    def __str__(self) -> str:
        return (
            f"EAD, {self.threat_model}, {self.searches} x {self.steps} steps of {self.learning_rate:.6g}, "
            f"c from {self.weight:.6g}, beta {self.beta:.6g}, rule {self.rule}, confidence {self.confidence:.6g}"
        )


PLUGIN = ElasticNet
