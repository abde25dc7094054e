"""Attacks that see only the model's answers: what they spend, what they find, and when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.losses import margin, right
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel

IMAGES_AT_ONCE = 1024
"""How many images an attack that shows many of each sample shows in one call, where one of each is fewer."""

START_TRIES = 48
"""Random images a decision-based attack tries before it gives a sample up."""


@dataclass(frozen=True, eq=False)
class Attempt:
    """What an attack by queries achieved.

    x_adv: [N, C, H, W] within the threat model.  queries: [N] int64, answers of the model spent on each sample.
    broken_at: [N] int64, the query at which a sample was first misclassified within the threat model (1 is that of the
    clean image), -1 where it never was.  budget: the most queries a sample was allowed.
    """

    x_adv: Tensor
    queries: Tensor
    broken_at: Tensor
    budget: int


class Oracle:
    """Answers a model's queries, one an image, keeps count for each sample, and the nearest misclassified image.

    x, y: the clean batch [N, C, H, W] and its labels [N];  budget: the most queries a sample may cost.
    until_broken: a sample is done when misclassified within the threat model; otherwise only its budget ends it, unless
    the clean image is misclassified. Call it inside ``model_state.crafting``.

    queries, broken_at: [N] as in ``Attempt``.  nearest: [N, C, H, W], the nearest image within the pixel bounds that
    was seen misclassified, and distance: [N] from the clean one in the norm of the threat model; the clean image and
    infinity where there was none.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        budget: int,
        *,
        until_broken: bool = True,
    ) -> None:
        self.model, self.x, self.y, self.threat_model = model, x, y, threat_model
        self.budget, self.until_broken = budget, until_broken
        self.queries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.broken_at = torch.full_like(self.queries, -1)
        self.nearest = x.clone()
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    def logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, K] of ``images`` [n, C, H, W], image i being a query of sample ``rows[i]``; rows are distinct.

        Several queries of each sample in their order: images [n, k, C, H, W] give logits [n, k, K]. Raises
        ``RuntimeError`` where a sample cannot pay.
        """
        shown = images if images.dim() > self.x.dim() else images.unsqueeze(1)
        several = shown.shape[1]
        if bool((self.left(rows) < several).any()):
            raise RuntimeError(f"a sample was to be shown {several} more times than its {self.budget} queries allow")
        numbers = self.queries[rows].unsqueeze(1) + torch.arange(1, several + 1, device=rows.device)
        logits, _ = self._show(shown.flatten(0, 1), rows.repeat_interleave(several), numbers.flatten())
        return logits.unflatten(0, shown.shape[:2]) if shown is images else logits

    def margins(self, images: Tensor, rows: Tensor) -> Tensor:
        """Largest wrong logit minus the right one, [n] or [n, k]: above 0 means misclassified. As in ``logits``.

        Known from probabilities as well: it is the difference of their logarithms.
        """
        logits = self.logits(images, rows)
        labels = self.y[rows].repeat_interleave(logits[..., 0].numel() // len(rows)) if len(rows) else self.y[rows]
        return margin(logits.flatten(0, -2), labels, None).view(logits.shape[:-1])

    def misclassified(self, images: Tensor, rows: Tensor, asked: Tensor | None = None) -> Tensor:
        """Whether the model misclassifies ``images``, and nothing else: [n] or [n, k] bool. Shapes as in ``logits``.

        asked: which of them to show to it, [n] or [n, k]; by default all. An image that is not asked about, or that the
        budget no longer pays for, is not shown and counts as not misclassified.
        """
        shown = images if images.dim() > self.x.dim() else images.unsqueeze(1)
        wanted = torch.ones(shown.shape[:2], dtype=torch.bool, device=rows.device)
        if asked is not None:
            wanted = asked.view(wanted.shape)
        numbers = self.queries[rows].unsqueeze(1) + wanted.cumsum(1)
        wanted = wanted & (numbers <= self.budget)
        answers = torch.zeros_like(wanted)
        if bool(wanted.any()):
            everyone = rows.unsqueeze(1).expand_as(wanted)
            _, answers[wanted] = self._show(shown[wanted], everyone[wanted], numbers[wanted])
        return answers.view(images.shape[: images.dim() - self.x.dim() + 1])

    def _show(self, images: Tensor, rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and misclassification of images [m], image i being the query ``numbers[i]`` of sample ``rows[i]``."""
        with torch.no_grad():
            logits = self.model(images)
        self.queries.scatter_reduce_(0, rows, numbers, "amax")
        wrong = ~right(logits, self.y[rows])
        if bool(wrong.any()):
            self._keep(images[wrong], rows[wrong], numbers[wrong])
        return logits, wrong

    def _keep(self, images: Tensor, rows: Tensor, numbers: Tensor) -> None:
        """Remember the misclassified ``images`` that are within the pixel bounds."""
        flat = images.flatten(1)
        valid = (flat.amin(1) >= self.threat_model.lower) & (flat.amax(1) <= self.threat_model.upper)
        images, rows, numbers = images[valid], rows[valid], numbers[valid]
        distances = self.threat_model.distance(images, self.x[rows])
        closest = self.distance.scatter_reduce(0, rows, distances, "amin")
        new = (distances == closest[rows]) & (distances < self.distance[rows])
        self.distance = closest
        self.nearest[rows[new]] = images[new]
        inside = self.threat_model.contains(images, self.x[rows]) & (self.broken_at[rows] < 0)
        first = torch.full_like(self.queries, self.budget + 1).scatter_reduce(0, rows[inside], numbers[inside], "amin")
        self.broken_at = torch.where(first <= self.budget, first, self.broken_at)

    def left(self, rows: Tensor) -> Tensor:
        """Queries [n] that the samples ``rows`` may still cost."""
        return self.budget - self.queries[rows]

    def open(self, rows: Tensor, cost: int = 1) -> Tensor:
        """Which of ``rows`` [n] are not done and can pay ``cost`` more queries: [n] bool."""
        done = self.broken_at[rows] >= 0 if self.until_broken else self.distance[rows] <= 0
        return ~done & (self.left(rows) >= cost)

    @property
    def unbroken(self) -> Tensor:
        """Rows of the samples that are not misclassified within the threat model yet."""
        return (self.broken_at < 0).nonzero().squeeze(1)

    def attempt(self, last: Tensor) -> Attempt:
        """The outcome; ``last`` [N, C, H, W], the projection of which was shown, remains of samples not broken."""
        broken = per_image(self.broken_at >= 0, last)
        x_adv = torch.where(broken, self.nearest, self.threat_model.project(last, self.x))
        return Attempt(x_adv, self.queries, self.broken_at, self.budget)

    def attempt_with(self, last: Tensor, budget: int) -> Attempt:
        """The outcome where the projection of ``last`` was not shown yet: a query kept back for it tells its answer.

        Otherwise an image nobody asked about could be misclassified without being counted.
        """
        self.budget = budget
        projected = self.threat_model.project(last, self.x)
        rows = torch.arange(len(last), device=last.device)
        rows = rows[self.open(rows) & (projected != self.x).flatten(1).any(1)]
        self.misclassified(projected[rows], rows)
        return self.attempt(last)


