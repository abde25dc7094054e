"""Where the kinds of cell stand, for the published sizes and for every layout and size."""

import dataclasses
import itertools

import pytest

from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.layout import Layout

PLACEMENT = {
    8: {"reduction": [2, 5], "accurate": [0, 1, 3, 4], "robust": [6, 7]},
    14: {"reduction": [4, 9], "accurate": [0, 1, 2, 3, 5, 6, 7, 8], "robust": [10, 11, 12, 13]},
    20: {"reduction": [6, 13], "accurate": [*range(6), *range(7, 13)], "robust": [*range(14, 20)]},
}


@pytest.mark.parametrize("cells", PLACEMENT)
def test_placement_of_the_published_networks(cells):
    placed = DSARA.layout.place(cells, 64)
    found = {kind: [i for i, place in enumerate(placed) if place.kind == kind] for kind in PLACEMENT[cells]}
    assert found == PLACEMENT[cells]
    assert [i for i, place in enumerate(placed) if place.reduces] == PLACEMENT[cells]["reduction"]
    first, second = PLACEMENT[cells]["reduction"]
    expected = [64] * first + [128] * (cells - first)
    assert [place.channels for place in placed] == expected
    assert [place.section for place in placed] == [0] * first + [1] * (second - first) + [2] * (cells - second)


def test_darts_doubles_at_both_reductions():
    placed = DARTS.layout.place(20, 36)
    assert sorted({(place.section, place.channels) for place in placed}) == [(0, 36), (1, 72), (2, 144)]
    assert {place.kind for place in placed} == {"normal", "reduction"}


def test_kinds_are_in_order_of_appearance():
    assert DSARA.layout.kinds == ("accurate", "reduction", "robust")
    assert DARTS.layout.kinds == ("normal", "reduction")
    assert Layout(("a",), (1,)).kinds == ("a",)
    assert Layout(("robust", "robust", "accurate"), (2, 2, 1)).kinds == ("robust", "reduction", "accurate")


@pytest.mark.parametrize("sections", range(1, 6))
def test_every_size_is_refused_or_holds_every_kind(sections):
    """All placements of one to three kinds on up to five sections, in networks of up to 14 cells."""
    for kinds in itertools.product("abc", repeat=sections):
        layout = Layout(kinds, (1,) * sections)
        accepted = []
        for cells in range(15):
            try:
                placed = layout.place(cells, 4)
            except ValueError:
                continue
            accepted.append(cells)
            assert len(placed) == cells
            assert {place.kind for place in placed} == set(layout.kinds), (kinds, cells)
            assert sum(place.reduces for place in placed) == sections - 1
            assert [place.section for place in placed] == sorted(place.section for place in placed)
        assert accepted[0] == layout.minimum_cells
        assert set(range(2 * sections, 15)) <= set(accepted), "two cells a section are always enough"


def test_impossible_layouts_are_refused():
    for sections, ratio in [((), ()), (("a",), (1, 2)), (("a", "b"), (1, 0)), (("a",), (-1,)), (("a",), (1025,))]:
        with pytest.raises(ValueError):
            Layout(sections, ratio)
    for stem in (3, 0, -64, 8193):
        with pytest.raises(ValueError):
            Layout(("a",), (1,), stem=stem)
    for cells, channels in [(3, 4), (0, 4), (-1, 4), (8, 0), (8, -2)]:
        with pytest.raises(ValueError):
            DSARA.layout.place(cells, channels)


def test_depths_say_where_sections_begin():
    layout = dataclasses.replace(DSARA.layout, depths=(1, 4, 2))
    for asked in (0, 7, 20):
        placed = layout.place(asked, 8)
        assert [place.kind for place in placed] == [
            "accurate", "reduction", "accurate", "accurate", "accurate", "reduction", "robust"
        ]  # fmt: skip
        assert [place.section for place in placed] == [0, 1, 1, 1, 1, 2, 2]
        assert [place.channels for place in placed] == [8] + [16] * 6
        assert [place.reduces for place in placed] == [False, True, False, False, False, True, False]
        assert layout.count(asked) == layout.minimum_cells == 7
    assert DSARA.layout.count(20) == 20


@pytest.mark.parametrize("cells", [8, 14, 20])
def test_even_depths_are_the_layout_without_depths(cells):
    first, second = DSARA.layout.reductions(cells)
    given = dataclasses.replace(DSARA.layout, depths=(first, second - first, cells - second))
    assert given.place(0, 4) == DSARA.layout.place(cells, 4)


@pytest.mark.parametrize(
    "depths", [(3, 3), (3, 3, 3, 3), (0, 3, 3), (3, 3, -1), (3, 3, 1), (1, 1, 1), (1, 1020, 4)], ids=str
)
def test_impossible_depths_are_refused(depths):
    with pytest.raises(ValueError, match="depths"):
        dataclasses.replace(DSARA.layout, depths=depths)


def test_a_section_may_be_its_reduction_where_its_kind_stands_elsewhere():
    layout = dataclasses.replace(DSARA.layout, depths=(2, 1, 2))
    assert [place.kind for place in layout.place(0, 4)] == ["accurate"] * 2 + ["reduction"] * 2 + ["robust"]
