"""What an edge of the supernet computes in a search step: all candidates, mixed, or a sampled one."""

from __future__ import annotations

from dataclasses import dataclass

from nas.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """Every edge computes all its candidates and mixes them by a softmax (DARTS, arXiv 1806.09055, eq. 2)."""


@dataclass(frozen=True)
class SampledPath:
    """Every edge computes one candidate, drawn afresh for each search step (GDAS, arXiv 1910.04465, eq. 3-7).

    The temperature of the softmax whose gradient stands in for that of the draw falls linearly over the search, as in
    GDAS: high ones spread the gradient over all candidates, low ones are nearer to the draw and make it noisier.
    """

    first_temperature: float = 10.0
    last_temperature: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.last_temperature <= self.first_temperature < float("inf"):
            raise InputError(
                "temperatures of the sampled path must fall and stay above 0: first_temperature is "
                f"{self.first_temperature}, last_temperature {self.last_temperature}"
            )

    def temperature(self, progress: float) -> float:
        """The temperature after the share ``progress`` of the search."""
        return self.first_temperature + (self.last_temperature - self.first_temperature) * progress
