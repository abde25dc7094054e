"""Pictures of a study: what they show is what was observed, and equal observations give equal files."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from nas.errors import InputError
from nas.report.curves import PAPER, style
from nas.report.study_pictures import PICTURES, Studied, front_of, heat_maps, inline, pareto, save
from nas.studies.observation import Observation


def observed(seeds: int = 2) -> list[Observation]:
    """A grid of two stages, robust by a law: deep first stages help, wide second ones harm."""
    found = []
    for depths, widths in itertools.product(itertools.product((1, 2, 3), (1, 2)), itertools.product((8, 16), (16, 32))):
        parts = tuple(9 * width**2 * depth for depth, width in zip(depths, widths, strict=True))
        for seed in range(seeds):
            robust = 0.5 + 0.05 * depths[0] - 0.002 * widths[1] + 0.01 * seed
            found.append(
                Observation(
                    f"{depths}{widths}", "plain", depths, widths, sum(parts), 4 * sum(parts), parts, parts, seed, 5,
                    robust + 0.2, robust, 100,
                )
            )  # fmt: skip
    return found


def drawn(draw, studied: Studied) -> tuple[Figure, str]:
    with style(PAPER):
        figure = Figure(layout="constrained")
        return figure, draw(figure, PAPER, studied)


def test_heat_maps_show_means_over_all_else() -> None:
    observations = observed()
    figure, words = drawn(heat_maps, Studied(observations))
    first, second, whole = figure.axes[:3]
    means = np.array(
        [
            [np.mean([o.robust for o in observations if (o.depths[0], o.widths[0]) == (d, w)]) for w in (8, 16)]
            for d in (1, 2, 3)
        ]
    )
    np.testing.assert_allclose(np.asarray(first.collections[0].get_array()).reshape(3, 2), means)
    assert [label.get_text() for label in first.get_xticklabels()] == ["8", "16"]
    assert (first.get_title(), second.get_title(), whole.get_title()) == ("stage 1", "stage 2", "all stages")
    assert "stage 1: highest 60.7% at 3 blocks" in words
    # The same colour stands for the same accuracy in all of them.
    assert len({axes.collections[0].get_clim() for axes in (first, second, whole)}) == 1


def test_what_does_not_vary_has_no_map() -> None:
    same = [one for one in observed() if one.depths[1] == 1 and one.widths[1] == 16]
    figure, _ = drawn(heat_maps, Studied(same))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["stage 1", "all stages"]


def test_front_by_brute_force() -> None:
    draw = random.Random(0)
    for more in (False, True):
        for _ in range(50):
            points = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(draw.randint(1, 12))]
            cost, gain = zip(*points, strict=True)
            sign = 1 if more else -1

            def surpassed(point: tuple[int, int], sign: int = sign, points: list = points) -> bool:
                return any(
                    other != point and sign * other[0] >= sign * point[0] and other[1] >= point[1] for other in points
                )

            best = {point for point in points if not surpassed(point)}
            front = front_of(cost, gain, more=more)
            assert {points[i] for i in front} == best and len(front) == len(best)
            assert [cost[i] for i in front] == sorted(cost[i] for i in front)


def test_one_point_a_configuration_and_its_seeds_as_a_line() -> None:
    figure, _ = drawn(pareto, Studied(observed(seeds=3)))
    assert len(figure.axes[0].collections[0].get_offsets()) == 24
    assert len(figure.axes[0].lines) == 24 + 1
    figure, _ = drawn(pareto, Studied(observed(seeds=1)))
    assert len(figure.axes[0].lines) == 1


@pytest.mark.parametrize("name", PICTURES)
def test_files_and_page(name: str, tmp_path: Path) -> None:
    studied = Studied(observed())
    for ending in ("svg", "png"):
        for copy in ("a", "b"):
            save(PICTURES[name], studied, tmp_path / f"{copy}.{ending}")
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    svg = inline(PICTURES[name], studied)
    assert svg.startswith('<svg role="img" aria-label="') and "currentColor" in svg
    # No stand-in is left over, and nothing comes from outside.
    assert not re.search(r"#fe0[01]0", svg) and "http" not in re.sub(r'xmlns\S*="[^"]*"', "", svg)
    assert not plt.get_fignums(), "figures are not kept by pyplot"
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        save(PICTURES[name], studied, tmp_path / "a.gif")


def test_too_few_configurations_have_no_fit(tmp_path: Path) -> None:
    few = Studied(observed()[:6])
    assert inline(PICTURES["fits"], few) == "" == inline(heat_maps, Studied(observed()[:2]))
    save(PICTURES["fits"], few, tmp_path / "fits.svg")
    assert not [*tmp_path.iterdir()]
