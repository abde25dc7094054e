"""The gradient of an attack loss with respect to the input, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.attacks.losses import LOSSES, NEEDS_CLEAN_LOGITS
from nas.errors import InputError, nearest


def check_loss(name: str) -> None:
    """Raise ``InputError`` for an unknown attack loss."""
    if name not in LOSSES:
        raise InputError(f"unknown attack loss '{name}': {nearest(name, LOSSES)}")


def check_start(loss: str, random_start: bool) -> None:
    """Raise ``InputError`` for a loss that has its minimum at the clean images where the attack starts there."""
    if loss in NEEDS_CLEAN_LOGITS and not random_start:
        raise InputError(
            f"attack loss '{loss}' compares with the clean images and has no gradient there: give an attack with a "
            "random start"
        )


def clean_logits_for(loss: str, model: nn.Module, x: Tensor) -> Tensor | None:
    """Logits of the clean images where ``loss`` compares with them."""
    if loss not in NEEDS_CLEAN_LOGITS:
        return None
    with torch.no_grad():
        return model(x)


def input_gradient(
    model: nn.Module, x: Tensor, y: Tensor, loss: str, clean_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient [N, C, H, W] of the summed loss at ``x``, the losses [N] and the logits [N, K].

    Summed, not averaged: the gradient of a sample does not depend on the rest of the batch. Call it inside
    ``model_state.crafting``.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        logits = model(point)
        losses = LOSSES[loss](logits, y, clean_logits)
        (gradient,) = torch.autograd.grad(losses.sum(), point)
    return gradient, losses.detach(), logits.detach()
