"""What a gradient attack maximises, per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AttackLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits [N, K], labels [N], logits of the clean images [N, K] or None) -> losses [N]."""


def cross_entropy(logits: Tensor, y: Tensor, clean_logits: Tensor | None) -> Tensor:
    """-log p(y)."""
    del clean_logits
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor, clean_logits: Tensor | None) -> Tensor:
    """Largest wrong logit minus the right one (Carlini and Wagner, arXiv 1608.04644); above 0 means misclassified."""
    del clean_logits
    right = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    wrong = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return wrong - right


def kl(logits: Tensor, y: Tensor, clean_logits: Tensor | None) -> Tensor:
    """KL(p(clean) || p(adversarial)), the inner loss of TRADES (Zhang et al., arXiv 1901.08573, eq. 3)."""
    del y
    assert clean_logits is not None
    clean = F.log_softmax(clean_logits, 1)
    return (clean.exp() * (clean - F.log_softmax(logits, 1))).sum(1)


LOSSES: dict[str, AttackLoss] = {"cross_entropy": cross_entropy, "margin": margin, "kl": kl}

NEEDS_CLEAN_LOGITS = frozenset({"kl"})


def right(logits: Tensor, y: Tensor) -> Tensor:
    """Which samples [N] are classified as ``y``. The argmax of NaN is the place of the NaN, and no answer."""
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)
