"""Spaces of networks that are written as depths and widths of stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from search_spaces.genotype import AnyGenotype, GenotypeError, StageGenotype


class StageNetwork(Protocol):
    """What makes a network of stages: pixels [N, C, H, W] in [0, 1] to logits [N, classes], normalisation inside."""

    def __call__(
        self,
        genotype: StageGenotype,
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> nn.Module: ...


@dataclass(frozen=True)
class StageSpace:
    """A family of networks by depth and width of each stage, of at most ``stages`` stages (0: any number)."""

    name: str
    network: StageNetwork
    stages: int = 0

    def check(self, genotype: AnyGenotype) -> None:
        """Raise ``GenotypeError`` unless ``genotype`` belongs to this space."""
        if not isinstance(genotype, StageGenotype):
            raise GenotypeError(f"space '{self.name}' is described by 'depths' and 'widths', not by cells")
        if 0 < self.stages < len(genotype.depths):
            raise GenotypeError(f"space '{self.name}' has at most {self.stages} stages, not {len(genotype.depths)}")

    def build(
        self,
        genotype: AnyGenotype,
        *,
        channels: int,
        cells: int,
        input_shape: tuple[int, int, int],
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        auxiliary: bool = False,
    ) -> nn.Module:
        """The network of ``genotype``. Its size is in the genotype: channels and cells are not used."""
        del channels, cells
        if auxiliary:
            raise GenotypeError(f"space '{self.name}' has no auxiliary head: set auxiliary = false")
        self.check(genotype)
        assert isinstance(genotype, StageGenotype)
        return self.network(genotype, input_shape=input_shape, classes=classes, mean=mean, std=std)
