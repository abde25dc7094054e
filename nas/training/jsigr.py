"""Jacobian norm with selective input-gradient regularisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.analysis.jacobian import squared_jacobian_norm
from nas.analysis.saliency import PerturbationSaliency, most_salient, share_inside
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.model_state import twice_differentiable
from nas.objective import Attack, Batch, Metrics, State


@dataclass(frozen=True)
class JSigr:
    """J-SIGR (reconstruction): a small Jacobian, and input gradients only where perturbation finds the image salient.

    After Liu et al., Pattern Recognition 145 (2024) 109902, arXiv 2207.13036, of which the abstract
    alone was read; it promises no published number. Minimises

        CE + jacobian_weight |J|_F^2 / 2 + saliency_weight |(1 - m) g|_2^2,

    means over the batch: J the Jacobian of the logits (estimated from ``projections`` random vectors, Hoffman et al.,
    arXiv 1908.02729; as many as classes give it exactly), g the gradient of the sample's cross-entropy, m the ``keep``
    of the pixels with the highest perturbation ``saliency``, found without gradients on the model in eval mode. Both
    in pixels of [0, 1], and at the clean images. With keep 0 the second penalty is double backpropagation (Ross &
    Doshi-Velez, AAAI 2018, arXiv 1711.09404). Inferred: how the terms are put together, mask and constants.

    adversarial: take the cross-entropy at the images of ``attack``; otherwise there is no attack in it.
    selection: "random" takes as many pixels at random, the control that the saliency has to beat.

    Small gradients are what gradient masking looks like: judge it by AutoAttack, by Square and by transfer.
    """

    attack: Attack = field(default_factory=Pgd)
    jacobian_weight: float = 0.01
    saliency_weight: float = 1.0
    keep: float = 0.2
    projections: int = 1
    saliency: PerturbationSaliency = field(default_factory=PerturbationSaliency)
    selection: Literal["saliency", "random"] = "saliency"
    adversarial: bool = False

    def __post_init__(self) -> None:
        for name in ("jacobian_weight", "saliency_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name} of J-SIGR must be a number of at least 0, not {value}")
        if not 0 <= self.keep <= 1:
            raise InputError(f"keep of J-SIGR is a share of the pixels from 0 to 1, not {self.keep}")
        if self.projections < 1:
            raise InputError(f"J-SIGR needs at least 1 projection, not {self.projections}")

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The mean cross-entropy and both penalties. A penalty of weight 0 costs nothing."""
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator) if self.adversarial else None
        selects = self.saliency_weight > 0 and self.keep < 1
        mask = self._mask(model, batch.x, state) if selects else None
        loss, metrics = torch.zeros((), device=batch.x.device, dtype=batch.x.dtype), {}
        if x_adv is not None:
            logits = model(x_adv)
            loss = F.cross_entropy(logits, batch.y)
            metrics["accuracy"] = (logits.argmax(1) == batch.y).float().mean()
        if x_adv is not None and mask is None and self.jacobian_weight == 0:
            return loss, metrics
        x = batch.x.detach().requires_grad_(True)
        with twice_differentiable():
            logits = model(x)
        natural = F.cross_entropy(logits, batch.y)
        metrics = {
            "accuracy": (logits.argmax(1) == batch.y).float().mean(),
            **metrics,
            "natural_loss": natural.detach(),
        }
        if x_adv is None:
            loss = natural
        if self.jacobian_weight > 0:
            norms = squared_jacobian_norm(
                logits, x, projections=self.projections, generator=state.method_generator, create_graph=True
            )
            loss = loss + self.jacobian_weight * norms.mean() / 2
            metrics["squared_jacobian"] = norms.mean().detach()
        if mask is not None:
            # Of the sum over the batch: the gradient of a sample is that of its own loss.
            (gradient,) = torch.autograd.grad(natural * len(x), x, create_graph=True)
            outside = gradient.masked_fill(mask.unsqueeze(1), 0).flatten(1).square().sum(1).mean()
            loss = loss + self.saliency_weight * outside
            metrics["outside"] = outside.detach()
            metrics["inside_share"] = share_inside(gradient.detach(), mask).mean()
        return loss, metrics

    def _mask(self, model: nn.Module, x: Tensor, state: State) -> Tensor:
        """Where gradients are free: [N, H, W] bool."""
        if self.selection == "random":
            noise = torch.rand(x[:, 0].shape, generator=state.method_generator, device=x.device, dtype=x.dtype)
            return most_salient(noise, self.keep)
        if self.keep == 0:
            return torch.zeros_like(x[:, 0], dtype=torch.bool)
        return most_salient(self.saliency(model, x), self.keep)


PLUGIN = JSigr
