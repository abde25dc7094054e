"""The boundary attack."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nas.attacks.queries import DecisionBased, Oracle, check_positive, normal, per_image, started, to_boundary
from nas.errors import InputError
from nas.threat_model import ThreatModel

CONVERGED = 1e-6
"""Where a step towards the image, as a share of the distance, is as small as this, a sample is done."""


@dataclass(frozen=True)
class Boundary(DecisionBased):
    """Boundary attack: a random walk along the decision boundary towards the image, in l_2.

    Brendel, Rauber & Bethge, ICLR 2018, arXiv 1712.04248, section 2. A candidate is the image moved by a Gaussian of
    length ``spherical_step`` times the distance, at right angles to the way to the clean image, back on the sphere
    around that, then nearer by ``source_step`` times the distance; it is taken if misclassified. Every fifth step also
    asks about the point on the sphere. Both steps are adapted, for each sample: the spherical one to where half of the
    points on the sphere are misclassified, the other to where a quarter of the candidates are. The walk begins on the
    line to the start image, by bisection.
    """

    threat_model: ThreatModel = field(default_factory=lambda: ThreatModel("l2"))
    spherical_step: float = 0.1
    source_step: float = 0.1
    adaptation: float = 1.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "spherical_step", "source_step")
        if self.threat_model.norm != "l2":
            raise InputError(f"boundary minimises the l2 norm, not {self.threat_model.norm}: set norm = 'l2'")
        if not self.adaptation > 1:
            raise InputError(f"attack adaptation must be above 1, not {self.adaptation}")

    def _spend(self, oracle: Oracle, start: Tensor | None, generator: torch.Generator) -> None:
        rows = started(oracle, start, generator)
        to_boundary(oracle, rows, oracle.nearest[rows], 0.01)
        spherical = torch.full_like(oracle.distance, self.spherical_step)
        source = torch.full_like(oracle.distance, self.source_step)
        step = 0
        while len(rows := rows[oracle.open(rows) & (source[rows] > CONVERGED)]):
            on_sphere, candidates = self._proposed(oracle, rows, spherical[rows], source[rows], generator)
            if step % 5 == 0:
                held = oracle.misclassified(on_sphere, rows)
                spherical[rows] *= self.adaptation ** (2 * held.to(spherical.dtype) - 1)
            accepted = oracle.misclassified(candidates, rows, oracle.open(rows))
            source[rows] *= self.adaptation ** (accepted.to(source.dtype) - 0.25)
            step += 1

    def _proposed(
        self, oracle: Oracle, rows: Tensor, spherical: Tensor, source: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A random point on each sphere through the nearest image, and the candidate behind it."""
        x, nearest = oracle.x[rows], oracle.nearest[rows]
        way = nearest - x
        radius = per_image(oracle.distance[rows], way)
        noise = normal(way.shape, way, generator)
        along = per_image((noise * way).flatten(1).sum(1), way) / radius.square()
        noise = noise - along * way
        noise = noise / per_image(noise.flatten(1).norm(dim=1).clamp_min(torch.finfo(way.dtype).tiny), way)
        turned = way + per_image(spherical, way) * radius * noise
        turned = turned / (1 + per_image(spherical, way).square()).sqrt()
        lower, upper = self.threat_model.lower, self.threat_model.upper
        nearer = turned * (1 - per_image(source.clamp_max(0.9), way))
        return (x + turned).clamp(lower, upper), (x + nearer).clamp(lower, upper)

    def __str__(self) -> str:
        return (
            f"Boundary attack, {self.threat_model}, {self.queries} queries, first steps {self.spherical_step:.6g} and "
            f"{self.source_step:.6g} of the distance, adapted by {self.adaptation:.6g}"
        )


PLUGIN = Boundary
