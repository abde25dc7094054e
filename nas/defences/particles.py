"""Several networks of one architecture that predict together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nas.errors import InputError


class Particles(nn.Module):
    """Networks whose probabilities are averaged: [N, C, H, W] to log mean softmax [N, K].

    The prediction of a Bayesian network whose posterior is a set of particles (Doan et al., ICML 2022,
    arXiv 2212.02003), or of any deep ensemble. It is deterministic, and its gradient is that of the mean prediction:
    an attack on it takes the expectation over all particles. Time, memory and size are those of as many networks.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise InputError("an ensemble needs at least 1 network")
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return mean_prediction(torch.stack([member(x).log_softmax(1) for member in self.members]))


def mean_prediction(log_probabilities: Tensor) -> Tensor:
    """Logarithm of the mean over the first axis of probabilities given by their logarithms [n, ...]."""
    return log_probabilities.logsumexp(0) - math.log(len(log_probabilities))
