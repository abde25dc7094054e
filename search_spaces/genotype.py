"""Genotype: a discovered architecture as frozen, hashable, torch-free data with a JSON form.

Two forms share one file format: ``Genotype`` for cell spaces (which operation joins which nodes of each kind
of cell, and where the kinds stand) and ``StageGenotype`` for networks written as depths and widths of stages.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from search_spaces.layout import Layout

SCHEMA = 1
MAX_NODES = 64
MAX_STAGES = 64
MAX_DEPTH = 1024
MAX_WIDTH = 16384
MAX_OPTIONS = 32

Option = str | int | float | bool


class GenotypeError(ValueError):
    """Data that is not a genotype; the message is one line naming the place and the remedy."""


class Edge(NamedTuple):
    """``operation`` applied to node ``source``. Nodes 0 and 1 are the cell's inputs, 2 the first intermediate node."""

    operation: str
    source: int


@dataclass(frozen=True)
class Cell:
    """One kind of cell: for each intermediate node its incoming edges. The output concatenates all of them."""

    nodes: tuple[tuple[Edge, ...], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.nodes) <= MAX_NODES:
            raise GenotypeError(f"a cell has {len(self.nodes)} intermediate nodes; give 1 to {MAX_NODES}")
        for position, incoming in enumerate(self.nodes):
            node = position + 2
            if not 1 <= len(incoming) <= MAX_NODES:
                raise GenotypeError(f"node {node} has {len(incoming)} incoming edges; give 1 to {MAX_NODES}")
            for edge in incoming:
                if edge.source >= node:
                    raise GenotypeError(
                        f"node {node} takes input from node {edge.source}, which would form a cycle; "
                        f"sources must be smaller than {node}"
                    )
                if edge.source < 0:
                    raise GenotypeError(f"node {node} takes input from node {edge.source}; sources start at 0")


@dataclass(frozen=True)
class Genotype:
    """An architecture of a cell space: its cells by kind, and the layout that places them.

    cells: (kind, Cell) pairs in the order of ``layout.kinds``.
    """

    space: str
    layout: Layout
    cells: tuple[tuple[str, Cell], ...]

    def __post_init__(self) -> None:
        kinds = tuple(kind for kind, _ in self.cells)
        if kinds != self.layout.kinds:
            raise GenotypeError(
                f"the layout needs cells of kind {', '.join(self.layout.kinds)}; the genotype has "
                f"{', '.join(kinds) or 'none'}"
            )

    @cached_property
    def cell(self) -> Mapping[str, Cell]:
        """The cells by kind."""
        return dict(self.cells)

    def to_data(self) -> dict[str, Any]:
        """Plain lists and dictionaries, as written to JSON."""
        return {
            "schema": SCHEMA,
            "space": self.space,
            "layout": self.layout.to_data(),
            "cells": {kind: [[list(edge) for edge in node] for node in cell.nodes] for kind, cell in self.cells},
        }

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this architecture."""
        return _digest(self.to_data())


@dataclass(frozen=True)
class StageGenotype:
    """An architecture written as stages: ``depths[i]`` layers (or blocks) of ``widths[i]`` channels.

    Every stage but the first begins by halving the feature map. options: what else the network takes, (name, value)
    pairs sorted by name; the space knows their names and types.
    """

    space: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.depths) <= MAX_STAGES or len(self.depths) != len(self.widths):
            raise GenotypeError(f"give as many depths as widths, 1 to {MAX_STAGES} of each")
        if min(self.depths) < 1 or min(self.widths) < 1:
            raise GenotypeError("depths and widths must be at least 1")
        if max(self.depths) > MAX_DEPTH or max(self.widths) > MAX_WIDTH:
            raise GenotypeError(f"a stage has at most {MAX_DEPTH} layers of at most {MAX_WIDTH} channels")
        _check_options(self.options)
        # In whatever order options are given, they are one architecture.
        object.__setattr__(self, "options", tuple(sorted(self.options)))

    def to_data(self) -> dict[str, Any]:
        """Plain lists and dictionaries, as written to JSON; options only where given, so that older digests stay."""
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "space": self.space,
            "depths": list(self.depths),
            "widths": list(self.widths),
        }
        return {**data, "options": dict(self.options)} if self.options else data

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this architecture."""
        return _digest(self.to_data())


AnyGenotype = Genotype | StageGenotype


