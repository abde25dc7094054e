"""Auto-PGD: projected gradient descent that finds its step size itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.ascent import STEPPINGS, Ascent
from nas.attacks.gradient import check_loss, clean_logits_for
from nas.attacks.losses import LOSSES
from nas.attacks.worklist import Best, Rows
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Apgd:
    """Auto-PGD: momentum, and a step size halved at checkpoints where it no longer helps; no parameter to set.

    Croce and Hein, ICML 2020, arXiv 2003.01690, algorithm 1; for l_1 the sparse steps of arXiv 2103.01208. Of each
    sample the misclassified iterate of highest loss is returned, else the iterate of highest loss. Restarts attack
    what is not broken yet. eot: answers of a random model that each gradient averages; success and loss are those
    of the last answer. widening: from balls of 3 and 2 epsilon into the ball, for l_1. stop_when_broken: a sample
    stays at its first misclassified iterate. batch_size: samples (times restarts, with stop_when_broken) computed
    together, where those that are done make room for others; 0: all.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    loss: str = "cross_entropy"
    steps: int = 100
    restarts: int = 1
    eot: int = 1
    widening: bool = False
    stop_when_broken: bool = False
    batch_size: int = 0

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_ascent(self.threat_model, self.steps, self.restarts, self.eot, self.widening, self.stop_when_broken)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        return self.found(model, x, y, generator=generator).images

    def found(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Best:
        """The same, and which samples are broken."""
        best = Best(x)
        everyone = torch.arange(len(x), device=x.device)
        with crafting(model):
            clean_logits = clean_logits_for(self.loss, model, x)

            def loss(logits: Tensor, rows: Rows) -> Tensor:
                return LOSSES[self.loss](logits, rows["y"], rows.get("clean_logits"))

            # All starts are one list of jobs where broken samples stop; else a start needs to know what is broken.
            rounds = [everyone.repeat(self.restarts)] if self.stop_when_broken else [everyone] * self.restarts
            for samples in rounds:
                samples = samples[~best.broken[samples]]
                more = {} if clean_logits is None else {"clean_logits": clean_logits[samples]}
                self._ascent.climb(model, x, y, samples, loss, more, generator, best)
        return best

    @property
    def _ascent(self) -> Ascent:
        return Ascent(self.threat_model, self.steps, self.eot, self.stop_when_broken, self.batch_size, self.widening)

    def __str__(self) -> str:
        more = described(self.restarts, self.eot, self.widening, self.stop_when_broken)
        return f"APGD-{self.steps}, {self.threat_model}, {self.loss}{more}"


def check_ascent(
    threat_model: ThreatModel, steps: int, restarts: int, eot: int, widening: bool, stop_when_broken: bool
) -> None:
    """Raise ``InputError`` for settings that Auto-PGD cannot have."""
    if threat_model.norm not in STEPPINGS:
        raise InputError(f"Auto-PGD knows the norms {', '.join(STEPPINGS)}, not '{threat_model.norm}'")
    for name, value in (("steps", steps), ("restarts", restarts), ("eot", eot)):
        if value < 1:
            raise InputError(f"attack {name} must be at least 1, not {value}")
    if widening and threat_model.norm != "l1":
        raise InputError(f"widening is for the norm 'l1', not '{threat_model.norm}'")
    if stop_when_broken and eot > 1:
        raise InputError("stop_when_broken trusts single answers, which eot is there to avoid: give only one of them")


def described(restarts: int, eot: int, widening: bool, stop_when_broken: bool) -> str:
    """Settings of an Auto-PGD that differ from the usual."""
    text = f", restarts {restarts}" if restarts > 1 else ""
    text += f", eot {eot}" if eot > 1 else ""
    text += ", widening" if widening else ""
    return text + (", stops when broken" if stop_when_broken else "")


PLUGIN = Apgd
