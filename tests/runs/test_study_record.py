"""What a study says: which configuration is best, with what certainty, and the files it writes."""

from __future__ import annotations

import random
import statistics
import tomllib
from typing import Any

import pytest

from nas.errors import InputError
from nas.studies.observation import Observation
from runs.recipe import build, read_table, shipped
from runs.study_record import candidates, recommend, spread_of, toml


def observation(name: str, seed: int, robust: float, parameters: int = 100, **more: Any) -> Observation:
    shape = {"depths": (1, 1), "widths": (4, 4), **more}
    return Observation(
        configuration=name, space="plain", parameters=parameters, macs=10 * parameters, stage_parameters=(40, 50),
        stage_macs=(400, 500), seed=seed, epochs=1, natural=0.9, robust=robust, n=1000, **shape,
    )  # fmt: skip


def test_the_pooled_deviation_is_that_of_the_seeds() -> None:
    draw = random.Random(0)
    many = [observation(f"c{i}", seed, draw.gauss(0.5 + 0.001 * i, 0.02)) for i in range(400) for seed in range(3)]
    spread = spread_of(many)
    assert spread is not None and spread.freedom == 800
    assert spread.deviation == pytest.approx(0.02, rel=0.1)
    # Half a 95 % interval of a mean of four.
    assert spread.half(4) == pytest.approx(1.963 * spread.deviation / 2, rel=1e-3)
    assert spread_of([observation("a", 0, 0.5), observation("b", 0, 0.6)]) is None


def test_a_configuration_of_few_seeds_has_to_be_better_by_more() -> None:
    """Of a slightly higher mean over one seed and a lower one over many, the second is surer."""
    sure = [observation("sure", seed, 0.60 + 0.01 * (seed % 2)) for seed in range(8)]
    lucky = [observation("lucky", 0, 0.612)]
    assert [one.digest for one in candidates(sure + lucky)] == ["sure", "lucky"]
    assert statistics.fmean(one.robust for one in sure) < 0.612


def test_the_recommended_is_the_best_within_the_budget() -> None:
    draw = random.Random(1)
    means = {"small": (0.50, 100), "good": (0.60, 200), "large": (0.70, 300), "near": (0.599, 150)}
    found = [
        observation(name, seed, mean + draw.gauss(0, 0.004), size, widths=(4, 4 + size // 50))
        for name, (mean, size) in means.items()
        for seed in range(3)
    ]
    assert recommend(found).best.digest == "large" and recommend(found).equals == ()
    within = recommend(found, parameters=200)
    assert {within.best.digest, *(one.digest for one in within.equals)} == {"good", "near"}
    assert within.considered == 3 and {one.digest for one in within.neighbours} >= {"small"}
    assert "within chance" in " ".join(within.lines())
    assert recommend(found, macs=1000).best.digest == "small"
    with pytest.raises(InputError, match=r"parameters 99 \(the smallest has 100\)"):
        recommend(found, parameters=99)
    with pytest.raises(InputError, match="measured no latency"):
        recommend(found, latency=1)
    with pytest.raises(InputError, match="no finished trial"):
        recommend([])


def test_one_seed_alone_is_told_as_such() -> None:
    lines = recommend([observation("a", 0, 0.5), observation("b", 0, 0.9)]).lines()
    assert "one seed" in lines[0] and "1000 test images" in lines[0]


def test_neighbours_differ_in_one_stage() -> None:
    ones = [observation("a", 0, 0.9), observation("b", 0, 0.5, depths=(2, 1)), observation("c", 0, 0.5, depths=(2, 2))]
    ones.append(observation("d", 0, 0.5, options=(("se", "plain"),)))
    assert {one.digest for one in recommend(ones).neighbours} == {"b", "d"}


@pytest.mark.parametrize("name", sorted(shipped()))
def test_recipes_written_as_toml_read_back_the_same(name: str) -> None:
    table = read_table(name)
    assert tomllib.loads(toml(table)) == table


@pytest.mark.parametrize("name", [name for name in sorted(shipped()) if name.startswith("study-")])
def test_shipped_studies_can_be_built(name: str) -> None:
    study = build(read_table(name)).study
    assert study is not None and len(study.seeds) >= 2


def test_strange_texts_survive_toml() -> None:
    table = {"name": 'a "quoted" \\ name', "x": {"with space": [1.5, True, {"deep": "é\n"}], "inf": float("inf")}}
    assert tomllib.loads(toml(table)) == table
