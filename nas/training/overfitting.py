"""Overfitting as the records of a training show it: slowly, to the images, or suddenly, to the attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FALL = 0.2
"""Robust accuracy lost from one validation to the next that is no noise any more."""


def robust_overfitting(records: Sequence[Mapping[str, Any]], robust: float) -> float:
    """How far validated accuracy ``robust`` is below the best of the ``records`` so far; 0 where it is the best.

    Rice, Wong & Kolter, ICML 2020, arXiv 2002.11569: robust accuracy peaks long before training ends.
    """
    return max([record.get("validation_robust", robust) for record in records] + [robust]) - robust


def collapse_warning(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Catastrophic overfitting to be told of the last of ``records``; None where there is nothing to tell.

    Wong, Rice & Kolter, ICLR 2020, arXiv 2001.03994: the network learns to fool the training attack, so that accuracy
    under it rises and under any other vanishes. Told where accuracy under the validation attack fell by more than
    ``FALL`` since the validation before while training accuracy rose.
    """
    validated = [record for record in records if "validation_robust" in record]
    if len(validated) < 2 or validated[-1] is not records[-1] or "accuracy" not in records[-1]:
        return None
    before, now = validated[-2:]
    if before["validation_robust"] - now["validation_robust"] <= FALL or now["accuracy"] <= before["accuracy"]:
        return None
    return (
        f"epoch {now['epoch']}: accuracy under the validation attack fell from {before['validation_robust']:.1%} to "
        f"{now['validation_robust']:.1%} while accuracy in training rose to {now['accuracy']:.1%}: catastrophic "
        "overfitting to the training attack; take more steps, method 'n_fgsm' or 'grad_align', a smaller epsilon or a "
        "lower learning rate"
    )
