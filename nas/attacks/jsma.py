"""The Jacobian-based saliency map attack."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.gradient import input_jacobian
from nas.attacks.losses import right
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel

ENTRIES = 1 << 24
"""Pairs looked at in one go, over the batch."""


@dataclass(frozen=True)
class Jsma:
    """Jacobian-based saliency map attack: changes few values, two at a time, each as far as it may.

    Papernot et al., EuroS&P 2016, arXiv 1511.07528, algorithm 3 on the logits. Of all pairs of values (channels of a
    pixel count apart) the one is changed whose joint effect raises the target logit, lowers the sum of the others and
    has the largest product of the two. Both directions are looked at in every step (after Wiyatno and Xu, arXiv
    1808.07945), and the target is the strongest wrong class of the moment, as there is no target to be reached.

    values: share of the values of an image that may change, at least two of them. Each moves by ``move`` (pixel units)
    at once, within the pixel bounds and the ball of the threat model around the image; for the sparse attack of the
    paper give an epsilon that leaves pixels free (l_inf 1). A value is changed once. A sample ends when
    it is misclassified, when its budget is spent or when no pair has the wanted effect.

    A step costs a backward pass a class and D^2 products for images of D values.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    values: float = 0.15
    move: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.values <= 1:
            raise InputError(f"values is a share of the image in (0, 1], not {self.values}")
        if not 0 < self.move < float("inf"):
            raise InputError(f"move must be a number above 0, not {self.move}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]; draws nothing."""
        del generator
        result, shape, size = x.clone(), x.shape[1:], x[0].numel()
        rows = torch.arange(len(x), device=x.device)
        free = torch.ones(len(x), size, dtype=torch.bool, device=x.device)
        with crafting(model):
            for _ in range(max(int(self.values * size) // 2, 1)):
                if len(rows) == 0:
                    break
                jacobian, logits = input_jacobian(model, result[rows])
                held = right(logits, y[rows])
                rows, jacobian, logits = rows[held], jacobian[held], logits[held]
                if len(rows) == 0:
                    break
                target = logits.scatter(1, y[rows].unsqueeze(1), -torch.inf).argmax(1)
                of_target = jacobian[torch.arange(len(rows), device=x.device), target].flatten(1)
                of_others = jacobian.flatten(2).sum(1) - of_target
                pair, sign = self._pair(result[rows].flatten(1), of_target, of_others, free[rows])
                some = sign != 0
                rows, pair, sign = rows[some], pair[some], sign[some]
                moved = result[rows].flatten(1).scatter_add(1, pair, (sign * self.move).unsqueeze(1).expand(-1, 2))
                # First the bounds: what a value cannot do anyway must not use up the ball.
                moved = moved.clamp(self.threat_model.lower, self.threat_model.upper).view(-1, *shape)
                result[rows] = self.threat_model.project(moved, x[rows])
                free[rows] = free[rows].scatter(1, pair, False)
        return result

    def _pair(self, x_adv: Tensor, target: Tensor, others: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """The most salient pair [n, 2] of each image [n, D] and its direction [n]: 1, -1, or 0 where there is none.

        target, others: derivatives [n, D] of the target logit and of the sum of the others.
        """
        n, size = x_adv.shape
        best = torch.zeros(n, device=x_adv.device, dtype=x_adv.dtype)
        pair = torch.zeros(n, 2, dtype=torch.int64, device=x_adv.device)
        sign = torch.zeros_like(best)
        rows = max(ENTRIES // (n * size), 1)
        for direction in (1.0, -1.0):
            limit = self.threat_model.upper if direction > 0 else self.threat_model.lower
            movable = free & (x_adv != limit)
            up, down = direction * target, -direction * others
            for first in range(0, size, rows):
                chunk = slice(first, first + rows)
                gain = up[:, chunk, None] + up[:, None, :]
                loss = down[:, chunk, None] + down[:, None, :]
                wanted = movable[:, chunk, None] & movable[:, None, :] & (gain > 0) & (loss > 0)
                wanted[:, torch.arange(wanted.shape[1]), torch.arange(first, first + wanted.shape[1])] = False
                salience, place = torch.where(wanted, gain * loss, 0).flatten(1).max(1)
                higher = salience > best
                here = torch.stack([first + place // size, place % size], 1)
                pair, best = torch.where(higher.unsqueeze(1), here, pair), torch.where(higher, salience, best)
                sign = torch.where(higher, direction, sign)
        return pair, sign

    def __str__(self) -> str:
        return f"JSMA, {self.threat_model}, at most {self.values:.3g} of the values, moved by {self.move:.6g}"


PLUGIN = Jsma
