"""Pictures for TensorBoard: PNG files that differ where cells differ, and whose colours tell more from less."""

import io

import pytest
from PIL import Image

from nas.analysis.raster import cell_png, mixing_png
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Cell, Edge


def pixels(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def test_cells():
    cells = load_genotype("arnas").cell
    pictures = {kind: cell_png(cell) for kind, cell in cells.items()}
    assert len(set(pictures.values())) == len(cells)
    assert max(map(len, pictures.values())) < 40_000
    for kind, picture in pictures.items():
        assert picture == cell_png(cells[kind])
        # Blue where there are separable convolutions, and nowhere else.
        blue = any(b > r + 60 and b > g + 20 and r < 90 for _, (r, g, b) in pixels(picture).getcolors(100))
        assert blue == any(edge.operation.startswith("sep") for node in cells[kind].nodes for edge in node)


def test_any_name_can_be_drawn():
    picture = cell_png(
        Cell(((Edge("a_name_that_is_much_too_long_for_any_label", 0), Edge("\N{SNOWMAN}\x00\ud800", 1)),))
    )
    assert len(pixels(picture).getcolors(10_000)) > 2


@pytest.mark.parametrize("more", ["sep_conv_3x3", "skip_connect"])
def test_mixing_weights(more):
    """Blue where an operation has more than its share, orange where it has less; operations from left to right."""
    names = ["sep_conv_3x3", "skip_connect"]
    picture = pixels(mixing_png({name: [0.8 if name == more else 0.2] * 5 for name in names}))
    width, height = picture.size
    # In the last row, in the corner of each column's field.
    for place, name in enumerate(names):
        red, _, blue = picture.getpixel((width - 16 - 92 * (2 - place) + 6, height - 30))
        assert (blue > red + 50) == (name == more)
        assert (red > blue + 50) == (name != more)