@dataclass(frozen=True)
class ScoreBased(ABC):
    """An attack that sees the logits. It stops with a sample as soon as that is broken."""

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    queries: int = 5000

    def __post_init__(self) -> None:
        check_queries(self.queries)

    @abstractmethod
    def _spend(self, oracle: Oracle, margins: Tensor, generator: torch.Generator) -> Tensor:
        """Spend what is left after the clean images had ``margins`` [N]; what remains of the unbroken [N, C, H, W]."""

    def attempt(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Attempt:
        """What at most ``queries`` answers of the model to each sample achieve, the clean image being the first."""
        oracle = Oracle(model, x, y, self.threat_model, self.queries)
        return oracle.attempt(self._spent(oracle, generator))

    def _spent(self, oracle: Oracle, generator: torch.Generator) -> Tensor:
        with crafting(oracle.model), torch.no_grad():
            margins = oracle.margins(oracle.x, torch.arange(len(oracle.x), device=oracle.x.device))
            return self._spend(oracle, margins, generator)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        return self.attempt(model, x, y, generator=generator).x_adv


@dataclass(frozen=True)
class DecisionBased(ABC):
    """An attack that sees only whether an image is misclassified. It comes nearer until a sample is broken.

    It starts from images of other classes where they are given, and otherwise from random ones. A sample for which
    neither is misclassified is given up.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    queries: int = 5000

    def __post_init__(self) -> None:
        check_queries(self.queries)

    @abstractmethod
    def _spend(self, oracle: Oracle, start: Tensor | None, generator: torch.Generator) -> None:
        """Spend what is left after the clean images; the oracle remembers what was found."""

    def attempt(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, start: Tensor | None = None
    ) -> Attempt:
        """What at most ``queries`` answers of the model to each sample achieve, the clean image being the first.

        start: images [N, C, H, W] to come from, each of another class than that of its sample.
        """
        oracle = Oracle(model, x, y, self.threat_model, max(self.queries - 1, 1))
        self._spent(oracle, start, generator)
        with crafting(model):
            return oracle.attempt_with(oracle.nearest, self.queries)

    def nearest(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, start: Tensor | None = None
    ) -> Tensor:
        """The nearest misclassified images [N, C, H, W] that all ``queries`` find, however far they are.

        A sample that is misclassified already, or for which none was found, comes back as it was.
        """
        oracle = Oracle(model, x, y, self.threat_model, self.queries, until_broken=False)
        self._spent(oracle, start, generator)
        return oracle.nearest

    def _spent(self, oracle: Oracle, start: Tensor | None, generator: torch.Generator) -> None:
        if start is not None and start.shape != oracle.x.shape:
            raise InputError(
                f"start images of shape {tuple(start.shape)} for a batch of shape {tuple(oracle.x.shape)}: "
                "give one for each sample"
            )
        with crafting(oracle.model), torch.no_grad():
            oracle.misclassified(oracle.x, torch.arange(len(oracle.x), device=oracle.x.device))
            self._spend(oracle, start, generator)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, start: Tensor | None = None
    ) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]; ``start`` as in ``attempt``."""
        return self.attempt(model, x, y, generator=generator, start=start).x_adv


def check_queries(queries: int) -> None:
    """Raise ``InputError`` for a budget that does not pay for the clean image."""
    if queries < 1:
        raise InputError(f"attack queries must be at least 1 (the clean image), not {queries}")


def check_positive(attack: object, *names: str) -> None:
    """Raise ``InputError`` where one of the named settings of ``attack`` is not above 0."""
    for name in names:
        if not 0 < getattr(attack, name) < float("inf"):
            raise InputError(f"attack {name} must be above 0, not {getattr(attack, name)}")


def started(oracle: Oracle, start: Tensor | None, generator: torch.Generator) -> Tensor:
    """Rows of the open samples for which some image is misclassified; it is in ``oracle.nearest``.

    Given images are asked about first. Random ones are noise of several grains and contrasts: a network often takes
    all noise of one kind for one class, which is no start for the samples of that class.
    """
    rows = torch.arange(len(oracle.x), device=oracle.x.device)
    if start is not None:
        asked = rows[oracle.open(rows)]
        oracle.misclassified(start[asked].clamp(oracle.threat_model.lower, oracle.threat_model.upper), asked)
    for attempt in range(START_TRIES):
        missing = rows[oracle.open(rows) & oracle.distance.isinf()]
        if len(missing) == 0:
            break
        oracle.misclassified(noise(oracle, missing, attempt, generator, grey=attempt // 4 % 2 == 0), missing)
    return rows[oracle.open(rows) & oracle.distance.isfinite()]


def noise(oracle: Oracle, rows: Tensor, attempt: int, generator: torch.Generator, *, grey: bool) -> Tensor:
    """Random images [n, C, H, W], grey or black and white, with grains of a pixel, 1/4, 1/2, all of a side in turn."""
    channels, height, width = oracle.x.shape[1:]
    grid = [(height, width), (4, 4), (2, 2), (1, 1)][attempt % 4]
    size = (len(rows), channels, min(grid[0], height), min(grid[1], width))
    grains = torch.rand(size, generator=generator, device=oracle.x.device, dtype=oracle.x.dtype)
    lower, upper = oracle.threat_model.lower, oracle.threat_model.upper
    images = lower + (upper - lower) * (grains if grey else grains.round())
    return F.interpolate(images, (height, width)).clamp(lower, upper)


def to_boundary(oracle: Oracle, rows: Tensor, images: Tensor, tolerance: float) -> Tensor:
    """Misclassified ``images`` [n, C, H, W] brought towards the clean ones by bisection, as long as they stay so.

    The result is at most ``tolerance`` of the distance from an image on the way that is not misclassified. The way is
    the projection on smaller and smaller balls: a line in l_2, a clipping in l_inf.
    """
    x, threat_model = oracle.x[rows], oracle.threat_model
    delta = images - x
    size = threat_model.geometry.size(delta)
    low, high = torch.zeros_like(size), torch.ones_like(size)
    while tolerance < 1:
        # Where the budget ends, the way above stays: only what was seen misclassified is returned.
        middle = (low + high) / 2
        # Balls are alike: shrinking to a radius of each image's own is shrinking to 1 in its own scale.
        radius = per_image((middle * size).clamp_min(torch.finfo(size.dtype).tiny), delta)
        candidates = x + threat_model.geometry.shrink(delta / radius, 1.0) * radius
        candidates = candidates.clamp(threat_model.lower, threat_model.upper)
        wrong = oracle.misclassified(candidates, rows, oracle.open(rows))
        images = torch.where(per_image(wrong, images), candidates, images)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        tolerance *= 2
    return images


def portions(total: int, samples: int) -> Iterator[int]:
    """``total`` images of each of ``samples`` samples, as numbers to show at once."""
    at_once = max(IMAGES_AT_ONCE // max(samples, 1), 1)
    while total > 0:
        yield min(total, at_once)
        total -= at_once


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers."""
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """``values`` [n] or [n, k] with ones behind, to meet images ``like`` [n, (k,) C, H, W]."""
    return values.view(*values.shape, *[1] * (like.dim() - values.dim()))
