"""The attacks of Carlini and Wagner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from nas.attacks.gradient import per_image
from nas.attacks.penalty import Adam, Found, Progress, nearest_by_weight, shortfall
from nas.errors import InputError
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class CarliniWagner:
    """Carlini and Wagner: the smallest perturbation plus c times the lead of the right class, c found by bisection.

    Carlini & Wagner, IEEE S&P 2017, arXiv 1608.04644: h = max(f_y - max f_k + kappa, 0), images written as tanh so that
    they cannot leave the pixel bounds, Adam. l_2 (section VI-A): |delta|_2^2 + c h, from the clean image for every c.
    l_inf (VI-C): sum max(|delta_i| - tau, 0) + c h from the nearest image found, where tau is kept at 0.98 of its
    distance (0.9 in the paper, which leaves as much to be found), and c rises where none nearer is found. A
    minimisation that has stopped making progress is ended, as in the authors' code; unlike there, the learning rate
    falls linearly to 0 in each, and in l_inf with the distance, which brings the same precision in fewer steps.

    confidence: kappa, the lead of the wrong logit that is asked for;  searches: values of c, ``weight`` the first;
    steps: of Adam, for each c.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 200
    searches: int = 9
    learning_rate: float = 0.1
    weight: float = 0.1
    confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.threat_model.norm not in FORMS:
            raise InputError(
                f"Carlini-Wagner has no form for the norm '{self.threat_model.norm}': choose one of "
                f"{', '.join(FORMS)}, or the attack ead for l1"
            )
        for name, count in (("steps", self.steps), ("searches", self.searches)):
            if count < 1:
                raise InputError(f"attack {name} must be at least 1, not {count}")
        for name, value in (("learning_rate", self.learning_rate), ("weight", self.weight)):
            if not 0 < value < float("inf"):
                raise InputError(f"{name} must be a number above 0, not {value}")
        if not 0 <= self.confidence < float("inf"):
            raise InputError(f"confidence must be a number of at least 0, not {self.confidence}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """``nearest``, projected into the threat model; draws nothing."""
        return self.threat_model.project(self.nearest(model, x, y, generator=generator), x)

    def nearest(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The nearest misclassified images found [N, C, H, W], within the pixel bounds at whatever distance.

        A sample that is misclassified already, or for which none was found, comes back as it was.
        """
        del generator
        found = Found(x, y, self.threat_model.distance, self.confidence)
        form = FORMS[self.threat_model.norm]

        def minimise(found: Found, rows: Tensor, weights: Tensor) -> Tensor:
            return self._minimise(model, form, found, rows, weights)

        searches, first = self.searches, self.weight
        return nearest_by_weight(model, x, y, minimise, found, searches, first, bisects=form.bisects)

    def _minimise(self, model: nn.Module, form: Form, found: Found, rows: Tensor, weights: Tensor) -> Tensor:
        """Adam on the images ``rows`` with one weight each: which succeeded."""
        lower, upper = self.threat_model.lower, self.threat_model.upper
        broken, known = torch.zeros_like(rows, dtype=torch.bool), found.sizes[rows]
        places, x, y = torch.arange(len(rows), device=rows.device), found.x[rows], found.y[rows]
        variable = torch.atanh((2 * (form.start(found, rows) - lower) / (upper - lower) - 1) * (1 - 1e-6))
        adam, progress = Adam(variable, self.learning_rate), Progress(known, self.steps)
        for step in range(self.steps + 1):
            with torch.enable_grad():
                variable.requires_grad_(True)
                images = (lower + (upper - lower) * (variable.tanh() + 1) / 2).clamp(lower, upper)
                logits = model(images)
                sizes = form.size(images - x, found.sizes[rows[places]])
                values = sizes + weights * shortfall(logits, y, self.confidence)
                (gradient,) = torch.autograd.grad(values.sum(), variable)
            variable, values = variable.detach(), values.detach()
            broken[places] |= found.see(images.detach(), logits, rows[places])
            pace = (1 - step / (self.steps + 1)) * form.pace(found.sizes[rows[places]])
            variable = variable + adam.step(gradient, per_image(pace, gradient))
            left = ~progress.at_rest(step, values, found.sizes[rows[places]])
            if not bool(left.all()):
                adam.keep(left)
                progress.keep(left)
                places, x, y, weights = places[left], x[left], y[left], weights[left]
                variable = variable[left]
                if len(places) == 0:
                    break
        return broken if form.bisects else found.sizes[rows] < known

    def __str__(self) -> str:
        return (
            f"C&W, {self.threat_model}, {self.searches} x {self.steps} steps of {self.learning_rate:.6g}, "
            f"c from {self.weight:.6g}, confidence {self.confidence:.6g}"
        )


class Form(Protocol):
    """What is small for a small perturbation in one norm.

    bisects: whether a smaller weight of the penalty leads to nearer images.
    """

    bisects: bool

    def start(self, found: Found, rows: Tensor) -> Tensor:
        """Where a minimisation of the samples ``rows`` begins."""
        ...

    def size(self, delta: Tensor, nearest: Tensor) -> Tensor:
        """[N] of perturbations ``delta``; ``nearest``: distance of the nearest image known [N], or inf."""
        ...

    def pace(self, nearest: Tensor) -> Tensor:
        """Share [N] of the learning rate."""
        ...


class SquaredLength:
    """|delta|_2^2, from the clean images."""

    bisects = True

    def start(self, found: Found, rows: Tensor) -> Tensor:
        return found.x[rows]

    def size(self, delta: Tensor, nearest: Tensor) -> Tensor:
        return delta.flatten(1).square().sum(1)

    def pace(self, nearest: Tensor) -> Tensor:
        return torch.ones_like(nearest)


class Excess:
    """sum max(|delta_i| - tau, 0), from the nearest image known, with tau just below its distance."""

    bisects = False

    def start(self, found: Found, rows: Tensor) -> Tensor:
        return found.images[rows]

    def size(self, delta: Tensor, nearest: Tensor) -> Tensor:
        return (delta.abs() - per_image(0.98 * nearest, delta)).clamp_min(0).flatten(1).sum(1)

    def pace(self, nearest: Tensor) -> Tensor:
        return (3 * nearest).clamp_max(1)  # steps small against tau, which they are to come near to


FORMS: dict[str, Form] = {"l2": SquaredLength(), "linf": Excess()}

PLUGIN = CarliniWagner
