"""Attacks that see only the model's answers: what they spend, and when they succeed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.attacks.losses import margin, right
from nas.threat_model import ThreatModel


@dataclass(frozen=True, eq=False)
class Attempt:
    """What an attack by queries achieved.

    x_adv: [N, C, H, W] within the threat model.  queries: [N] int64, answers of the model spent on each sample.
    broken_at: [N] int64, the query at which a sample was first misclassified within the threat model (1 is that of the
    clean image), -1 where it never was.
    """

    x_adv: Tensor
    queries: Tensor
    broken_at: Tensor


class Oracle:
    """Answers a model's queries, one an image, and keeps count for each sample of a batch.

    x, y: the clean batch [N, C, H, W] and its labels [N]. Call it inside ``model_state.crafting``.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel) -> None:
        self.model, self.x, self.y, self.threat_model = model, x, y, threat_model
        self.queries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.broken_at = torch.full_like(self.queries, -1)
        self._found = x.clone()

    def logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, K] of ``images`` [n, C, H, W], image i being a query of sample ``rows[i]``; rows are distinct."""
        with torch.no_grad():
            logits = self.model(images)
        self.queries[rows] += 1
        new = ~right(logits, self.y[rows]) & (self.broken_at[rows] < 0)
        new &= self.threat_model.contains(images, self.x[rows])
        self.broken_at[rows[new]] = self.queries[rows[new]]
        self._found[rows[new]] = images[new]
        return logits

    def margins(self, images: Tensor, rows: Tensor) -> Tensor:
        """Largest wrong logit minus the right one [n]: above 0 means misclassified. A query as in ``logits``."""
        return margin(self.logits(images, rows), self.y[rows], None)

    @property
    def unbroken(self) -> Tensor:
        """Rows of the samples that are not misclassified within the threat model yet."""
        return (self.broken_at < 0).nonzero().squeeze(1)

    def attempt(self, last: Tensor) -> Attempt:
        """The outcome; ``last`` [N, C, H, W] is what remains of the samples that were not broken."""
        broken = (self.broken_at >= 0).view(-1, *[1] * (last.dim() - 1))
        x_adv = torch.where(broken, self._found, self.threat_model.project(last, self.x))
        return Attempt(x_adv, self.queries, self.broken_at)
