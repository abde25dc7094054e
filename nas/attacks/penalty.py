"""Attacks that minimise a size of the perturbation plus a penalty for the right class: the search for its weight.

The size is what an attack likes to be small, c * penalty is added to it, and c is found for every sample by bisection:
the smallest that still leads to a misclassified image (Carlini and Wagner, arXiv 1608.04644, section V).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nas.attacks.losses import margin, right
from nas.model_state import crafting

CHECKS = 10
"""How often a minimisation looks whether it still makes progress."""

LARGEST = 1e10
"""The largest weight tried."""


class Found:
    """The nearest misclassified image of each sample among those shown to it.

    x, y: clean images [N, C, H, W] and labels [N]; size: what "near" means, (images, clean images) -> [N].
    """

    def __init__(self, x: Tensor, y: Tensor, size: Callable[[Tensor, Tensor], Tensor], confidence: float) -> None:
        self.x, self.y, self.size, self.confidence = x, y, size, confidence
        self.images = x.clone()
        self.sizes = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)

    def see(self, images: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        """Which of ``images`` [n] of samples ``rows`` are misclassified with confidence; the nearest are kept."""
        logits, y = logits.detach(), self.y[rows]
        # Clear of what rounding does to logits: the same image in another batch must be misclassified too.
        lead = self.confidence + 16 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
        broken = ~right(logits, y) & ~(margin(logits, y, None) < lead)
        sizes = self.size(images, self.x[rows])
        closer = broken & (sizes < self.sizes[rows])
        self.images[rows[closer]] = images[closer]
        self.sizes[rows[closer]] = sizes[closer]
        return broken


Minimise = Callable[[Found, Tensor, Tensor], Tensor]
"""(found, rows [n], weights [n]) -> which succeeded [n]: one minimisation of the samples ``rows``."""


def nearest_by_weight(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    minimise: Minimise,
    found: Found,
    searches: int,
    first: float,
    *,
    bisects: bool = True,
) -> Tensor:
    """``x`` with the samples that are right replaced by the nearest misclassified images found [N, C, H, W].

    searches: minimisations of each sample; first: the weight of the first; bisects: whether a weight that succeeded is
    lowered, or kept.
    """
    with crafting(model):
        with torch.no_grad():
            rows = right(model(x), y).nonzero().squeeze(1)
        weights = torch.full((len(rows),), first, device=x.device, dtype=x.dtype)
        low, high = torch.zeros_like(weights), torch.full_like(weights, LARGEST)
        for _ in range(searches):
            if len(rows) == 0:
                break
            succeeded = minimise(found, rows, weights)
            high = torch.where(succeeded, torch.minimum(high, weights), high)
            low = torch.where(succeeded, low, torch.maximum(low, weights))
            raised = (10 * weights).clamp_max(LARGEST)
            if bisects:
                weights = torch.where(high < LARGEST, (low + high) / 2, raised)
            else:
                weights = torch.where(succeeded, weights, raised)
    return found.images


def shortfall(logits: Tensor, y: Tensor, confidence: float) -> Tensor:
    """By how much [N] the right logit is not yet ``confidence`` below the largest wrong one; 0 where it is."""
    return (confidence - margin(logits, y, None)).clamp_min(0)


class Progress:
    """Tells which of a batch of minimisations have come to rest: looked at ``CHECKS`` times in ``steps``.

    One is at rest whose value changed by less than 0.01 % since the last look, and which found no nearer image. (One
    whose value has risen may only have taken a long first step.)
    """

    def __init__(self, sizes: Tensor, steps: int) -> None:
        self.every = max(steps // CHECKS, 1)
        self.values, self.sizes = torch.zeros_like(sizes), sizes

    def at_rest(self, step: int, values: Tensor, sizes: Tensor) -> Tensor:
        """Which [n] are, by their ``values`` and the ``sizes`` of their nearest images."""
        if step % self.every:
            return torch.zeros_like(values, dtype=torch.bool)
        rest = ((values - self.values).abs() <= 1e-4 * self.values) & (sizes >= self.sizes)
        self.values, self.sizes = values, sizes
        return rest

    def keep(self, rows: Tensor) -> None:
        """Go on with these [n] only (a mask)."""
        self.values, self.sizes = self.values[rows], self.sizes[rows]


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) on a batch of independent images, of which some may be left behind."""

    def __init__(self, like: Tensor, learning_rate: float) -> None:
        self.learning_rate, self.count = learning_rate, 0
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, gradient: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """What to add to the images for this gradient, at a ``share`` of the learning rate."""
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient.square()
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.999**self.count)
        return -share * self.learning_rate * first / (second.sqrt() + 1e-8)

    def keep(self, rows: Tensor) -> None:
        """Go on with these images [n] only (a mask)."""
        self.first, self.second = self.first[rows], self.second[rows]
