"""The picture of populations of cells."""

import numpy as np
import pytest

from nas.analysis.topology import STATISTICS
from nas.analysis.topology_picture import _levels, draw_populations
from nas.errors import InputError


def populations(many=9):
    draw = np.random.default_rng(0)
    sizes = {"accurate": 9, "robust": 9, "random": many}
    return {name: draw.integers(5, size=(size, len(STATISTICS))).astype(float) for name, size in sizes.items()}


def test_equal_values_give_an_equal_file(tmp_path):
    for name in ("a.svg", "b.svg", "a.png"):
        draw_populations(populations(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(f">{title}<" in text for title in [*STATISTICS, "accurate", "robust", "random"])


def test_thousands_of_cells_are_no_larger_file(tmp_path):
    draw_populations(populations(4000), tmp_path / "many.svg")
    assert (tmp_path / "many.svg").stat().st_size < 250_000


def test_populations_without_spread(tmp_path):
    draw_populations({"accurate": np.ones((1, len(STATISTICS)))}, tmp_path / "one.svg")
    assert (tmp_path / "one.svg").exists()


def test_heights_are_those_of_the_values():
    heights, counts = _levels(np.array([3.0, 1.0, 1.0, 1.02, 2.0]), 0.1)
    assert heights == pytest.approx([(1 + 1 + 1.02) / 3, 2, 3]) and counts.tolist() == [3, 1, 1]


def test_another_ending(tmp_path):
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        draw_populations(populations(), tmp_path / "picture.jpg")
