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


def dlr(logits: Tensor, y: Tensor, clean_logits: Tensor | None) -> Tensor:
    """Difference of logits ratio: the margin over the distance of the first from the third logit.

    Croce and Hein, ICML 2020, arXiv 2003.01690, eq. 6: free of shift and scale of the logits. With three classes it
    is constant where the right one comes last, with two it is not defined: there it is the margin itself.
    """
    if logits.shape[1] <= 3:
        return margin(logits, y, clean_logits)
    first = logits.topk(3, 1).values
    return margin(logits, y, clean_logits) / (first[:, 0] - first[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Logit of ``target`` [N] less that of ``y``, over the distance of the first from the mean of third and fourth [N].

    Croce and Hein, ICML 2020, arXiv 2003.01690, eq. 7. Not defined for fewer than four classes: there it is the
    difference itself.
    """
    rows = torch.arange(len(y), device=y.device)
    gap = logits[rows, target] - logits[rows, y]
    if logits.shape[1] <= 3:
        return gap
    first = logits.topk(4, 1).values
    return gap / (first[:, 0] - 0.5 * (first[:, 2] + first[:, 3]) + 1e-12)


LOSSES: dict[str, AttackLoss] = {"cross_entropy": cross_entropy, "margin": margin, "kl": kl, "dlr": dlr}

NEEDS_CLEAN_LOGITS = frozenset({"kl"})


def right(logits: Tensor, y: Tensor) -> Tensor:
    """Which samples [N] are classified as ``y``. The argmax of NaN is the place of the NaN, and no answer."""
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)


def likeliest_wrong(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The ``count`` classes other than ``y`` of the highest logits, highest first: [N, count], or all [N, K - 1]."""
    wrong = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return wrong.argsort(1, descending=True)[:, : min(count, logits.shape[1] - 1)]
