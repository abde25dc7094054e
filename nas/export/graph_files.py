"""An architecture as files for graph programs and for the eye: GraphML, DOT, SVG. They hold no weights."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import networkx as nx
from torch import nn

from nas.analysis.drawing import NAMESPACE, draw_cell
from nas.model_file import ModelSpec
from nas.tensor_file import write_text
from search_spaces import graph
from search_spaces.genotype import AnyGenotype, Genotype

ILLEGAL = re.compile("[^\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML cannot hold, or does not keep."""

GAP = 24


def network_graph(genotype: AnyGenotype) -> nx.MultiDiGraph:
    """The architecture as one directed graph whose edges carry an ``operation``.

    Of a cell space each kind of cell is a part of its own: nodes "KIND/0", "KIND/1" (inputs), "KIND/2", ...,
    "KIND/output", with attribute ``cell``; attributes of the graph say where the kinds stand. A network of stages is
    a chain "input", "stage 1/1", "stage 1/2", ..., "output"; ``width`` is in channels.
    """
    whole = nx.MultiDiGraph(space=genotype.space)
    if isinstance(genotype, Genotype):
        layout = genotype.layout
        whole.graph |= {
            "sections": ", ".join(map(_legal, layout.sections)),
            "ratio": ", ".join(map(str, layout.ratio)),
            "reduction": _legal(layout.reduction),
        }
        for kind, cell in genotype.cells:
            name = _legal(kind)
            cell_graph = graph.cell_graph(cell)
            whole.add_nodes_from((f"{name}/{node}", {"cell": name}) for node in cell_graph)
            for source, target, operation in cell_graph.edges(data="operation"):
                whole.add_edge(f"{name}/{source}", f"{name}/{target}", operation=_legal(operation))
        return whole
    last = "input"
    whole.add_node(last)
    for stage, (depth, width) in enumerate(zip(genotype.depths, genotype.widths, strict=True), start=1):
        for block in range(1, depth + 1):
            node = f"stage {stage}/{block}"
            whole.add_node(node, width=width, stage=stage)
            whole.add_edge(last, node, operation="halving block" if block == 1 < stage else "block")
            last = node
    whole.add_node("output")
    whole.add_edge(last, "output", operation="classifier")
    return whole


def edges_of(genotype: AnyGenotype) -> list[list[str]]:
    """[source, target, operation] of every edge of ``network_graph``, sorted: what a reader of a file must find."""
    return sorted([source, target, name] for source, target, name in network_graph(genotype).edges(data="operation"))


def graphml(genotype: AnyGenotype) -> str:
    """The text of a GraphML file (Gephi, yEd, networkx, igraph)."""
    stream = io.BytesIO()
    nx.write_graphml(network_graph(genotype), stream)
    return stream.getvalue().decode("utf-8")


def dot(genotype: AnyGenotype) -> str:
    """The text of a Graphviz file: a cluster for each kind of cell or each stage."""
    whole = network_graph(genotype)
    lines = ["digraph architecture {", "  rankdir=LR;", "  node [shape=box, style=rounded];"]
    clusters: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for node, data in whole.nodes(data=True):
        title = data.get("cell") or (f"stage {data['stage']}, width {data['width']}" if "stage" in data else "")
        clusters.setdefault(title, []).append((node, data))
    for index, (title, nodes) in enumerate(clusters.items()):
        inside = "    " if title else "  "
        if title:
            lines += [f"  subgraph cluster_{index} {{", f"    label={_quoted(title)};"]
        for node, _ in nodes:
            lines.append(f"{inside}{_quoted(node)} [label={_quoted(node.rpartition('/')[2])}];")
        if title:
            lines.append("  }")
    for source, target, operation in whole.edges(data="operation"):
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [label={_quoted(operation)}];")
    return "\n".join([*lines, "}"]) + "\n"


def svg(genotype: AnyGenotype) -> str:
    """One picture: the cells one below the other, or the stages as bars as wide as they are deep, as high as wide."""
    if isinstance(genotype, Genotype):
        drawings = [draw_cell(cell, f"{kind} cell") for kind, cell in genotype.cells]
        sizes = [_size(drawing) for drawing in drawings]
        width, y, parts = max(width for width, _ in sizes), 0.0, []
        for drawing, (_, height) in zip(drawings, sizes, strict=True):
            parts.append(drawing.replace("<svg ", f'<svg y="{y:.0f}" ', 1))
            y += height + GAP
        height = y - GAP
    else:
        parts, width, height = _bars(genotype.depths, genotype.widths)
    root = (
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
        "<style>:root{color-scheme:light dark;color:CanvasText;background:Canvas}</style>"
    )
    return "\n".join([root, *parts, "</svg>"]) + "\n"


def write_graphml(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write architecture.graphml to ``folder``."""
    del model
    write_text(graphml(spec.genotype), folder / "architecture.graphml")


def write_dot(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write architecture.dot to ``folder``."""
    del model
    write_text(dot(spec.genotype), folder / "architecture.dot")


def write_svg(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write architecture.svg to ``folder``."""
    del model
    write_text(svg(spec.genotype), folder / "architecture.svg")


def _bars(depths: tuple[int, ...], widths: tuple[int, ...]) -> tuple[list[str], float, float]:
    """Blocks as bars, and the size of the picture."""
    tall, block, gap = 140.0, 18.0, 4.0
    height, parts, x = tall + 64, [], 16.0
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        bar = max(4.0, tall * width / max(widths))
        begin = x
        for index in range(depth):
            name = f"stage {stage}/{index + 1}: width {width}"
            parts.append(
                f'<rect x="{x:.0f}" y="{16 + (tall - bar) / 2:.1f}" width="{block:.0f}" height="{bar:.1f}" rx="3" '
                f'fill="#1a62ad" fill-opacity=".75"><title>{escape(name)}</title></rect>'
            )
            x += block + gap
        # A stage of one block is narrower than its label.
        x = max(x, begin + 60)
        parts += [
            f'<text x="{begin:.0f}" y="{tall + 36:.0f}" font-family="sans-serif" font-size="12" fill="currentColor">'
            f"{text}</text>".replace(f'y="{tall + 36:.0f}"', f'y="{tall + 36 + 16 * line:.0f}"')
            for line, text in enumerate((f"{depth} x {width}", f"stage {stage}"))
        ]
        x += 14
    return parts, x, height


def _size(drawing: str) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing)
    assert found is not None
    return float(found[1]), float(found[2])


def _legal(text: str) -> str:
    return ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
