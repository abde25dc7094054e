"""Layered drawing of a cell: where nodes, labels and edges go, so that nothing lies on top of anything else.

The method of Sugiyama, Tagawa and Toda (1981) with labels as citizens: the label of an edge is a box of its own
in a column just before the edge's target, and a long edge has a bend in every column it crosses. Boxes and bends
of a column get disjoint vertical slots, and edges turn only in the gaps between columns, so an edge can cross
another edge but never a box.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from search_spaces import graph
from search_spaces.genotype import Cell

ORDERING_SWEEPS = 24
PLACING_SWEEPS = 40


@dataclass(eq=False)
class Item:
    """A node, the label of an edge, or a bend of a long edge: centre (x, y) and size, in pixels.

    name: node number or "output" of a node, operation of a label.
    """

    kind: Literal["node", "label", "bend"]
    column: int
    name: int | str
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    before: list[Item] = field(default_factory=list)
    after: list[Item] = field(default_factory=list)


@dataclass(frozen=True)
class Chain:
    """The way of one edge: source node, bends and label, target node."""

    source: int
    target: int | str
    operation: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Sizes:
    """Pixels: boxes, least gaps between them, distance of the ports on the side of a node."""

    node_width: float = 44
    output_width: float = 62
    node_height: float = 34
    label_height: float = 24
    gap: float = 14
    column_gap: float = 34
    port: float = 10


@dataclass(frozen=True)
class Layout:
    """Items by column, edges, left and right border of every column; everything lies in [0, width] x [0, height]."""

    columns: tuple[tuple[Item, ...], ...]
    chains: tuple[Chain, ...]
    borders: tuple[tuple[float, float], ...]
    width: float
    height: float


def layered_layout(cell: Cell, label_widths: Mapping[str, float], sizes: Sizes) -> Layout:
    """Lay out ``cell``; ``label_widths`` gives the pixels each operation's label needs."""
    columns, chains = _items(cell, label_widths, sizes)
    _order(columns)
    _place_vertically(columns, sizes)
    borders = _place_horizontally(columns, sizes)
    top = min(item.y - item.height / 2 for column in columns for item in column)
    bottom = max(item.y + item.height / 2 for column in columns for item in column)
    for column in columns:
        for item in column:
            item.y -= top
    return Layout(tuple(map(tuple, columns)), tuple(chains), tuple(borders), borders[-1][1], bottom - top)


def ports(chain: Chain, sizes: Sizes) -> tuple[float, float]:
    """Heights at which an edge leaves its source and enters its target: spread so that edges do not merge."""
    source, target = chain.items[0], chain.items[-1]
    # The neighbours stand in the order of their heights: then edges do not cross at the node itself.
    leaving = sorted(source.after, key=lambda item: item.y).index(chain.items[1])
    entering = sorted(target.before, key=lambda item: item.y).index(chain.items[-2])
    return (
        source.y + (leaving - (len(source.after) - 1) / 2) * sizes.port,
        target.y + (entering - (len(target.before) - 1) / 2) * sizes.port,
    )


def _items(cell: Cell, label_widths: Mapping[str, float], sizes: Sizes) -> tuple[list[list[Item]], list[Chain]]:
    """All items by column, not yet placed. Nodes of depth d stand in column 2d, labels of edges to them in 2d-1."""
    depths = graph.node_depths(cell)
    last = 2 * max(depths.values()) + 1
    columns: list[list[Item]] = [[] for _ in range(last + 1)]
    nodes: dict[int | str, Item] = {}

    def add(item: Item) -> Item:
        columns[item.column].append(item)
        return item

    for node, depth in depths.items():
        nodes[node] = add(Item("node", 2 * depth, node, sizes.node_width, sizes.node_height))
    nodes[graph.OUTPUT] = add(Item("node", last, graph.OUTPUT, sizes.output_width, sizes.node_height))
    chains = []
    for source, target, operation in graph.cell_graph(cell).edges(data="operation"):
        items = [nodes[source]]
        for column in range(nodes[source].column + 1, nodes[target].column):
            if column == nodes[target].column - 1 and operation != graph.CONCAT:
                items.append(add(Item("label", column, operation, label_widths[operation], sizes.label_height)))
            else:
                items.append(add(Item("bend", column, operation)))
        items.append(nodes[target])
        for left, right in itertools.pairwise(items):
            left.after.append(right)
            right.before.append(left)
        chains.append(Chain(source, target, operation, tuple(items)))
    for item in nodes.values():
        item.height = max(item.height, sizes.port * (max(len(item.before), len(item.after)) + 1))
    return columns, chains


