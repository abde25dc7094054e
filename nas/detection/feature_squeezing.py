"""Feature squeezing: an image whose prediction changes when detail is taken away is taken for an adversarial one.

Xu, Evans & Qi, NDSS 2018, arXiv 1704.01155, section 5. A detector is no robustness: what it is worth is said by an
attack that knows it (``nas.detection.evasion``), and the table of a naive attack should not stand without that of the
adaptive one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from nas.attacks.losses import right
from nas.detection.squeezers import BitDepth, MedianFilter, Squeezer
from nas.errors import InputError
from nas.evaluation.interval import wilson
from nas.model_state import crafting


@dataclass(frozen=True)
class FeatureSqueezing:
    """The joint score: the largest change of the prediction that any of ``squeezers`` causes.

    s(x) = max_i || p(x) - p(q_i(x)) ||_1 in [0, 2] with p = softmax(logits). The default squeezers are those that the
    paper found best on MNIST; on CIFAR-10 they were BitDepth(5), MedianFilter(2, 2) and NonLocalMeans(13, 3, 2).
    """

    squeezers: tuple[Squeezer, ...] = (BitDepth(1), MedianFilter(2, 2))

    def __post_init__(self) -> None:
        if not self.squeezers:
            raise InputError("feature squeezing needs at least one squeezer")

    def views(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [1 + number of squeezers, N, K] of the images and of each squeezed version, in this order.

        Differentiable; call it inside ``model_state.crafting``.
        """
        images = [x, *(squeezer(x) for squeezer in self.squeezers)]
        logits: Tensor = model(torch.cat(images))
        return logits.unflatten(0, (len(images), len(x)))

    def scores(self, model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
        """s(x) [N], in eval mode, without gradients."""
        with crafting(model), torch.no_grad():
            return torch.cat([joint_score(self.views(model, images)) for images in x.split(batch_size)])

    def __str__(self) -> str:
        return "feature squeezing (" + ", ".join(map(str, self.squeezers)) + ")"


@dataclass(frozen=True)
class Detector:
    """Takes an image for adversarial where its score is above ``threshold``."""

    squeezing: FeatureSqueezing
    threshold: float

    def flags(self, model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
        """Which images [N] are taken for adversarial."""
        return _above(self.squeezing.scores(model, x, batch_size), self.threshold)

    def __str__(self) -> str:
        return f"{self.squeezing}, threshold {self.threshold:.6g}"


def joint_score(views: Tensor) -> Tensor:
    """s [N] from the logits ``views`` [1 + squeezers, N, K] of images and their squeezed versions."""
    probabilities = views.softmax(2)
    return (probabilities[1:] - probabilities[0]).abs().sum(2).amax(0)


def threshold_at(scores: Tensor, false_positive_rate: float) -> float:
    """The lowest threshold at which at most this share of ``scores`` [n], of legitimate images, lies above it.

    Choose it on images that serve neither to train the network nor to count false positives afterwards.
    """
    if not 0 <= false_positive_rate < 1:
        raise InputError(f"a false-positive rate is at least 0 and below 1, not {false_positive_rate}")
    if len(scores) == 0 or not bool(scores.isfinite().all()):
        raise InputError("a threshold needs finite scores of at least one legitimate image")
    # Counted from above: n (1 - rate) may be rounded to either side of the whole number that it is.
    allowed = math.floor(len(scores) * false_positive_rate + 1e-9)
    return float(scores.sort().values[len(scores) - 1 - allowed])


@dataclass(frozen=True, eq=False)
class Detection:
    """How an attack fares against network and detector: masks [N] over the attacked images.

    adversarial: misclassified;  flagged: taken for adversarial;  auc: area under the ROC curve of the scores of
    successful adversarial images against those of the legitimate ones, NaN where none was successful.
    """

    adversarial: Tensor
    flagged: Tensor
    auc: float

    def to_data(self) -> dict[str, Any]:
        """Counts, rates (null where there is nothing to count) and the 95 % interval of the detection rate."""
        n, successful = len(self.adversarial), int(self.adversarial.sum())
        caught = int((self.adversarial & self.flagged).sum())
        return {
            "n": n,
            "successful": successful,
            "detected": caught / successful if successful else None,
            "interval": list(wilson(caught, successful)) if successful else None,
            "failed_flagged": int((~self.adversarial & self.flagged).sum()) / (n - successful)
            if successful < n
            else None,
            "undetected_success": (successful - caught) / n,
            "auc": self.auc if successful else None,
        }


def detection(
    detector: Detector, model: nn.Module, clean: Tensor, attacked: Tensor, y: Tensor, batch_size: int = 256
) -> Detection:
    """What ``detector`` makes of images ``attacked`` [N, C, H, W] with true labels ``y`` [N].

    clean: [M, C, H, W] legitimate images for the ROC curve, misclassified ones among them.
    """
    scores = detector.squeezing.scores(model, attacked, batch_size)
    with crafting(model), torch.no_grad():
        pairs = zip(attacked.split(batch_size), y.split(batch_size), strict=True)
        adversarial = torch.cat([~right(model(images), labels) for images, labels in pairs])
    auc = math.nan
    if bool(adversarial.any()):
        legitimate = detector.squeezing.scores(model, clean, batch_size)
        truth = torch.cat([torch.zeros(len(legitimate)), torch.ones(int(adversarial.sum()))])
        auc = float(roc_auc_score(truth.numpy(), torch.cat([legitimate, scores[adversarial]]).cpu().numpy()))
    return Detection(adversarial, _above(scores, detector.threshold), auc)


def _above(scores: Tensor, threshold: float) -> Tensor:
    return ~(scores <= threshold)  # what is no number is suspicious
