"""Kernel regression with the neural tangent kernel of an infinitely wide network, as a model that can be attacked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import InputError


@dataclass(frozen=True)
class ReluKernel:
    """The tangent kernel of a fully connected ReLU network of infinite width, with ``depth`` hidden layers.

    Jacot, Gabriel & Hongler, NeurIPS 2018, arXiv 1806.07572, with the arc-cosine integrals of Cho & Saul, NeurIPS
    2009: S_0 = v x.x'/D + b; from layer to layer, with the angle t of S,
    S <- v/2 sqrt(S(x,x) S(x',x')) (sin t + (pi - t) cos t)/pi + b and T <- S + T v/2 (pi - t)/pi, T_0 = S_0. All
    layers are trained; weights are drawn with variance v over their number of inputs, biases with variance b. Depth 0
    is the linear kernel. Computed in the type of the arguments: float64 unless accuracy does not matter.
    """

    depth: int = 3
    weight_variance: float = 2.0
    bias_variance: float = 0.01

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise InputError(f"the depth of a kernel must be at least 0 (0 = linear), not {self.depth}")
        if not self.weight_variance > 0 or not self.bias_variance >= 0:
            raise InputError("weight_variance of a kernel must be above 0 and bias_variance at least 0")

    def __call__(self, x: Tensor, other: Tensor) -> Tensor:
        """[N, M] for vectors ``x`` [N, D] and ``other`` [M, D]."""
        covariance = self.weight_variance / x.shape[1] * (x @ other.T) + self.bias_variance
        own, others = self._variance(x).unsqueeze(1), self._variance(other).unsqueeze(0)
        tangent = covariance
        # Nearer to 1 an angle is nothing but rounding, and its derivative infinite.
        precision = torch.finfo(x.dtype)
        largest = 1 - 50 * precision.eps
        for _ in range(self.depth):
            length = (own * others).sqrt()
            # Vectors of no length have no angle; whatever stands there is multiplied by 0.
            cosine = (covariance / length.clamp_min(precision.tiny)).clamp(-largest, largest)
            angle = torch.acos(cosine)
            half = self.weight_variance / 2
            rest = (math.pi - angle) / math.pi
            covariance = half * length * ((1 - cosine.square()).sqrt() / math.pi + cosine * rest) + self.bias_variance
            tangent = covariance + half * rest * tangent
            own, others = half * own + self.bias_variance, half * others + self.bias_variance
        return tangent

    def diagonal(self, x: Tensor) -> Tensor:
        """Kernel of each of ``x`` [N, D] with itself, exactly: [N]."""
        tangent = variance = self._variance(x)
        for _ in range(self.depth):
            variance = self.weight_variance / 2 * variance + self.bias_variance
            tangent = variance + self.weight_variance / 2 * tangent
        return tangent

    def gram(self, x: Tensor) -> Tensor:
        """Kernel of ``x`` [N, D] among themselves, [N, N], with an exact diagonal."""
        own = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return torch.where(own, self.diagonal(x).unsqueeze(1), self(x, x))

    def _variance(self, x: Tensor) -> Tensor:
        return self.weight_variance / x.shape[1] * x.square().sum(1) + self.bias_variance


def centred(y: Tensor, classes: int) -> Tensor:
    """Regression targets [N, classes], float64: 1 - 1/classes for the class, -1/classes for the others."""
    return F.one_hot(y, classes).double() - 1 / classes


@dataclass(frozen=True)
class Regression:
    """Ridge regression with a kernel on pixels normalised by ``mean`` and ``std`` of each channel.

    ridge: times the mean of the diagonal of the kernel, what is added to that diagonal.
    """

    kernel: ReluKernel
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ridge: float = 1e-6

    def vectors(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] as normalised vectors [N, D], float64."""
        mean = torch.tensor(self.mean, dtype=torch.float64, device=x.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float64, device=x.device).view(1, -1, 1, 1)
        return ((x.double() - mean) / std).flatten(1)

    def coefficients(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """[n, K] for which kernel times coefficients is the regression on ``vectors`` [n, D], ``targets`` [n, K].

        Raises ``torch.linalg.LinAlgError`` where the ridge is too small for vectors that are nearly alike.
        """
        gram = self.kernel.gram(vectors)
        ridge = self.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.cholesky_solve(targets, torch.linalg.cholesky(gram + ridge))

    def __call__(self, x: Tensor, support: Tensor, targets: Tensor) -> Tensor:
        """Predictions [N, K] for images ``x``; differentiable in images, ``support`` [n, C, H, W] and ``targets``."""
        vectors = self.vectors(support)
        return self.kernel(self.vectors(x), vectors) @ self.coefficients(vectors, targets)

    def fitted(self, support: Tensor, targets: Tensor, temperature: float) -> KernelClassifier:
        """The regression on ``support`` as a model; its logits are predictions over ``temperature``."""
        with torch.no_grad():
            vectors = self.vectors(support)
            return KernelClassifier(self, vectors, self.coefficients(vectors, targets), temperature)


class KernelClassifier(nn.Module):
    """A fitted regression: images [N, C, H, W] to logits [N, K] of the images' type. Computes in float64.

    Predictions lie between -0.1 and 0.9 or so, where a softmax is nearly flat: they are divided by ``temperature``.
    """

    vectors: Tensor
    coefficients: Tensor

    def __init__(self, regression: Regression, vectors: Tensor, coefficients: Tensor, temperature: float) -> None:
        super().__init__()
        self.regression = regression
        self.temperature = temperature
        self.register_buffer("vectors", vectors)
        self.register_buffer("coefficients", coefficients)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.regression.kernel(self.regression.vectors(x), self.vectors)
        return (kernel @ self.coefficients / self.temperature).to(x.dtype)