def _order(columns: list[list[Item]]) -> None:
    """Order the items of each column so that few edges cross: barycentres, swept to and fro, the best kept.

    The inputs stay in their order: readers expect 0 above 1.
    """
    best, fewest = [list(column) for column in columns], _crossings(columns)
    for sweep in range(ORDERING_SWEEPS):
        forward = sweep % 2 == 0
        for column in columns[1:] if forward else columns[-2:0:-1]:
            _sort_by_barycentre(column, columns, forward)
        crossings = _crossings(columns)
        if crossings < fewest:
            best, fewest = [list(column) for column in columns], crossings
        if fewest == 0:
            break
    for column, items in zip(columns, best, strict=True):
        column[:] = items


def _sort_by_barycentre(column: list[Item], columns: list[list[Item]], forward: bool) -> None:
    here = column[0].column
    rank = {id(item): i for i, item in enumerate(columns[here - 1 if forward else here + 1])}
    own = {id(item): i for i, item in enumerate(column)}

    def barycentre(item: Item) -> float:
        neighbours = item.before if forward else item.after
        if not neighbours:
            return own[id(item)]
        return sum(rank[id(neighbour)] for neighbour in neighbours) / len(neighbours)

    column.sort(key=barycentre)


def _crossings(columns: list[list[Item]]) -> int:
    """Pairs of edges between neighbouring columns that cross."""
    total = 0
    for left, right in itertools.pairwise(columns):
        rank = {id(item): i for i, item in enumerate(right)}
        seen: list[int] = []
        for item in left:
            ends = [rank[id(neighbour)] for neighbour in item.after]
            total += sum(earlier > end for end in ends for earlier in seen)
            seen += ends
    return total


def _place_vertically(columns: list[list[Item]], sizes: Sizes) -> None:
    """Heights: each item near the mean of its neighbours, the order and the gaps of its column kept."""
    for column in columns:
        y = 0.0
        for above, item in zip([None, *column], column, strict=False):
            y += _separation(above, item, sizes) if above is not None else 0
            item.y = y
        middle = (column[0].y + column[-1].y) / 2
        for item in column:
            item.y -= middle
    for sweep in range(PLACING_SWEEPS):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wishes = [_wish(item) for item in column]
            offsets = [0.0]
            for above, item in itertools.pairwise(column):
                offsets.append(offsets[-1] + _separation(above, item, sizes))
            slots = _isotonic(
                [wish - offset for (wish, _), offset in zip(wishes, offsets, strict=True)],
                [weight for _, weight in wishes],
            )
            for item, slot, offset in zip(column, slots, offsets, strict=True):
                item.y = slot + offset


def _separation(above: Item, below: Item, sizes: Sizes) -> float:
    return (above.height + below.height) / 2 + sizes.gap


def _wish(item: Item) -> tuple[float, float]:
    """The height an item wants, and how much. Long edges pull most, which keeps them straight."""
    pulls = [
        (neighbour.y, (1.0 if item.kind == "node" else 3.0) * (1.0 if neighbour.kind == "node" else 3.0))
        for neighbour in (*item.before, *item.after)
    ]
    weight = sum(pull for _, pull in pulls)
    return (sum(y * pull for y, pull in pulls) / weight, weight) if weight else (item.y, 1.0)


def _isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nondecreasing sequence nearest to ``values`` in weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        size = 1
        while blocks and blocks[-1][0] > value:
            earlier, earlier_weight, earlier_size = blocks.pop()
            value = (earlier * earlier_weight + value * weight) / (earlier_weight + weight)
            weight, size = weight + earlier_weight, size + earlier_size
        blocks.append((value, weight, size))
    return [value for value, _, size in blocks for _ in range(size)]


def _place_horizontally(columns: list[list[Item]], sizes: Sizes) -> list[tuple[float, float]]:
    """Columns from left to right; a gap grows with the steepest edge in it. Returns the borders of the columns."""
    borders: list[tuple[float, float]] = []
    x = 0.0
    for index, column in enumerate(columns):
        if index:
            climbs = [abs(item.y - before.y) for item in column for before in item.before]
            x += max(sizes.column_gap, min(2 * sizes.column_gap, 0.35 * max(climbs, default=0.0)))
        width = max(item.width for item in column)
        for item in column:
            item.x = x + width / 2
        borders.append((x, x + width))
        x += width
    return borders
