"""Spaces of networks that are written as depths and widths of stages, and as options where a space has any."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import nn

from search_spaces.genotype import AnyGenotype, GenotypeError, Option, StageGenotype

Options = TypeVar("Options")


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
    """A family of networks by depth and width of each stage, of at most ``stages`` stages (0: any number).

    Layers of a stage after its first are alike (nas.analysis.complexity counts on it).
    options: a frozen dataclass whose fields, their types and defaults are the options of a genotype; it may refuse
    values by ``GenotypeError``. The network reads them by ``options_of``. None: the space has no options.
    """

    name: str
    network: StageNetwork
    stages: int = 0
    options: type | None = None

    def genotype(self, depths: tuple[int, ...], widths: tuple[int, ...], **options: Option) -> StageGenotype:
        """The genotype of a member. Options at their defaults are left out: a network then has one digest."""
        given = StageGenotype(self.name, depths, widths, tuple(options.items()))
        self.check(given)
        if self.options is None:
            return given
        values: Any = options_of(given, self.options)
        stated = {field.name: (getattr(values, field.name), field.default) for field in dataclasses.fields(values)}
        changed = tuple((name, value) for name, (value, default) in stated.items() if value != default)
        return dataclasses.replace(given, options=changed)

    def check(self, genotype: AnyGenotype) -> None:
        """Raise ``GenotypeError`` unless ``genotype`` belongs to this space."""
        if not isinstance(genotype, StageGenotype):
            raise GenotypeError(f"space '{self.name}' is described by 'depths' and 'widths', not by cells")
        if 0 < self.stages < len(genotype.depths):
            raise GenotypeError(f"space '{self.name}' has at most {self.stages} stages, not {len(genotype.depths)}")
        if self.options is not None:
            options_of(genotype, self.options)
        elif genotype.options:
            raise GenotypeError(f"space '{self.name}' has no options: leave out '{genotype.options[0][0]}'")

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


def options_of(genotype: StageGenotype, kind: type[Options]) -> Options:
    """The options of ``genotype`` as a value of the dataclass ``kind``, what is not stated at its default.

    Raises ``GenotypeError`` for a name that ``kind`` does not have, with the nearest one, and for a value of another
    type; a whole number stands for a float.
    """
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Option] = {}
    for name, value in genotype.options:
        if name not in defaults:
            raise GenotypeError(f"space '{genotype.space}' has no option '{name}': {_nearest(name, list(defaults))}")
        wanted = type(defaults[name])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise GenotypeError(
                f"option '{name}' of space '{genotype.space}' must be {_TYPES[wanted]}, not {value!r}; "
                f"for example {defaults[name]!r}"
            )
        values[name] = value
    return kind(**values)


_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
