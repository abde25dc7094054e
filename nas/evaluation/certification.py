"""Randomised smoothing: certified l_2 radii of a network that votes under Gaussian noise.

Cohen, Rosenfeld & Kolter, ICML 2019, arXiv 1902.02918: the smoothed classifier g(x) = argmax_c P(f(x + sigma n) = c),
n standard normal, does not change within the radius sigma Phi^-1(p) of x, where p > 1/2 bounds from below the
probability of its class (theorem 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from nas.errors import InputError
from nas.evaluation.interval import wilson
from nas.model_state import crafting

ABSTAINED = -1


@dataclass(frozen=True)
class Smoothing:
    """How a smoothed classifier is sampled.

    sigma: deviation of the noise in pixel units;  n0: draws that pick the class to certify;  n: draws that certify
    it;  alpha: the probability, for each image apart, that its certificate is wrong.
    """

    sigma: float = 0.25
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise InputError(f"sigma must be a number above 0, not {self.sigma}")
        if self.n0 < 1 or self.n < 1:
            raise InputError(f"n0 and n must be at least 1, not {self.n0} and {self.n}")
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha is a probability between 0 and 1, not {self.alpha}")

    def certify(
        self, model: nn.Module, x: Tensor, *, generator: torch.Generator, batch_size: int = 1000
    ) -> Certificates:
        """Certificates for images ``x`` [N, C, H, W], ``model`` in eval mode (algorithm CERTIFY).

        A pass that gives no number votes for no class.
        """
        selection = votes(model, x, self.sigma, self.n0, generator=generator, batch_size=batch_size)
        chosen = selection.argmax(1, keepdim=True)
        estimation = votes(model, x, self.sigma, self.n, generator=generator, batch_size=batch_size)
        counts = estimation.gather(1, chosen).squeeze(1)
        probability = lower_bound(counts, self.n, self.alpha)
        certain = probability > 0.5
        radius = self.sigma * torch.special.ndtri(probability.clamp_min(0.5))
        return Certificates(self, torch.where(certain, chosen.squeeze(1), ABSTAINED), radius)

    def predict(self, model: nn.Module, x: Tensor, *, generator: torch.Generator, batch_size: int = 1000) -> Tensor:
        """Classes [N] of the smoothed classifier, ``ABSTAINED`` where the first two cannot be told apart.

        Algorithm PREDICT by ``n`` draws: a two-sided binomial test of equal odds at level ``alpha``.
        """
        counts = votes(model, x, self.sigma, self.n, generator=generator, batch_size=batch_size)
        (first, second), order = counts.topk(2, dim=1).values.unbind(1), counts.argmax(1)
        # Of equal odds both tails are alike: the two-sided probability is twice the upper tail.
        tail = stats.binom.sf(first.cpu().numpy() - 1, (first + second).cpu().numpy(), 0.5)
        certain = torch.from_numpy(2 * tail).to(x.device) <= self.alpha
        return torch.where(certain, order, ABSTAINED)

    def __str__(self) -> str:
        return f"smoothing sigma {self.sigma:g}, n0 {self.n0}, n {self.n}, alpha {self.alpha:g}"


@dataclass(frozen=True, eq=False)
class Certificates:
    """What is certified of a smoothed classifier.

    prediction: [N] int64, ``ABSTAINED`` where no class is likely enough;  radius: [N] float64, l_2 in pixel units, 0
    there.
    """

    smoothing: Smoothing
    prediction: Tensor
    radius: Tensor

    def accuracy(self, y: Tensor, radii: Tensor) -> Tensor:
        """Certified accuracy [len(radii)]: the share of images that are right at every point within that radius."""
        held = (self.prediction == y).unsqueeze(1) & (self.radius.unsqueeze(1) >= radii.to(self.radius))
        return held.double().mean(0)

    def to_data(self, y: Tensor, radii: Tensor) -> dict[str, Any]:
        """The curve with its 95 % intervals (over the choice of images), abstentions and how it was made."""
        n = len(y)
        curve = self.accuracy(y, radii)
        return {
            "n": n,
            "settings": str(self.smoothing),
            "abstained": int((self.prediction == ABSTAINED).sum()),
            "radii": radii.tolist(),
            "certified_accuracy": curve.tolist(),
            "intervals": [list(wilson(round(share * n), n)) for share in curve.tolist()],
        }


def votes(
    model: nn.Module, x: Tensor, sigma: float, draws: int, *, generator: torch.Generator, batch_size: int = 1000
) -> Tensor:
    """How often the model, in eval mode, gives each class to ``draws`` noisy copies of each image: [N, K] int64."""
    if len(x) == 0:
        raise InputError("there are no images to vote on: give at least one")
    counts: Tensor | None = None
    with crafting(model), torch.no_grad():
        for start in range(0, len(x) * draws, batch_size):  # copies of one image after those of the other
            rows = torch.arange(start, min(start + batch_size, len(x) * draws), device=x.device) // draws
            images = x[rows]
            noise = torch.randn(images.shape, generator=generator, device=x.device, dtype=x.dtype)
            logits = model(images + sigma * noise)
            if counts is None:
                counts = torch.zeros(len(x), logits.shape[1], dtype=torch.int64, device=x.device)
            valid = (~logits.isnan().any(1)).long()
            counts.index_put_((rows, logits.argmax(1)), valid, accumulate=True)
    assert counts is not None
    return counts


def lower_bound(counts: Tensor, n: int, alpha: float) -> Tensor:
    """One-sided lower confidence bounds (Clopper & Pearson) [N] of what was seen ``counts`` times in ``n``; float64."""
    successes = counts.cpu().numpy()
    # Beta(0, .) is no distribution; without a success the bound is 0.
    bounds = stats.beta.ppf(alpha, successes.clip(1), n - successes.clip(1) + 1)
    return torch.from_numpy(bounds * (successes > 0)).to(counts.device)
