"""A picture of a cell as one self-contained SVG, legible in light and dark and to screen readers."""

from __future__ import annotations

import hashlib
import re
from html import escape

from nas.analysis.layered_layout import Chain, Layout, Sizes, layered_layout, ports
from search_spaces import graph
from search_spaces.genotype import Cell

TIMES = "\N{MULTIPLICATION SIGN}"
NAMESPACE = "http://www.w3.org/2000/svg"
SIZES = Sizes()
MARGIN = 12.0
TITLE_HEIGHT = 30.0
ARROW = 7.0
CHARACTER_WIDTH = 6.9
"""Generous width of a 12 px sans-serif character, so that text fits its box in any reader's font."""
LONGEST_LABEL = 24
LONGEST_TITLE = 60

FAMILIES = {
    "pool": ("#a04c00", "#f2b279"),
    "skip": ("#1d7339", "#86d19a"),
    "sep": ("#1a62ad", "#86bdf5"),
    "dil": ("#7d3ab0", "#d0a9f2"),
    "other": ("#5b6570", "#b3bcc6"),
}
"""Colour of each family of operations on a light and on a dark ground; at least 4.5:1 against white or near-black."""

_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def draw_cell(cell: Cell, title: str) -> str:
    """An SVG of ``cell``: inputs on the left, output on the right, every operation named on its edge.

    The ink is ``currentColor`` where the picture stands inside a page; as a file of its own it brings its ground.
    """
    labels = {edge.operation: operation_label(edge.operation) for node in cell.nodes for edge in node}
    widths = {operation: CHARACTER_WIDTH * len(label) + 18 for operation, label in labels.items()}
    layout = layered_layout(cell, widths, SIZES)
    shown_title = _shortened(title, LONGEST_TITLE)
    width = max(layout.width, CHARACTER_WIDTH * 1.25 * len(shown_title)) + 2 * MARGIN
    height = layout.height + 2 * MARGIN + TITLE_HEIGHT
    # Several drawings may stand on one page, where ids must differ.
    key = hashlib.blake2b(repr((cell.nodes, title)).encode("utf-8", "replace"), digest_size=4).hexdigest()
    parts = [
        f'<svg xmlns="{NAMESPACE}" class="cell-drawing" role="img" '
        f'aria-labelledby="cell-{key}-title cell-{key}-desc" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">',
        f'<title id="cell-{key}-title">{_text(title)}</title>',
        f'<desc id="cell-{key}-desc">{_text(describe_cell(cell))}</desc>',
        f"<style>{_style()}</style>",
        f'<text class="cell-title" x="{MARGIN:.0f}" y="{MARGIN + 13:.0f}">{_text(shown_title)}</text>',
        f'<g transform="translate({(width - layout.width) / 2:.1f} {MARGIN + TITLE_HEIGHT:.1f})">',
    ]
    # Fainter lines first: where edges cross, the operations lie on top.
    chains = sorted(layout.chains, key=lambda chain: chain.operation != graph.CONCAT)
    parts += [_edge(chain, layout, labels) for chain in chains]
    for column in layout.columns:
        parts += [_node(item.name, item.x, item.y, item.width, item.height) for item in column if item.kind == "node"]
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def describe_cell(cell: Cell) -> str:
    """The cell in words: "node 2 = skip connect of input 0 + ...; the output concatenates nodes 2, 3."."""
    sentences = []
    for node, incoming in zip(graph.intermediate_nodes(cell), cell.nodes, strict=True):
        terms = " + ".join(f"{operation_label(edge.operation)} of {_node_name(edge.source)}" for edge in incoming)
        sentences.append(f"node {node} = {terms}")
    nodes = ", ".join(str(node) for node in graph.intermediate_nodes(cell))
    return "; ".join([*sentences, f"the output concatenates nodes {nodes}."])


def operation_label(operation: str) -> str:
    """The name of an operation as people write it: "sep_conv_5x5" is "sep conv 5×5"."""
    return _shortened(re.sub(r"(\d)x(\d)", rf"\1{TIMES}\2", operation).replace("_", " "), LONGEST_LABEL)


def family(operation: str) -> str:
    """The family that gives an operation its colour."""
    if "pool" in operation:
        return "pool"
    return next((name for name in ("skip", "sep", "dil") if operation.startswith(name)), "other")


