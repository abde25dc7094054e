"""Networks of cells as source text: each kind of cell a class of its own, written out edge by edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn

from nas.errors import InputError
from nas.export.source_text import TAKEN, WIDTH, Body, listed, words
from nas.model_file import ModelSpec
from search_spaces.genotype import Cell, Genotype
from search_spaces.layout import PlacedCell
from search_spaces.operations import OPERATIONS


class WrittenEdge(NamedTuple):
    """An edge in the text: its operation and source, its attribute, and what makes its modules.

    modules: applied one after the other; none for the identity.
    """

    operation: str
    source: int
    attribute: str
    modules: tuple[str, ...]

    @property
    def term(self) -> str:
        """What the edge adds to its node."""
        node = f"node{self.source}"
        return f"self.{self.attribute}({node})" if self.modules else node

    def assignment(self) -> list[str]:
        """The statement that makes the attribute."""
        if len(self.modules) > 1:
            return listed(f"self.{self.attribute} = nn.Sequential(", self.modules, ")", indent=8)
        return [f"        self.{self.attribute} = {module}" for module in self.modules]


@dataclass(frozen=True)
class CellClass:
    """A class of the exported file: one kind of cell, at stride 1 or as a reduction.

    halves: whether input 0 is halved, for the places where the class stands.
    """

    name: str
    kind: str
    cell: Cell
    reduces: bool
    halves: frozenset[bool]

    @cached_property
    def nodes(self) -> list[list[WrittenEdge]]:
        """The edges by the node they lead to."""
        nodes = []
        for node, incoming in enumerate(self.cell.nodes, start=2):
            edges: list[WrittenEdge] = []
            for edge in incoming:
                attribute = f"{edge.operation}_{edge.source}_to_{node}"
                # Nothing forbids the same edge twice.
                repeated = sum((other.operation, other.source) == edge for other in edges)
                attribute += f"_again{repeated}" if repeated else ""
                stride = 2 if self.reduces and edge.source < 2 else 1
                edges.append(WrittenEdge(edge.operation, edge.source, attribute, _modules(edge.operation, stride)))
            nodes.append(edges)
        return nodes

    @cached_property
    def edges(self) -> list[WrittenEdge]:
        """All edges, in the order of ``DiscreteCell.operations``."""
        return [edge for incoming in self.nodes for edge in incoming]

    def text(self) -> str:
        """The text of the class."""
        halving = ", which halves the map" if self.reduces else ""
        parameters = ["self", "in_channels0: int", "in_channels1: int", "channels: int"]
        if len(self.halves) == 2:
            parameters.append("halve_input0: bool")
        unused = [node for node in (0, 1) if all(edge.source != node for edge in self.edges)]
        outputs = [f"node{node}" for node in range(2, 2 + len(self.cell.nodes))]
        lines = [
            f"class {self.name}(nn.Module):",
            f'    """The {words(self.kind)} cell{halving}.',
            "",
            "    Node 0 is the output of the cell before the previous one, node 1 that of the previous one.",
            "    A bare node in a sum is a skip connection.",
            *(f"    Nothing takes node {node}." for node in unused),
            '    """',
            "",
            f"    def __init__({', '.join(parameters)}) -> None:",
            "        super().__init__()",
            *self._inputs(),
            *(line for edge in self.edges for line in edge.assignment()),
            "",
            "    def forward(self, before_previous: Tensor, previous: Tensor) -> Tensor:",
        ]
        for node, argument in enumerate(["before_previous", "previous"]):
            if node not in unused:
                lines.append(f"        node{node} = self.preprocess{node}({argument})")
        for node, incoming in enumerate(self.nodes, start=2):
            lines += _sum(f"node{node}", [edge.term for edge in incoming])
        lines += listed("return torch.cat([", outputs, "], dim=1)", indent=8)
        return "\n".join(lines)

    def _inputs(self) -> list[str]:
        keep, halve = "ReluConvBn(in_channels0, channels)", "FactorisedReduce(in_channels0, channels)"
        if len(self.halves) == 1:
            lines = [f"        self.preprocess0 = {halve if True in self.halves else keep}"]
        else:
            lines = [
                "        self.preprocess0: nn.Module",
                "        if halve_input0:",
                f"            self.preprocess0 = {halve}",
                "        else:",
                f"            self.preprocess0 = {keep}",
            ]
        return [*lines, "        self.preprocess1 = ReluConvBn(in_channels1, channels)"]


