"""Auto-PGD towards the likeliest wrong classes, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.apgd import check_ascent, described
from nas.attacks.ascent import Ascent
from nas.attacks.losses import likeliest_wrong, targeted_dlr
from nas.attacks.worklist import Best, Rows
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class ApgdT:
    """Targeted Auto-PGD: one ascent of the targeted DLR loss for each of the likeliest wrong classes (APGD-T).

    Croce and Hein, ICML 2020, arXiv 2003.01690, section 4. Targets are the ``targets`` wrong classes with the highest
    logits on the clean image, or all there are; with fewer than four classes the loss is the difference of logits.
    Success is any misclassification; a broken sample needs no further target. Other settings as in ``Apgd``;
    with stop_when_broken a batch holds pairs of sample and target, the likeliest targets first.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    targets: int = 9
    steps: int = 100
    restarts: int = 1
    eot: int = 1
    widening: bool = False
    stop_when_broken: bool = False
    batch_size: int = 0

    def __post_init__(self) -> None:
        check_ascent(self.threat_model, self.steps, self.restarts, self.eot, self.widening, self.stop_when_broken)
        if self.targets < 1:
            raise InputError(f"attack targets must be at least 1, not {self.targets}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        return self.found(model, x, y, generator=generator).images

    def found(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Best:
        """The same, and which samples are broken."""
        best = Best(x)
        everyone = torch.arange(len(x), device=x.device)
        ascent = Ascent(self.threat_model, self.steps, self.eot, self.stop_when_broken, self.batch_size, self.widening)
        with crafting(model):
            with torch.no_grad():
                targets = likeliest_wrong(model(x), y, self.targets)
            ranks = torch.arange(targets.shape[1], device=x.device).repeat_interleave(self.restarts)
            # All pairs are one list of jobs where broken samples stop; else a target needs to know what is broken.
            if self.stop_when_broken:
                rounds = [(everyone.repeat(len(ranks)), ranks.repeat_interleave(len(x)))]
            else:
                rounds = [(everyone, rank.expand(len(x))) for rank in ranks]
            for samples, rank in rounds:
                held = ~best.broken[samples]
                samples, rank = samples[held], rank[held]
                more = {"target": targets[samples, rank]}
                ascent.climb(model, x, y, samples, _loss, more, generator, best)
        return best

    def __str__(self) -> str:
        more = described(self.restarts, self.eot, self.widening, self.stop_when_broken)
        return f"APGD-T-{self.steps}, {self.threat_model}, {self.targets} targets{more}"


def _loss(logits: Tensor, rows: Rows) -> Tensor:
    return targeted_dlr(logits, rows["y"], rows["target"])


PLUGIN = ApgdT