def _edge(chain: Chain, layout: Layout, labels: dict[str, str]) -> str:
    concat = chain.operation == graph.CONCAT
    kind = "concat" if concat else family(chain.operation)
    leave, enter = ports(chain, SIZES)
    path, tip = _path(chain, layout, leave, enter)
    name = f"{chain.source} → {chain.target}: {chain.operation}"
    parts = [
        f'<g class="cell-edge cell-{kind}"><title>{_text(name)}</title>',
        f'<path d="{path}"/>',
        f'<polygon points="{tip:.1f},{enter:.1f} {tip - ARROW:.1f},{enter - ARROW / 2:.1f} '
        f'{tip - ARROW:.1f},{enter + ARROW / 2:.1f}"/>',
    ]
    for item in chain.items:
        if item.kind == "label":
            parts.append(
                f'<rect x="{item.x - item.width / 2:.1f}" y="{item.y - item.height / 2:.1f}" '
                f'width="{item.width:.1f}" height="{item.height:.1f}" rx="{item.height / 2:.0f}"/>'
                f'<text x="{item.x:.1f}" y="{item.y + 4:.1f}">{_text(labels[chain.operation])}</text>'
            )
    return "".join([*parts, "</g>"])


def _path(chain: Chain, layout: Layout, leave: float, enter: float) -> tuple[str, float]:
    """The line of an edge and the x of its tip: level within columns, S-curves in the gaps, open under the label."""
    x, y = chain.items[0].x + chain.items[0].width / 2, leave
    segments = [f"M{x:.1f},{y:.1f}"]
    for item in chain.items[1:]:
        last = item is chain.items[-1]
        left, right = layout.borders[item.column]
        # All nodes of a column are centred, so a narrow one is reached by a level stretch.
        begin = item.x - item.width / 2 - ARROW if last else left
        goal = enter if last else item.y
        before = layout.borders[item.column - 1][1]
        turn = min(begin, left - ARROW) if last else left
        segments.append(f"H{before:.1f}")
        middle = (before + turn) / 2
        segments.append(f"C{middle:.1f},{y:.1f} {middle:.1f},{goal:.1f} {turn:.1f},{goal:.1f}")
        x, y = begin, goal
        if last:
            segments.append(f"H{begin:.1f}")
        elif item.kind == "label":
            segments.append(f"H{item.x - item.width / 2:.1f}M{item.x + item.width / 2:.1f},{y:.1f}H{right:.1f}")
        else:
            segments.append(f"H{right:.1f}")
    return "".join(segments), x + ARROW


def _node(name: int | str, x: float, y: float, width: float, height: float) -> str:
    kind = "output" if name == graph.OUTPUT else "input" if name in graph.INPUTS else "node"
    text = name if kind == "output" else f"in {name}" if kind == "input" else name
    return (
        f'<g class="cell-node cell-{kind}"><rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="7"/><text x="{x:.1f}" y="{y + 4.5:.1f}">{text}</text></g>'
    )


def _style() -> str:
    """Colours and type. Every class begins with "cell-", since a style element rules the whole page it stands in."""

    def colours(shade: int) -> str:
        return "".join(
            f".cell-{name} path,.cell-{name} rect{{stroke:{shades[shade]}}}"
            f".cell-{name} polygon,.cell-{name} rect{{fill:{shades[shade]}}}"
            for name, shades in FAMILIES.items()
        )

    return (
        ".cell-drawing{font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
        # Only as a file of its own is the drawing the root of its document.
        ".cell-drawing:root{color-scheme:light dark;color:CanvasText;background:Canvas}"
        ".cell-drawing text{fill:currentColor;text-anchor:middle}"
        ".cell-drawing .cell-title{text-anchor:start;font-size:15px;font-weight:600}"
        ".cell-edge path{fill:none;stroke-width:1.8;stroke-linejoin:round}"
        ".cell-edge rect{fill-opacity:.13;stroke-width:1.4}"
        ".cell-node rect{fill:currentColor;fill-opacity:.07;stroke:currentColor;stroke-width:1.4}"
        ".cell-node text{font-size:13px;font-weight:600}"
        ".cell-concat path{stroke:currentColor;stroke-opacity:.4;stroke-width:1.2;stroke-dasharray:5 3}"
        ".cell-concat polygon{fill:currentColor;fill-opacity:.5}"
        + colours(0)
        + f"@media screen and (prefers-color-scheme:dark){{{colours(1)}}}"
    )


def _node_name(node: int) -> str:
    return f"input {node}" if node in graph.INPUTS else f"node {node}"


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _text(text: str) -> str:
    """Text as XML: escaped, without the characters XML cannot hold."""
    return escape(_ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text))
