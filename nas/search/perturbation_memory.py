"""Reused perturbations: an attack on an image begins where the last attack on that image ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nas import ranks
from nas.errors import InputError
from nas.objective import Attack, Batch
from nas.threat_model import ThreatModel


class PerturbationMemory:
    """The last perturbation of every image, in the coordinates of the unaugmented image.

    With it few steps, or one, come near what many steps from a random start find, because the network changes little
    between two visits of an image (ATTA: Zheng et al., CVPR 2020, arXiv 1912.11969; compare Shafahi et al.,
    NeurIPS 2019, arXiv 1904.12843). Under augmentation the perturbation moves with the image: crop and flip that bring
    pixel p of the image to place q bring its perturbation from p to q, and back after the attack. What was cropped or
    cut away keeps the perturbation it had.

    deltas: [images, C, H, W] float16 (half the memory; a start is projected into the ball anyway); NaN where a pixel
    has not been attacked yet. It is all the state there is.
    """

    def __init__(self, images: Tensor) -> None:
        """An empty memory for ``images`` [images, C, H, W], on their device."""
        self.deltas = torch.full(images.shape, torch.nan, dtype=torch.float16, device=images.device)
        self._changed = torch.zeros(len(images), device=images.device)

    def attack(self, attack: Attack, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """``attack`` on ``batch``, begun at ``start``; its perturbations are remembered."""
        starting: Any = attack
        start = self.start(batch, starting.threat_model, generator)
        x_adv: Tensor = starting(model, batch.x, batch.y, generator=generator, start=start)
        self.remember(batch, x_adv - batch.x)
        return x_adv

    def start(self, batch: Batch, threat_model: ThreatModel, generator: torch.Generator) -> Tensor:
        """Images with their last perturbations, in the ball; pixels without one are those of a random start."""
        places = _places(batch)
        # The slot behind the last pixel stands for "from nowhere" (places -1).
        known = nn.functional.pad(self.deltas[batch.indices].flatten(2), (0, 1), value=torch.nan)
        delta = known.gather(2, places.expand(-1, known.shape[1], -1)).view_as(batch.x).to(batch.x.dtype)
        # Drawn for all images, so that the stream does not depend on which were attacked before.
        random = threat_model.random_start(batch.x, generator)
        return threat_model.project(torch.where(delta.isnan(), random, batch.x + delta), batch.x)

    def remember(self, batch: Batch, delta: Tensor) -> None:
        """Keep the perturbations ``delta`` [N, C, H, W] of ``batch`` for its images' next visit."""
        places = _places(batch)
        kept = nn.functional.pad(self.deltas[batch.indices].flatten(2), (0, 1))
        kept.scatter_(2, places.expand(-1, kept.shape[1], -1), delta.flatten(2).to(kept.dtype))
        self.deltas[batch.indices] = kept[:, :, :-1].view(delta.shape)
        self._changed[batch.indices] = 1

    def share(self) -> None:
        """Tell the other processes of a data-parallel run what was remembered since the last time, and hear of theirs.

        Of an image that several have attacked, which can only be in epochs longer than the data, the mean is kept.
        """
        if ranks.world() == 1:
            return
        own = self._changed[:, None, None, None] > 0
        heard = ranks.combined(torch.where(own, self.deltas, 0).float(), "sum")
        times = ranks.combined(self._changed, "sum")[:, None, None, None]
        self.deltas = torch.where(times > 0, heard / times, self.deltas.float()).half()
        self._changed.zero_()


def check_can_start(attack: object, where: str = "the attack") -> None:
    """Raise ``InputError`` unless ``attack`` begins at random, so that a remembered start can take that place."""
    if not getattr(attack, "random_start", False):
        raise InputError(
            f"reuse_perturbations takes the place of a random start, and {where} has none: give pgd, or fgsm with "
            "random_start = true"
        )


def _places(batch: Batch) -> Tensor:
    """[N, 1, H*W]: the slots of the memory that the pixels of the batch belong to."""
    if batch.places is None:
        raise ValueError("the batch does not say where its pixels came from: make it with trace=True")
    pixels = batch.x.shape[2] * batch.x.shape[3]
    return torch.where(batch.places < 0, pixels, batch.places).flatten(1).unsqueeze(1)
