"""Cells and mixing weights as pixels, for viewers that show no SVG: the same layout, on a light ground.

Drawn by Pillow, in hundredths of a second: a search draws them at every epoch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from nas.analysis.drawing import (
    ARROW,
    CHARACTER_WIDTH,
    FAMILIES,
    MARGIN,
    SIZES,
    TIMES,
    edge_path,
    family,
    on_longest_path,
    operation_label,
)
from nas.analysis.layered_layout import Chain, Layout, layered_layout
from search_spaces import graph
from search_spaces.genotype import Cell

SCALE = 2
"""Pixels drawn for one pixel of the layout."""
INK, PALE, GROUND = "#1b2026", "#59636e", "#ffffff"
MORE, LESS = (26, 98, 173), (200, 100, 20)
SMALLEST_SPAN = 1.25
"""Factor between an even mixture and the strongest colour, at least: smaller differences stay pale."""
ROW, COLUMN = 22, 46
"""Pixels of a field in a table."""


def cell_png(cell: Cell) -> bytes:
    """The picture of ``cell`` as a PNG file: as ``draw_cell``, without title and legend."""
    labels = {edge.operation: operation_label(edge.operation) for node in cell.nodes for edge in node}
    layout = layered_layout(cell, {name: CHARACTER_WIDTH * len(text) + 18 for name, text in labels.items()}, SIZES)
    size = (round(SCALE * (layout.width + 2 * MARGIN)), round(SCALE * (layout.height + 2 * MARGIN)))
    image = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(image)
    longest = on_longest_path(cell, layout)
    for chain in sorted(layout.chains, key=lambda chain: (chain.operation != graph.CONCAT, chain in longest)):
        _edge(draw, chain, layout, chain in longest)
    label_font, node_font = ImageFont.load_default(12 * SCALE), ImageFont.load_default(13 * SCALE)
    for column in layout.columns:
        for item in column:
            if item.kind == "bend":
                continue
            box = _scaled(
                item.x - item.width / 2, item.y - item.height / 2, item.x + item.width / 2, item.y + item.height / 2
            )
            label = item.kind == "label"
            text = labels[str(item.name)] if label else f"in {item.name}" if item.name in graph.INPUTS else item.name
            colour = FAMILIES[family(str(item.name))][0] if label else INK
            radius = SCALE * (item.height / 2 if label else 7)
            draw.rounded_rectangle(box, radius, GROUND if label else "#eef0f2", colour, round(1.4 * SCALE))
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            draw.text(middle, _plain(str(text)), INK, label_font if label else node_font, "mm")
    return _png(image)


def mixing_png(weights: Mapping[str, Sequence[float]]) -> bytes:
    """The mixing weights of a kind of cell as a PNG file: edges below, operations beside each other.

    White is an even mixture, blue more, orange less; every weight is written in.
    """
    columns, even = [*weights.values()], 1 / len(weights)
    edges = graph.supernet_edges(len(columns[0]))
    rows = [f"{source} > {target}" for source, target in edges]
    names = [_plain(operation_label(name)) for name in weights]
    steps = [[math.log2(max(value, 1e-4) / even) for value in column] for column in columns]
    span = max(math.log2(SMALLEST_SPAN), *(abs(step) for column in steps for step in column))
    font, small = ImageFont.load_default(12 * SCALE), ImageFont.load_default(10 * SCALE)
    left = SCALE * 12 + max(round(font.getlength(row)) for row in rows)
    head = SCALE * 12 + max(round(font.getlength(name)) for name in names)
    size = (left + SCALE * (COLUMN * len(names) + 8), head + SCALE * (ROW * len(rows) + 8))
    image = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(image)
    for line, row in enumerate(rows):
        draw.text((left - SCALE * 6, head + SCALE * ROW * (line + 0.5)), row, INK, font, "rm")
    for place, name in enumerate(names):
        x = left + SCALE * COLUMN * place
        upright = Image.new("RGB", (head - SCALE * 8, SCALE * 18), GROUND)
        ImageDraw.Draw(upright).text((0, SCALE * 9), name, INK, font, "lm")
        turned = upright.rotate(90, expand=True)
        image.paste(turned, (x + (SCALE * COLUMN - turned.width) // 2, SCALE * 4))
        for line, value in enumerate(columns[place]):
            y = head + SCALE * ROW * line
            share = steps[place][line] / span
            ground = tuple(round(255 - abs(share) * (255 - part)) for part in (MORE if share > 0 else LESS))
            draw.rectangle((x, y, x + SCALE * COLUMN - 2, y + SCALE * ROW - 2), ground)
            middle = (x + SCALE * COLUMN / 2, y + SCALE * ROW / 2)
            draw.text(middle, f"{value:.3f}", GROUND if abs(share) > 0.7 else INK, small, "mm")
    return _png(image)


def _plain(label: str) -> str:
    """Pillow's own font has no multiplication sign."""
    return label.replace(TIMES, "x")


def _png(image: Image.Image) -> bytes:
    """The image in few colours: a quarter of the bytes, and nobody sees it."""
    stream = io.BytesIO()
    image.quantize(32, Image.Quantize.FASTOCTREE).save(stream, "PNG")
    return stream.getvalue()


def _edge(draw: ImageDraw.ImageDraw, chain: Chain, layout: Layout, longest: bool) -> None:
    concat = chain.operation == graph.CONCAT
    colour = "#b4bac0" if concat else FAMILIES[family(chain.operation)][0]
    width = round(SCALE * (4 if longest else 1.2 if concat else 1.8))
    segments, (tip, enter) = edge_path(chain, layout)
    x = y = 0.0
    for command, numbers in segments:
        if command == "M":
            x, y = numbers
        elif command == "H":
            draw.line(_scaled(x, y, numbers[0], y), colour, width)
            x = numbers[0]
        else:
            ax, ay, bx, by, ex, ey = numbers
            points = [
                (
                    u**3 * x + 3 * u * u * t * ax + 3 * u * t * t * bx + t**3 * ex,
                    u**3 * y + 3 * u * u * t * ay + 3 * u * t * t * by + t**3 * ey,
                )
                for t, u in ((step / 16, 1 - step / 16) for step in range(17))
            ]
            draw.line(_scaled(*(value for point in points for value in point)), colour, width, "curve")
            x, y = ex, ey
    head = (tip, enter, tip - ARROW, enter - ARROW / 2, tip - ARROW, enter + ARROW / 2)
    draw.polygon(_scaled(*head), colour)


def _scaled(*values: float) -> tuple[float, ...]:
    """Places of the layout as places of the image."""
    return tuple(SCALE * (value + MARGIN) for value in values)