def cell_body(spec: ModelSpec, genotype: Genotype, stem: nn.Sequential, name: str) -> Body:
    """The text of a network of cells in a class ``name``. stem: that of the package's network."""
    places = genotype.layout.place(spec.cells, spec.channels)
    classes = _cell_classes(genotype, places, TAKEN | {name})
    used = [classes[place.kind, place.reduces] for place in places]
    _, height, width = spec.input_shape
    for layer in stem:
        stride = layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
        height, width = -(-height // stride), -(-width // stride)
    out_channels = 3 * spec.channels
    in_channels = (out_channels, out_channels)
    init = [f"self.stem = nn.Sequential(  # -> [{out_channels}, {height}, {width}]"]
    init += [f"    {_stem_layer(layer)}," for layer in stem]
    init += [")", "self.cells = nn.ModuleList(", "    ["]
    for index, (place, cell_class) in enumerate(zip(places, used, strict=True)):
        arguments = [*map(str, in_channels), f"channels={place.channels}"]
        if len(cell_class.halves) == 2:
            arguments.append(f"halve_input0={_halves_input(places, index)}")
        if place.reduces:
            height, width = (height + 1) // 2, (width + 1) // 2
        out_channels = len(cell_class.cell.nodes) * place.channels
        placed = f"        {cell_class.name}({', '.join(arguments)}),"
        comment = f"# {index} -> [{out_channels}, {height}, {width}]"
        line = f"{placed}  {comment}"
        init += [line] if len(line) <= WIDTH else [f"        {comment}", placed]
        in_channels = (in_channels[1], out_channels)
    init += ["    ]", ")", f"self.classifier = nn.Linear({out_channels}, len(CLASSES))"]
    forward = [
        "previous = current = self.stem((x - self.mean) / self.std)",
        "for cell in self.cells:",
        "    previous, current = current, cell(previous, current)",
        "return self.classifier(current.mean((2, 3)))",
    ]
    texts = [cell_class.text() for cell_class in classes.values()]
    return Body(f"{len(places)} cells", texts, init, forward, lambda layer: _renamed(used, layer))


def _cell_classes(
    genotype: Genotype, places: Sequence[PlacedCell], taken: set[str]
) -> dict[tuple[str, bool], CellClass]:
    """The classes of cell by kind and stride, in the order in which the network first uses them."""
    halves: dict[tuple[str, bool], set[bool]] = {}
    for index, place in enumerate(places):
        halves.setdefault((place.kind, place.reduces), set()).add(_halves_input(places, index))
    classes: dict[tuple[str, bool], CellClass] = {}
    for kind, reduces in halves:
        # One kind may stand both inside a section and between two: its edges then differ in stride.
        halving = "Halving" if reduces and (kind, False) in halves else ""
        stem = halving + "".join(word[0].upper() + word[1:] for word in words(kind).split())[:40] + "Cell"
        if stem[0].isdigit():
            stem = f"Kind{stem}"
        # Two kinds may differ only in characters that no class name can have.
        unavailable = taken | {other.name for other in classes.values()}
        number, name = 1, stem
        while name in unavailable:
            number += 1
            name = f"{stem}{number}"
        classes[kind, reduces] = CellClass(name, kind, genotype.cell[kind], reduces, frozenset(halves[kind, reduces]))
    return classes


def _halves_input(places: Sequence[PlacedCell], index: int) -> bool:
    """Whether input 0 of a cell is twice as large as input 1: the previous cell, which made input 1, reduces."""
    return index > 0 and places[index - 1].reduces


def _modules(name: str, stride: int) -> tuple[str, ...]:
    """The expressions that make the modules of an operation; none for the identity."""
    operation = OPERATIONS[name]
    if operation.kind == "skip":
        return () if stride == 1 else ("FactorisedReduce(channels, channels)",)
    if operation.kind == "max_pool":
        return (f"nn.MaxPool2d(3, stride={stride}, padding=1)",)
    if operation.kind == "avg_pool":
        return (f"nn.AvgPool2d(3, stride={stride}, padding=1, count_include_pad=False)",)
    if operation.kind == "conv":
        dilation = f", dilation={operation.dilation}" if operation.dilation > 1 else ""
        strides = [f", stride={stride}" if stride > 1 else "", *[""] * (operation.repeats - 1)]
        return tuple(f"SeparableConv(channels, {operation.kernel}{text}{dilation})" for text in strides)
    raise InputError(f"operation '{name}' has no form in a source file")


def _stem_layer(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d):
        stride = f"stride={layer.stride[0]}, " if layer.stride[0] > 1 else ""
        return f"nn.Conv2d({layer.in_channels}, {layer.out_channels}, 3, {stride}padding=1, bias=False)"
    if isinstance(layer, nn.BatchNorm2d):
        return f"nn.BatchNorm2d({layer.num_features})"
    if isinstance(layer, nn.ReLU):
        return "nn.ReLU()"
    raise InputError(f"stem layer {type(layer).__name__} has no form in a source file")


def _sum(name: str, terms: Sequence[str]) -> list[str]:
    line = f"        {name} = {' + '.join(terms)}"
    if len(line) <= WIDTH:
        return [line]
    first, *others = terms
    return [f"        {name} = (", f"            {first}", *(f"            + {term}" for term in others), "        )"]


def _renamed(cells: Sequence[CellClass], layer: str) -> str:
    """The exported name of a layer of ``CellNetwork``; ``cells``: the class of each of its cells."""
    if not layer.startswith("cells."):
        return layer
    _, index, part, *rest = layer.split(".")
    if part != "operations":
        # The package's ReluConvBn is a Sequential; FactorisedReduce has names.
        return f"cells.{index}.{part}.{ {'1': 'conv', '2': 'bn'}.get(rest[0], rest[0]) }"
    edge = cells[int(index)].edges[int(rest[0])]
    operation = OPERATIONS[edge.operation]
    prefix = f"cells.{index}.{edge.attribute}"
    if operation.kind != "conv":
        return f"{prefix}.{rest[1]}"
    # The package's SeparableConv is a Sequential of [ReLU, depthwise, pointwise, BN] repeated.
    stage, role = divmod(int(rest[1]), 4)
    position = f".{stage}" if operation.repeats > 1 else ""
    return f"{prefix}{position}.{('relu', 'depthwise', 'pointwise', 'bn')[role]}"
