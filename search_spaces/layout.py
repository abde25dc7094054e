"""Layout: which kind of cell stands where, and the filter ratio of each section.

A network of L cells is cut into sections by reduction cells; each section repeats one kind of cell and
has its own number of filters. Ablations of placement (A-A-R, R-R-A, ...), of the ratio (1:2:2, 1:2:4, ...) and of
depth (2-4-2 cells, 4-2-2 cells, ...) are other values of this data.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

MAX_CELLS = 1024


@dataclass(frozen=True)
class PlacedCell:
    """One cell of a network: its kind, filters per node, whether it halves the map, and its section."""

    kind: str
    channels: int
    reduces: bool
    section: int


@dataclass(frozen=True)
class Layout:
    """Kinds of cell by section, the filter ratio of the sections, the kind that joins two sections, and the stem.

    sections: kind of the normal cells of each section, from input to output.
    ratio: filters of each section in units of the network's base channels.
    reduction: kind of the cell at the start of every section but the first.
    stem: the stem halves the image until its shorter side is at most this many pixels: at 64, images of 32 and 64
    pixels keep their size, 96 become 48 and 224 become 56. A smaller stem is faster and sees less.
    depths: cells of each section, the reduction at its start included. The network then has just these, whatever
    number of cells is asked for elsewhere. Without depths, the cells of a network are cut into even sections.
    """

    sections: tuple[str, ...]
    ratio: tuple[int, ...]
    reduction: str = "reduction"
    stem: int = 64
    depths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sections:
            raise ValueError("a layout needs at least one section")
        if len(self.sections) != len(self.ratio):
            raise ValueError(f"{len(self.sections)} sections but {len(self.ratio)} numbers in the filter ratio")
        if min(self.ratio) < 1 or max(self.ratio) > 1024:
            raise ValueError("the filter ratio must consist of integers from 1 to 1024")
        if not 4 <= self.stem <= 8192:
            raise ValueError(f"stem must be from 4 to 8192 pixels, not {self.stem}")
        if self.depths:
            self._check_depths()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The distinct kinds of cell in order of first appearance, reduction included."""
        order = [self.sections[0]]
        for kind in self.sections[1:]:
            order += [self.reduction, kind]
        return tuple(dict.fromkeys(order))

    @property
    def minimum_cells(self) -> int:
        """The fewest cells with which every kind of cell appears and no two reductions coincide."""
        if self.depths:
            return sum(self.depths)
        return next(count for count in range(len(self.sections), 4 * len(self.sections) + 1) if self._complete(count))

    def count(self, cells: int) -> int:
        """How many cells a network has for which ``cells`` are asked: the depths, where given, decide."""
        return sum(self.depths) or cells

    def reductions(self, cells: int) -> tuple[int, ...]:
        """Indices of the reduction cells: where sections of ``depths`` begin, else i*L // S, as in DARTS and ARNAS."""
        if self.depths:
            return tuple(accumulate(self.depths[:-1]))
        sections = len(self.sections)
        return tuple(i * cells // sections for i in range(1, sections))

    def place(self, cells: int, channels: int) -> tuple[PlacedCell, ...]:
        """The cells of a network of ``cells`` cells and ``channels`` base channels, from input to output.

        ``cells`` is not used where the layout has depths.
        """
        cells = self.count(cells)
        if cells < self.minimum_cells:
            raise ValueError(
                f"{cells} cells are too few for {len(self.sections)} sections ({'-'.join(self.sections)}): "
                f"give at least {self.minimum_cells}"
            )
        if not self._complete(cells):
            # Above the minimum, too: 5 sections A-A-B-A-A of 8 cells leave none to B.
            enough = next(count for count in range(cells, 4096) if self._complete(count))
            raise ValueError(
                f"{cells} cells leave a section of {'-'.join(self.sections)} without a cell of its kind: give {enough}"
            )
        if channels < 1:
            raise ValueError(f"channels must be at least 1, not {channels}")
        reductions = self.reductions(cells)
        placed = []
        for index in range(cells):
            section = sum(index >= reduction for reduction in reductions)
            reduces = index in reductions
            kind = self.reduction if reduces else self.sections[section]
            placed.append(PlacedCell(kind, channels * self.ratio[section], reduces, section))
        return tuple(placed)

    def to_data(self) -> dict[str, Any]:
        """Plain lists and dictionaries, as written to JSON; depths only where given, so that older digests stay."""
        return {
            "sections": list(self.sections),
            "ratio": list(self.ratio),
            "reduction": self.reduction,
            "stem": self.stem,
            **({"depths": list(self.depths)} if self.depths else {}),
        }

    def _check_depths(self) -> None:
        if len(self.depths) != len(self.sections):
            raise ValueError(f"{len(self.sections)} sections but depths for {len(self.depths)}: give one a section")
        if min(self.depths) < 1 or sum(self.depths) > MAX_CELLS:
            raise ValueError(f"depths must be at least 1 and add up to at most {MAX_CELLS} cells")
        if not self._complete(sum(self.depths)):
            raise ValueError(
                "depths leave a kind of cell out: every section but the first begins with a reduction, so give one "
                "section of each kind at least 2 cells (the first 1)"
            )

    def _complete(self, cells: int) -> bool:
        """Whether every kind of cell appears at least once."""
        reductions = self.reductions(cells)
        normal = {self.sections[sum(i >= r for r in reductions)] for i in range(cells) if i not in reductions}
        return normal == set(self.sections) and len(set(reductions)) == len(reductions)
