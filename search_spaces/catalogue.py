"""Spaces and published genotypes by name. A space is a module of this package with a SPACE in it."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Protocol

from torch import nn

import search_spaces
from search_spaces.genotype import AnyGenotype, GenotypeError, read_genotype


class Space(Protocol):
    """What every space offers: a name, a check of its genotypes, and the network of a genotype."""

    @property
    def name(self) -> str: ...

    def check(self, genotype: AnyGenotype) -> None: ...

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
    ) -> nn.Module: ...


@cache
def spaces() -> dict[str, Space]:
    """All spaces by name."""
    found = {}
    for module_info in pkgutil.iter_modules(search_spaces.__path__):
        if module_info.name.startswith("_"):
            continue
        space = getattr(importlib.import_module(f"search_spaces.{module_info.name}"), "SPACE", None)
        if space is not None:
            found[module_info.name] = space
    return found


def space_of(genotype: AnyGenotype) -> Space:
    """The space a genotype belongs to, after checking that it does."""
    space = spaces().get(genotype.space)
    if space is None:
        raise GenotypeError(f"unknown search space '{genotype.space}'; known: {', '.join(sorted(spaces()))}")
    space.check(genotype)
    return space


def published() -> dict[str, Path]:
    """Published genotypes by name."""
    folder = resources.files("search_spaces").joinpath("published")
    return {
        Path(str(entry)).stem: Path(str(entry))
        for entry in sorted(folder.iterdir(), key=str)
        if entry.name.endswith(".json")
    }


def load_genotype(name_or_path: str) -> AnyGenotype:
    """A published genotype by name (case does not matter) or one from a file, checked against its space."""
    known = published()
    path = known.get(name_or_path.lower())
    if path is None:
        path = Path(name_or_path)
        if not path.exists():
            raise GenotypeError(f"no genotype '{name_or_path}': give a file or a published name ({', '.join(known)})")
    genotype = read_genotype(path)
    try:
        space_of(genotype)
    except GenotypeError as error:
        raise GenotypeError(f"{name_or_path}: {error}") from None
    return genotype
