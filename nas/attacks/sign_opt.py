"""Sign-OPT: OPT with one query a direction."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nas.attacks.opt import descend, first_directions
from nas.attacks.queries import DecisionBased, Oracle, check_positive, normal, per_image, portions
from nas.errors import InputError
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class SignOpt(DecisionBased):
    """Sign-OPT: OPT in l_2 with the gradient estimated from the signs of its slopes, at one query each.

    Cheng et al., ICLR 2020, arXiv 1909.10773, algorithm 1: if the image as far along theta + h u as the boundary is on
    theta is misclassified, the boundary is nearer there. The estimate is the mean of the signs times u over
    ``directions`` Gaussian u of unit length; the rest is as in OPT. Signs do not tell how steep the slope is beside
    that along theta itself, which is known; other norms than l_2 would need both.
    tolerance: accuracy of the distance along a direction, as a share of it.
    """

    threat_model: ThreatModel = field(default_factory=lambda: ThreatModel("l2"))
    directions: int = 100
    h: float = 0.01
    step_size: float = 0.2
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "directions", "h", "step_size", "tolerance")
        if self.threat_model.norm != "l2":
            raise InputError(f"sign_opt minimises the l2 norm, not {self.threat_model.norm}: set norm = 'l2'")

    def _spend(self, oracle: Oracle, start: Tensor | None, generator: torch.Generator) -> None:
        rows, theta, radius = first_directions(oracle, start, generator, self.tolerance)

        def slopes(theta: Tensor, radius: Tensor, rows: Tensor) -> Tensor:
            return sign_slopes(oracle, rows, theta, radius, self.directions, self.h, generator)

        descend(oracle, rows, theta, radius, slopes, self.step_size, self.tolerance)

    def __str__(self) -> str:
        return (
            f"Sign-OPT, {self.threat_model}, {self.queries} queries, {self.directions} directions, h {self.h:.6g}, "
            f"step {self.step_size:.6g}, tolerance {self.tolerance:.6g}"
        )


def sign_slopes(
    oracle: Oracle, rows: Tensor, theta: Tensor, radius: Tensor, directions: int, h: float, generator: torch.Generator
) -> Tensor:
    """Mean [n, C, H, W] of u times the sign of the slope of the distance ``radius`` [n] along ``theta`` + h u."""
    x, threat_model = oracle.x[rows].unsqueeze(1), oracle.threat_model
    total = torch.zeros_like(theta)
    for several in portions(directions, len(rows)):
        u = normal((len(rows), several, *theta.shape[1:]), theta, generator)
        u = u / per_image(u.flatten(2).norm(dim=2), u)
        moved = theta.unsqueeze(1) + h * u
        size = threat_model.geometry.size(moved.flatten(0, 1)).view(moved.shape[:2])
        images = x + per_image(radius.unsqueeze(1) / size, u) * moved
        images = images.clamp(threat_model.lower, threat_model.upper)
        nearer = oracle.misclassified(images, rows, oracle.open(rows).unsqueeze(1).expand(moved.shape[:2]))
        total += (per_image(1 - 2 * nearer.to(theta.dtype), u) * u).sum(1)
    return total / directions


PLUGIN = SignOpt