def genotype_from_data(data: object) -> AnyGenotype:
    """The genotype in parsed JSON. Raises ``GenotypeError`` naming what is wrong; never anything else."""
    fields = _mapping(data, "a genotype")
    schema = fields.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise GenotypeError(
            f"genotype schema version {_short(schema)} is not known; this program reads version {SCHEMA} "
            "(a newer version needs a newer program)"
        )
    space = _text(fields.get("space"), "'space'")
    if "depths" in fields:
        _only(fields, ("schema", "space", "depths", "widths", "options"))
        return StageGenotype(
            space,
            _integers(fields["depths"], "'depths'"),
            _integers(fields.get("widths"), "'widths'"),
            tuple(_mapping(fields.get("options", {}), "'options'").items()),
        )
    _only(fields, ("schema", "space", "layout", "cells"))
    layout_fields = _mapping(fields.get("layout"), "'layout'")
    _only(layout_fields, ("sections", "ratio", "reduction", "stem", "depths"))
    sections = layout_fields.get("sections")
    if not isinstance(sections, list) or not 1 <= len(sections) <= MAX_STAGES:
        raise GenotypeError(f"'layout.sections' must be a list of 1 to {MAX_STAGES} kinds of cell")
    stem = layout_fields.get("stem", Layout.stem)
    if not _is_integer(stem):
        raise GenotypeError("'layout.stem' must be an integer")
    try:
        layout = Layout(
            stem=stem,
            sections=tuple(_text(kind, "'layout.sections'") for kind in sections),
            ratio=_integers(layout_fields.get("ratio"), "'layout.ratio'"),
            reduction=_text(layout_fields.get("reduction"), "'layout.reduction'"),
            depths=_integers(layout_fields.get("depths", []), "'layout.depths'"),
        )
    except GenotypeError:
        raise
    except ValueError as error:
        raise GenotypeError(str(error)) from None
    cells = _mapping(fields.get("cells"), "'cells'")
    for kind in layout.kinds:
        if kind not in cells:
            raise GenotypeError(f"the layout places cells of kind '{kind}', but 'cells' does not describe it")
    _only(cells, layout.kinds)
    return Genotype(space, layout, tuple((kind, _cell(cells[kind], kind)) for kind in layout.kinds))


def read_genotype(path: Path) -> AnyGenotype:
    """The genotype in a JSON file. Raises ``GenotypeError`` with the file's name."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise GenotypeError(f"cannot read genotype {path}: {reason}") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise GenotypeError(f"{path} is not JSON ({error})") from None
    try:
        return genotype_from_data(data)
    except GenotypeError as error:
        raise GenotypeError(f"{path}: {error}") from None


def _cell(data: object, kind: str) -> Cell:
    if not isinstance(data, list) or len(data) > MAX_NODES:
        raise GenotypeError(f"cell '{kind}' must be a list of at most {MAX_NODES} nodes")
    nodes = []
    for position, node in enumerate(data):
        where = f"cell '{kind}', node {position + 2}"
        if not isinstance(node, list) or len(node) > MAX_NODES:
            raise GenotypeError(f"{where} must be a list of at most {MAX_NODES} [operation, source] pairs")
        edges = []
        for edge in node:
            if not (isinstance(edge, list) and len(edge) == 2 and isinstance(edge[0], str) and _is_integer(edge[1])):
                raise GenotypeError(f"{where}: an edge must be an [operation, source] pair, not {_short(edge)}")
            edges.append(Edge(edge[0], edge[1]))
        nodes.append(tuple(edges))
    try:
        return Cell(tuple(nodes))
    except GenotypeError as error:
        raise GenotypeError(f"cell '{kind}': {error}") from None


def _check_options(options: Collection[tuple[str, object]]) -> None:
    if len(options) > MAX_OPTIONS:
        raise GenotypeError(f"a genotype has at most {MAX_OPTIONS} options, not {len(options)}")
    for name, value in options:
        _text(name, "an option's name")
        if isinstance(value, str):
            fits = len(value) <= 64
        else:
            fits = isinstance(value, bool) or _is_integer(value) or (isinstance(value, float) and math.isfinite(value))
        if not fits:
            raise GenotypeError(
                f"option '{name}' must be a text of at most 64 characters, a finite number, true or false, "
                f"not {_short(value)}"
            )
    if len({name for name, _ in options}) < len(options):
        raise GenotypeError("an option is given twice")


def _mapping(data: object, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise GenotypeError(f"{what} must be a JSON object, not {type(data).__name__}")
    return data


def _only(fields: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in fields:
        if key not in known:
            raise GenotypeError(f"unknown key {key[:60]!r}; known here: {', '.join(known)}")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 64:
        raise GenotypeError(f"{what} must be a name of 1 to 64 characters")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _short(value: object) -> str:
    """``value`` for a message; containers and endless numbers, whose text may not exist, by their type."""
    if isinstance(value, str | float | bool | None) or _is_integer(value):
        return repr(value)[:60]
    return f"a {type(value).__name__}"


def _integers(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_STAGES or not all(_is_integer(item) for item in value):
        raise GenotypeError(f"{what} must be a list of at most {MAX_STAGES} integers")
    return tuple(value)


def _digest(data: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=6).hexdigest()
