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
    fit: Callable[[Genotype], tuple[int, int]],
    target: int,
    tolerance: float,
    generator: torch.Generator,
    draws: int = 1000,
) -> list[tuple[Genotype, int]]:
    """``count`` different genotypes drawn uniformly, each with the channels that bring it to ``target`` parameters.

    fit: the channels at which a genotype's network comes nearest to the target, and its parameters there. A draw
    further than ``tolerance`` (relative) from the target is dropped: channels are whole numbers. Fitting channels
    instead of drawing until the size fits keeps the operations uniform; a search that likes large operations would
    otherwise be compared with random cells of large operations only. Raises ``InputError`` when ``draws`` draws do
    not give enough.
    """
    found: list[tuple[Genotype, int]] = []
    for _ in range(draws):
        if len(found) == count:
            break
        genotype = space.random(generator)
        channels, size = fit(genotype)
        if abs(size - target) <= tolerance * target and genotype not in [other for other, _ in found]:
            found.append((genotype, channels))
    if len(found) == count:
        return found
    raise InputError(
        f"only {len(found)} of {count} random cells within {tolerance:.0%} of {target} parameters were found in "
        f"{draws} draws: raise baselines.tolerance or lower baselines.random"
    )
