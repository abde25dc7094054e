"""Networks of cells as source text: each kind of cell a class of its own, written out edge by edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from nas.export.source_layers import CLASSES, Writer
from nas.export.source_text import TAKEN, WIDTH, Body, Shapes, Written, expression, listed, noted, words
from nas.model_file import ModelSpec
from search_spaces.genotype import Cell, Genotype
from search_spaces.layout import PlacedCell
from search_spaces.network import CellNetwork, DiscreteCell
from search_spaces.operations import OPERATIONS


class NamedEdge(NamedTuple):
    """An edge in the text: its source, its attribute, and whether a module stands on it (none for the identity)."""

    source: int
    attribute: str
    has_module: bool

    @property
    def term(self) -> str:
        """What the edge adds to its node."""
        node = f"node{self.source}"
        return f"self.{self.attribute}({node})" if self.has_module else node


@dataclass(frozen=True)
class CellClass:
    """A class of the exported file: one kind of cell, at stride 1 or as a reduction."""

    name: str
    kind: str
    cell: Cell
    reduces: bool

    @cached_property
    def nodes(self) -> list[list[NamedEdge]]:
        """The edges by the node they lead to."""
        nodes = []
        for node, incoming in enumerate(self.cell.nodes, start=2):
            edges: list[NamedEdge] = []
            for index, edge in enumerate(incoming):
                attribute = f"{edge.operation}_{edge.source}_to_{node}"
                # Nothing forbids the same edge twice.
                repeated = incoming[:index].count(edge)
                attribute += f"_again{repeated}" if repeated else ""
                halves = self.reduces and edge.source < 2
                edges.append(NamedEdge(edge.source, attribute, halves or OPERATIONS[edge.operation].kind != "skip"))
            nodes.append(edges)
        return nodes

    @cached_property
    def edges(self) -> list[NamedEdge]:
        """All edges, in the order of ``DiscreteCell.operations``."""
        return [edge for incoming in self.nodes for edge in incoming]

    def written(self, writer: Writer, cell: DiscreteCell) -> Written:
        """``cell`` by its parts."""
        parts = writer.parts(preprocess0=cell.preprocess0, preprocess1=cell.preprocess1)
        for edge, operation in zip(self.edges, cell.operations, strict=True):
            if edge.has_module:
                parts[edge.attribute] = writer(operation)
        return Written(self.name, parts=parts)

    def text(self, form: CellForm) -> str:
        """The text of the class."""
        halving = ", which halves the map" if self.reduces else ""
        unused = [node for node in (0, 1) if all(edge.source != node for edge in self.edges)]
        outputs = [f"node{node}" for node in range(2, 2 + len(self.cell.nodes))]
        lines = [
            f"class {self.name}({'nn.Module' if form.whole else 'Layers'}):",
            f'    """The {words(self.kind)} cell{halving}.',
            "",
            "    Node 0 is the output of the cell before the previous one, node 1 that of the previous one.",
            "    A bare node in a sum is a skip connection.",
            *(f"    Nothing takes node {node}." for node in unused),
            '    """',
            "",
            *form.constructor,
            "    def forward(self, before_previous: Tensor, previous: Tensor) -> Tensor:",
        ]
        for node, argument in enumerate(["before_previous", "previous"]):
            if node not in unused:
                lines.append(f"        node{node} = self.preprocess{node}({argument})")
        for node, incoming in enumerate(self.nodes, start=2):
            lines += _sum(f"node{node}", [edge.term for edge in incoming])
        lines += listed("return torch.cat([", outputs, "], dim=1)", indent=8)
        return "\n".join(lines)


@dataclass(frozen=True)
class CellForm:
    """How the cells of one class stand in a file.

    constructor: the lines of what makes their layers; none where each cell is given its own, because they differ by
    more than their numbers of channels.  asks: whether it asks if input 0 is to be halved.
    """

    constructor: Sequence[str] = ()
    asks: bool = False

    @property
    def whole(self) -> bool:
        """Whether the class makes the layers."""
        return bool(self.constructor)

    def of(self, cell: Written) -> Written:
        """``cell`` in this form."""
        if not self.whole:
            return cell
        channels = _channels(cell)
        assert channels is not None
        in0, in1, own = channels
        asked = [f"halve_input0={_halves(cell)}"] if self.asks else []
        return replace(cell, arguments=[in0, in1, f"channels={own}", *asked], makes_parts=True)


def cell_form(cells: Sequence[Written]) -> CellForm:
    """The form of the cells of one class, whose blocks are in their forms."""
    texts = {tuple(lines) if (lines := _symbolic_edges(cell)) is not None else None for cell in cells}
    if len(texts) != 1 or None in texts:
        return CellForm()
    (edges,) = texts
    assert edges is not None
    halves = {_halves(cell) for cell in cells}
    keep, halve = "Preprocess(in_channels0, channels)", "FactorisedReduce(in_channels0, channels)"
    parameters = ["self", "in_channels0: int", "in_channels1: int", "channels: int"]
    if len(halves) == 1:
        inputs = [f"        self.preprocess0 = {halve if True in halves else keep}"]
    else:
        parameters.append("halve_input0: bool")
        inputs = [
            "        self.preprocess0: nn.Module",
            "        if halve_input0:",
            f"            self.preprocess0 = {halve}",
            "        else:",
            f"            self.preprocess0 = {keep}",
        ]
    constructor = [
        f"    def __init__({', '.join(parameters)}) -> None:",
        "        super().__init__()",
        *inputs,
        "        self.preprocess1 = Preprocess(in_channels1, channels)",
        *edges,
        "",
    ]
    return CellForm(constructor, len(halves) == 2)


