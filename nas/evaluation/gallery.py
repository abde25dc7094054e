"""A few images with their adversarial counterparts, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.model_state import constant, evaluating
from nas.randomness import generator
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Pair:
    """An image and what an attack made of it: [C, H, W] in [0, 1], true class, and the classes the model sees."""

    clean: Tensor
    adversarial: Tensor
    label: int
    seen_clean: int
    seen_adversarial: int


def gallery(
    model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel, *, seed: int, pairs: int = 8
) -> list[Pair]:
    """The first images of ``x`` that the model gets right, under PGD-50 on the margin, broken or not."""
    with evaluating(model), constant(model), torch.no_grad():
        rows = (model(x[: 8 * pairs]).argmax(1) == y[: 8 * pairs]).nonzero().squeeze(1)[:pairs]
        if len(rows) == 0:
            return []
        attack = Pgd(threat_model, steps=50, loss="margin", keep="best")
        x_adv = attack(model, x[rows], y[rows], generator=generator(seed, "gallery", device=x.device))
        before, after = model(x[rows]).argmax(1).tolist(), model(x_adv).argmax(1).tolist()
    images = zip(x[rows].cpu(), x_adv.cpu(), y[rows].tolist(), before, after, strict=True)
    return [Pair(*image) for image in images]
