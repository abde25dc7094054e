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

FAMILY_NAMES = {
    "pool": "pooling",
    "skip": "skip connection",
    "sep": "separable convolution",
    "dil": "dilated convolution",
    "other": "other operation",
}
LEGEND_ROW = 18.0
LEGEND_LINE = 24.0

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
    legend, legend_height = _legend(cell, width - 2 * MARGIN)
    height = layout.height + 2 * MARGIN + TITLE_HEIGHT + legend_height
    # Several drawings may stand on one page, where ids must differ.
    key = hashlib.blake2b(repr((cell.nodes, title)).encode("utf-8", "replace"), digest_size=4).hexdigest()
    parts = [
        f'<svg xmlns="{NAMESPACE}" class="cell-drawing" role="img" '
        f'aria-labelledby="cell-{key}-title cell-{key}-desc" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">',
        f'<title id="cell-{key}-title">{svg_text(title)}</title>',
        f'<desc id="cell-{key}-desc">{svg_text(describe_cell(cell))}</desc>',
        f"<style>{_style()}</style>",
        f'<text class="cell-title" x="{MARGIN:.0f}" y="{MARGIN + 13:.0f}">{svg_text(shown_title)}</text>',
        f'<g transform="translate({(width - layout.width) / 2:.1f} {MARGIN + TITLE_HEIGHT:.1f})">',
    ]
    # Fainter lines first: where edges cross, the operations lie on top.
    longest = on_longest_path(cell, layout)
    chains = sorted(layout.chains, key=lambda chain: (chain.operation != graph.CONCAT, chain in longest))
    parts += [_edge(chain, layout, labels, chain in longest) for chain in chains]
    for column in layout.columns:
        parts += [_node(item.name, item.x, item.y, item.width, item.height) for item in column if item.kind == "node"]
    parts += ["</g>", f'<g transform="translate({MARGIN:.0f} {height - MARGIN - legend_height:.1f})">', legend, "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def on_longest_path(cell: Cell, layout: Layout) -> list[Chain]:
    """The edges of ``layout`` that make up the longest path of ``cell``."""
    found = []
    for source, operation, target in graph.longest_path(cell):
        same = (chain for chain in layout.chains if (chain.source, chain.target) == (source, target))
        found.append(next(chain for chain in same if chain.operation == operation))
    return found


def describe_cell(cell: Cell) -> str:
    """The cell in words: "node 2 = skip connect of input 0 + ...; the output concatenates nodes 2, 3."."""
    sentences = []
    for node, incoming in zip(graph.intermediate_nodes(cell), cell.nodes, strict=True):
        terms = " + ".join(f"{operation_label(edge.operation)} of {_node_name(edge.source)}" for edge in incoming)
        sentences.append(f"node {node} = {terms}")
    nodes = ", ".join(str(node) for node in graph.intermediate_nodes(cell))
    path = graph.longest_path(cell)
    way = ", ".join(_node_name(node) for node in (path[0][0], *(target for _, _, target in path)))
    return "; ".join([*sentences, f"the output concatenates nodes {nodes}"]) + f". Longest path: {way}."


def operation_label(operation: str) -> str:
    """The name of an operation as people write it: "sep_conv_5x5" is "sep conv 5×5"."""
    return _shortened(re.sub(r"(\d)x(\d)", rf"\1{TIMES}\2", operation).replace("_", " "), LONGEST_LABEL)


def family(operation: str) -> str:
    """The family that gives an operation its colour."""
    if "pool" in operation:
        return "pool"
    return next((name for name in ("skip", "sep", "dil") if operation.startswith(name)), "other")


def _legend(cell: Cell, width: float) -> tuple[str, float]:
    """What lines mean, in rows of at most ``width`` pixels where one entry is not wider; and how high the rows are."""
    depth = graph.depth(cell)
    entries = [("cell-longest", f"longest path, {depth} operation{'s' if depth > 1 else ''}")]
    used = {family(edge.operation) for node in cell.nodes for edge in node}
    entries += [(f"cell-{name}", FAMILY_NAMES[name]) for name in FAMILIES if name in used]
    entries.append(("cell-concat", "concatenated"))
    parts, x, y = [], 0.0, LEGEND_ROW
    for kind, words in entries:
        length = LEGEND_LINE + 6 + 0.92 * CHARACTER_WIDTH * len(words)
        if x and x + length > width:
            x, y = 0.0, y + LEGEND_ROW
        parts.append(
            f'<g class="cell-key {kind}"><line x1="{x:.1f}" x2="{x + LEGEND_LINE:.1f}" y1="{y - 4:.1f}" '
            f'y2="{y - 4:.1f}"/><text x="{x + LEGEND_LINE + 6:.1f}" y="{y:.1f}">{words}</text></g>'
        )
        x += length + 16
    return "".join(parts), y + 4


def _edge(chain: Chain, layout: Layout, labels: dict[str, str], longest: bool) -> str:
    concat = chain.operation == graph.CONCAT
    kind = "concat" if concat else family(chain.operation)
    kind += " cell-longest" if longest else ""
    segments, (tip, enter) = edge_path(chain, layout)
    name = f"{chain.source} → {chain.target}: {chain.operation}"
    parts = [
        f'<g class="cell-edge cell-{kind}"><title>{svg_text(name)}</title>',
        f'<path d="{_written(segments)}"/>',
        f'<polygon points="{tip:.1f},{enter:.1f} {tip - ARROW:.1f},{enter - ARROW / 2:.1f} '
        f'{tip - ARROW:.1f},{enter + ARROW / 2:.1f}"/>',
    ]
    for item in chain.items:
        if item.kind == "label":
            parts.append(
                f'<rect x="{item.x - item.width / 2:.1f}" y="{item.y - item.height / 2:.1f}" '
                f'width="{item.width:.1f}" height="{item.height:.1f}" rx="{item.height / 2:.0f}"/>'
                f'<text x="{item.x:.1f}" y="{item.y + 4:.1f}">{svg_text(labels[chain.operation])}</text>'
            )
    return "".join([*parts, "</g>"])


def edge_path(chain: Chain, layout: Layout) -> tuple[list[tuple[str, tuple[float, ...]]], tuple[float, float]]:
    """The line of an edge as SVG's commands M, H and C with their numbers, and the point of its tip.

    Level within columns, S-curves in the gaps, open under the label.
    """
    leave, enter = ports(chain, SIZES)
    x, y = chain.items[0].x + chain.items[0].width / 2, leave
    segments: list[tuple[str, tuple[float, ...]]] = [("M", (x, y))]
    for item in chain.items[1:]:
        last = item is chain.items[-1]
        left, right = layout.borders[item.column]
        # All nodes of a column are centred, so a narrow one is reached by a level stretch.
        begin = item.x - item.width / 2 - ARROW if last else left
        goal = enter if last else item.y
        before = layout.borders[item.column - 1][1]
        turn = min(begin, left - ARROW) if last else left
        middle = (before + turn) / 2
        segments += [("H", (before,)), ("C", (middle, y, middle, goal, turn, goal))]
        x, y = begin, goal
        if last:
            segments.append(("H", (begin,)))
        elif item.kind == "label":
            ends = (item.x - item.width / 2, item.x + item.width / 2)
            segments += [("H", ends[:1]), ("M", (ends[1], y)), ("H", (right,))]
        else:
            segments.append(("H", (right,)))
    return segments, (x + ARROW, enter)


def _written(segments: list[tuple[str, tuple[float, ...]]]) -> str:
    """Commands as the ``d`` of a path, points apart."""
    parts = []
    for command, numbers in segments:
        points = [numbers[at : at + 2] for at in range(0, len(numbers), 2)]
        parts.append(command + " ".join(",".join(f"{value:.1f}" for value in point) for point in points))
    return "".join(parts)


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
            f".cell-{name} path,.cell-{name} rect,.cell-{name} line{{stroke:{shades[shade]}}}"
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
        # The longest path differs in width and weight, not in colour alone.
        ".cell-longest path{stroke-width:4}"
        ".cell-longest rect{stroke-width:2.8}"
        ".cell-edge.cell-longest text{font-weight:700}"
        ".cell-key text{text-anchor:start;font-size:11px}"
        ".cell-key line{stroke-width:2}"
        ".cell-key.cell-longest line{stroke:currentColor;stroke-width:4}"
        ".cell-concat path,.cell-concat line{stroke:currentColor;stroke-opacity:.4;stroke-width:1.2;"
        "stroke-dasharray:5 3}"
        ".cell-concat polygon{fill:currentColor;fill-opacity:.5}"
        + colours(0)
        + f"@media screen and (prefers-color-scheme:dark){{{colours(1)}}}"
    )


def _node_name(node: int) -> str:
    return f"input {node}" if node in graph.INPUTS else f"node {node}"


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def svg_text(text: str) -> str:
    """Text as XML: escaped, without the characters XML cannot hold."""
    return escape(_ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text))