CHANNELS = {"Preprocess": 2, "FactorisedReduce": 2, "SeparableConv": 1}
"""How many of the numbers of a block, the first ones, are numbers of channels."""


def _channels(cell: Written) -> tuple[str, str, str] | None:
    """Channels of input 0, of input 1 and of a cell whose inputs stand whole and agree."""
    inputs = [cell.parts["preprocess0"], cell.parts["preprocess1"]]
    if any(part is None or part.call not in CHANNELS or not part.makes_parts for part in inputs):
        return None
    (in0, own), (in1, other) = [part.arguments for part in inputs if part is not None]
    return (in0, in1, own) if own == other else None


def _halves(cell: Written) -> bool:
    first = cell.parts["preprocess0"]
    return first is not None and first.call == "FactorisedReduce"


def _symbolic_edges(cell: Written) -> list[str] | None:
    """The statements that make the modules on the edges, for any number of channels; None where there are no such."""
    channels = _channels(cell)
    if channels is None:
        return None
    lines = []
    for attribute, part in cell.parts.items():
        if attribute in ("preprocess0", "preprocess1"):
            continue
        symbolic = _symbolic(part, channels[2])
        if symbolic is None:
            return None
        lines += expression(symbolic, f"self.{attribute} = ", "", 8)
    return lines


def _symbolic(part: Written | None, channels: str) -> Written | None:
    """``part`` with the word "channels" in the place of that number; None where it has other numbers."""
    if part is None or part.call in ("nn.MaxPool2d", "nn.AvgPool2d"):
        return part
    if part.call == "nn.Sequential":
        stages = {name: _symbolic(stage, channels) for name, stage in part.parts.items()}
        return None if None in stages.values() else replace(part, parts=stages)
    count = CHANNELS.get(part.call, 0)
    if not (count and part.makes_parts) or any(number != channels for number in part.arguments[:count]):
        return None
    return replace(part, arguments=["channels"] * count + [*part.arguments[count:]])


def cell_body(spec: ModelSpec, genotype: Genotype, network: CellNetwork, shapes: Shapes, name: str) -> Body:
    """A network of cells, which is to be a class ``name``."""
    writer = Writer(network)
    places = genotype.layout.place(spec.cells, spec.channels)
    classes = _cell_classes(genotype, places, {*TAKEN, *CLASSES, name})
    cells: dict[str, Written | None] = {}
    for index, (place, cell) in enumerate(zip(places, network.cells, strict=True)):
        assert isinstance(cell, DiscreteCell)
        written = classes[place.kind, place.reduces].written(writer, cell)
        cells[str(index)] = replace(written, comment=f"{index}{noted(shapes, f'cells.{index}', ' ')}")
    parts = {
        "stem": replace(writer(network.stem), comment=noted(shapes, "stem")),
        "cells": Written("nn.ModuleList", parts=cells),
        "classifier": writer(network.classifier),
    }
    forward = [
        "previous = current = self.stem((x - self.mean) / self.std)",
        "for cell in self.cells:",
        "    previous, current = current, cell(previous, current)",
        "return self.classifier(current.mean((2, 3)))",
    ]
    return Body(f"{len(places)} cells", {**writer.borrowed, **parts}, forward, kinds=[*classes.values()])


def _cell_classes(
    genotype: Genotype, places: Sequence[PlacedCell], taken: set[str]
) -> dict[tuple[str, bool], CellClass]:
    """The classes of cell by kind and stride, in the order in which the network first uses them."""
    classes: dict[tuple[str, bool], CellClass] = {}
    for kind, reduces in dict.fromkeys((place.kind, place.reduces) for place in places):
        # One kind may stand both inside a section and between two: its edges then differ in stride.
        halving = "Halving" if reduces and (kind, False) in {(place.kind, place.reduces) for place in places} else ""
        stem = halving + "".join(word[0].upper() + word[1:] for word in words(kind).split())[:40] + "Cell"
        if stem[0].isdigit():
            stem = f"Kind{stem}"
        # Two kinds may differ only in characters that no class name can have.
        unavailable = taken | {other.name for other in classes.values()}
        number, name = 1, stem
        while name in unavailable:
            number += 1
            name = f"{stem}{number}"
        classes[kind, reduces] = CellClass(name, kind, genotype.cell[kind], reduces)
    return classes


def _sum(name: str, terms: Sequence[str]) -> list[str]:
    line = f"        {name} = {' + '.join(terms)}"
    if len(line) <= WIDTH:
        return [line]
    first, *others = terms
    return [f"        {name} = (", f"            {first}", *(f"            + {term}" for term in others), "        )"]
