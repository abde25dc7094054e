"""Random architectures of a given size: what a search has to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nas.errors import InputError
from search_spaces.cell_space import CellSpace
from search_spaces.genotype import Genotype


def random_cells(
    space: CellSpace,
    count: int,
    size: Callable[[Genotype], int],
    target: int,
    tolerance: float,
    generator: torch.Generator,
    draws: int = 5000,
) -> list[Genotype]:
    """``count`` different genotypes drawn uniformly among those whose size is within ``tolerance`` of ``target``.

    size: parameters of a genotype's network. Raises ``InputError`` when ``draws`` genotypes do not contain enough.
    """
    found: list[Genotype] = []
    for _ in range(draws):
        if len(found) == count:
            return found
        genotype = space.random(generator)
        if abs(size(genotype) - target) <= tolerance * target and genotype not in found:
            found.append(genotype)
    raise InputError(
        f"only {len(found)} of {count} random cells within {tolerance:.0%} of {target} parameters were found in {draws} "
        "draws: raise baselines.tolerance or lower baselines.random"
    )
