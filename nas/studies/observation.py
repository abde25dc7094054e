"""One trained network of a study, as data: what it is, what it costs, and how accurate and robust it was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Observation:
    """A configuration trained with one seed.

    configuration: digest of its genotype;  space: of the genotype;  depths, widths: blocks (or cells) and channels of
    each stage (or section);  options: of the block;  parameters, macs: in total;  stage_parameters, stage_macs: of each
    stage, without stem and classifier;  epochs: it was trained for;  natural, robust: accuracy and worst-case accuracy
    on the ``n`` test images, shares from 0 to 1;  measures: cheap predictors and stability measures by name;
    latency: seconds of a batch of one image, where measured.
    """

    configuration: str
    space: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    parameters: int
    macs: int
    stage_parameters: tuple[int, ...]
    stage_macs: tuple[int, ...]
    seed: int
    epochs: int
    natural: float
    robust: float
    n: int
    options: tuple[tuple[str, Any], ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)
    latency: float | None = None

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def last_share(self) -> float:
        """Share of the stages' parameters that the last stage has."""
        return self.stage_parameters[-1] / sum(self.stage_parameters)


def by_configuration(observations: Iterable[Observation]) -> dict[str, Sequence[Observation]]:
    """The observations of each configuration, its seeds together, in the order of their first appearance."""
    groups: dict[str, list[Observation]] = {}
    for observation in observations:
        groups.setdefault(observation.configuration, []).append(observation)
    return {name: sorted(group, key=lambda one: one.seed) for name, group in groups.items()}
