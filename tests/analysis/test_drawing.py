"""Pictures of cells are well-formed, complete, and nothing lies on top of anything else."""

import itertools
import random
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from nas.analysis.drawing import describe_cell, draw_cell, family, operation_label
from nas.analysis.layered_layout import Sizes, layered_layout
from search_spaces import darts, dsara, graph
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Cell, Edge

SVG = "{http://www.w3.org/2000/svg}"


def large_cell(seed):
    draw = random.Random(seed)
    names = ("sep_conv_3x3", "nor_conv_3x3", "skip_connect", "a_name_that_is_much_too_long_for_a_label")
    return Cell(tuple(tuple(Edge(draw.choice(names), draw.randrange(n)) for _ in range(3)) for n in range(2, 11)))


def cells():
    genotypes = [load_genotype("arnas")]
    genotypes += [dsara.SPACE.random(torch.Generator().manual_seed(seed)) for seed in range(4)]
    genotypes += [darts.SPACE.random(torch.Generator().manual_seed(seed)) for seed in range(2)]
    found = [cell for genotype in genotypes for _, cell in genotype.cells]
    return [*found, Cell(((Edge("skip_connect", 1),),)), *(large_cell(seed) for seed in range(3))]


CELLS = cells()


def boxes(root):
    """(left, top, right, bottom) of every label and node."""
    found = []
    for rect in root.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


def points(path):
    """Points along a path of M, H and C commands."""
    x = y = 0.0
    for command, text in re.findall(r"([MHC])([^MHC]*)", path):
        values = [float(value) for value in re.findall(r"-?[\d.]+", text)]
        if command == "M":
            x, y = values
        elif command == "H":
            yield from ((x + t / 20 * (values[0] - x), y) for t in range(21))
            x = values[0]
        else:
            ax, ay, bx, by, ex, ey = values
            for t in (step / 20 for step in range(21)):
                u = 1 - t
                yield (
                    u**3 * x + 3 * u * u * t * ax + 3 * u * t * t * bx + t**3 * ex,
                    u**3 * y + 3 * u * u * t * ay + 3 * u * t * t * by + t**3 * ey,
                )
            x, y = ex, ey


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_overlaps(cell):
    root = ET.fromstring(draw_cell(cell, "cell"))
    rectangles = boxes(root)
    assert len(rectangles) == sum(map(len, cell.nodes)) + len(cell.nodes) + 3
    for a, b in itertools.combinations(rectangles, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for path in root.iter(f"{SVG}path"):
        for x, y in points(path.get("d")):
            for left, top, right, bottom in rectangles:
                assert not (left + 0.2 < x < right - 0.2 and top + 0.2 < y < bottom - 0.2)


@pytest.mark.parametrize("cell", CELLS)
def test_everything_stays_inside_the_picture(cell):
    root = ET.fromstring(draw_cell(cell, "cell"))
    _, _, width, height = (float(value) for value in root.get("viewBox").split())
    group, legend = (one for one in root.iter(f"{SVG}g") if one.get("transform"))
    dx, dy = (float(value) for value in re.findall(r"[\d.]+", group.get("transform")))
    for left, top, right, bottom in boxes(root):
        assert left + dx >= 0
        assert right + dx <= width
        assert top + dy >= 0
        assert bottom + dy <= height
    for path in root.iter(f"{SVG}path"):
        for x, y in points(path.get("d")):
            assert 0 <= x + dx <= width
            assert 0 <= y + dy <= height
    below = float(re.findall(r"[\d.]+", legend.get("transform"))[1])
    assert below >= dy + max(bottom for *_, bottom in boxes(root))
    assert all(below + float(text.get("y")) <= height for text in legend.iter(f"{SVG}text"))
    assert all(dx + float(line.get("x2")) + 60 <= width for line in legend.iter(f"{SVG}line"))


@pytest.mark.parametrize("cell", CELLS)
def test_every_operation_and_node_is_named(cell):
    root = ET.fromstring(draw_cell(cell, "a cell"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    for operation in {edge.operation for node in cell.nodes for edge in node}:
        drawn = sum(edge.operation == operation for node in cell.nodes for edge in node)
        assert texts.count(operation_label(operation)) == drawn
    for name in ["in 0", "in 1", "output", *map(str, range(2, 2 + len(cell.nodes)))]:
        assert texts.count(name) == 1
    titles = [title.text for title in root.iter(f"{SVG}title")]
    for node, incoming in enumerate(cell.nodes, start=2):
        for edge in incoming:
            assert f"{edge.source} → {node}: {edge.operation}" in titles


def test_screen_readers_get_title_and_description():
    cell = load_genotype("arnas").cell["robust"]
    root = ET.fromstring(draw_cell(cell, "robust cell"))
    assert root.get("role") == "img"
    named = root.get("aria-labelledby").split()
    by_id = {child.get("id"): child.text for child in root if child.get("id")}
    assert [by_id[name] for name in named] == ["robust cell", describe_cell(cell)]
    assert (
        "node 3 = dil conv 5\N{MULTIPLICATION SIGN}5 of input 1 + dil conv 5\N{MULTIPLICATION SIGN}5 of node 2"
        in by_id[named[1]]
    )


def test_hostile_names_are_escaped():
    name = "<script>alert(1)</script>&\"'\x00\ud800"
    picture = draw_cell(Cell(((Edge(name, 0), Edge("concat", 1)),)), f"</title>{name}")
    root = ET.fromstring(picture)
    assert not list(root.iter(f"{SVG}script"))
    assert next(root.iter(f"{SVG}title")).text.startswith("</title><script>alert(1)</script>")
    picture.encode("utf-8")


def test_self_contained_and_the_same_every_time():
    cell = CELLS[0]
    picture = draw_cell(cell, "cell")
    assert picture == draw_cell(cell, "cell")
    assert re.findall(r"https?://[^\"'<\s]*", picture) == ["http://www.w3.org/2000/svg"]
    assert "href" not in picture
    assert "@import" not in picture
    assert "url(" not in picture
    assert "prefers-color-scheme:dark" in picture
    assert "currentColor" in picture


def test_two_pictures_share_no_id():
    ids = [re.findall(r' id="([^"]+)"', draw_cell(cell, title)) for cell, title in ((CELLS[0], "a"), (CELLS[0], "b"))]
    assert not set(ids[0]) & set(ids[1])


def test_inputs_left_output_right_and_depth_from_left_to_right():
    cell = load_genotype("arnas").cell["accurate"]
    layout = layered_layout(cell, dict.fromkeys(("skip_connect", "sep_conv_3x3", "sep_conv_5x5"), 80.0), Sizes())
    x = {item.name: item.x for column in layout.columns for item in column if item.kind == "node"}
    assert x[0] == x[1] == min(x.values())
    assert x["output"] == max(x.values())
    assert x[2] == x[3] < x[4] < x[5]
    y = {item.name: item.y for item in layout.columns[0]}
    assert y[0] < y[1]


@pytest.mark.parametrize(
    ("operation", "label", "kind"),
    [
        ("sep_conv_5x5", "sep conv 5\N{MULTIPLICATION SIGN}5", "sep"),
        ("dil_conv_3x3", "dil conv 3\N{MULTIPLICATION SIGN}3", "dil"),
        ("avg_pool_3x3", "avg pool 3\N{MULTIPLICATION SIGN}3", "pool"),
        ("skip_connect", "skip connect", "skip"),
        ("nor_conv_1x1", "nor conv 1\N{MULTIPLICATION SIGN}1", "other"),
    ],
)
def test_labels_and_families(operation, label, kind):
    assert (operation_label(operation), family(operation)) == (label, kind)


@pytest.mark.parametrize("cell", CELLS)
def test_the_longest_path_stands_out_and_is_in_the_legend(cell):
    root = ET.fromstring(draw_cell(cell, "cell"))
    edges = [group for group in root.iter(f"{SVG}g") if "cell-edge" in group.get("class", "")]
    marked = [edge.find(f"{SVG}title").text for edge in edges if "cell-longest" in edge.get("class")]
    assert len(marked) == graph.depth(cell)
    way = sorted((int(name.split(" ")[0]), int(name.split(" ")[2].rstrip(":"))) for name in marked)
    assert way[0][0] in graph.INPUTS
    assert all(one[1] == other[0] for one, other in itertools.pairwise(way))
    (words,) = (text.text for text in root.iter(f"{SVG}text") if text.text.startswith("longest path"))
    assert words.startswith(f"longest path, {graph.depth(cell)} operation")


@pytest.mark.parametrize("cell", CELLS)
def test_the_legend_names_the_families_that_occur(cell):
    keys = [one.get("class") for one in ET.fromstring(draw_cell(cell, "cell")).iter(f"{SVG}g")]
    named = {one.split("cell-")[-1] for one in keys if one and one.startswith("cell-key")}
    assert named == {"longest", "concat"} | {family(edge.operation) for node in cell.nodes for edge in node}
