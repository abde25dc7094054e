"""``nas analyse`` of several architectures: populations, random ones beside them, what they are refused for."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import nas

from nas.analysis.topology import STATISTICS
from runs.directory import write_json
from search_spaces import darts, dsara
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import StageGenotype

SMALL = ("--cells", "4", "--channels", "2", "--size", "8")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Ten random architectures, each in a folder of its own, in files of one name."""
    generator = torch.Generator().manual_seed(5)
    paths = []
    for number in range(10):
        paths.append(tmp_path / f"search-{number}" / "genotype.json")
        paths[-1].parent.mkdir()
        write_json(dsara.SPACE.random(generator).to_data(), paths[-1])
    return paths


def test_one_architecture_says_what_it_always_said() -> None:
    (row,) = nas("analyse", "arnas", *SMALL, "--json").json()
    assert row["digest"] == load_genotype("arnas").digest and row["differences"]["dilated"] == -1
    rows = nas("analyse", "arnas", *SMALL, "--compare", "ARNAS", "--json").json()
    assert [one["name"] for one in rows] == ["arnas", "ARNAS"]
    told = nas("analyse", "arnas", *SMALL).out
    assert "6 of 8" in told and "p (Holm)" not in told


def test_population_against_random(files: list[Path], tmp_path: Path) -> None:
    table, pictures = tmp_path / "rows.csv", tmp_path / "pictures"
    arguments = ("analyse", *files, "--compare", "random:20", *SMALL)
    result = nas(*arguments, "--json", "--csv", table, "--pictures", pictures).json()
    assert [row["name"] for row in result["architectures"]] == [str(path) for path in files]
    assert [row["genotype"] for row in result["architectures"]] == [json.loads(path.read_text()) for path in files]
    assert len(result["random"]) == 20 and len({json.dumps(cells) for cells in result["random"]}) == 20
    assert [len(row) for row in result["distances"]] == [10] * 10 and result["distances"][3][3] == 0
    compared = {(one["first"], one["second"]): one for one in result["comparisons"]}
    assert list(compared) == [("accurate", "robust"), ("accurate", "random"), ("robust", "random")]
    pair = compared["accurate", "robust"]
    assert [row["statistic"] for row in pair["statistics"]] == list(STATISTICS)
    # The mean of the differences of the single architectures is the difference of the population.
    for row in pair["statistics"]:
        single = [one["differences"][row["statistic"]] for one in result["architectures"]]
        assert row["difference"] == pytest.approx(sum(single) / 10)

    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [row["kind"] for row in rows] == ["accurate", "reduction", "robust"] * 30
    for kind, side in (("accurate", "first"), ("robust", "second")):
        depths = [float(row["depth"]) for row in rows if row["kind"] == kind and not row["name"].startswith("random")]
        assert sum(depths) / 10 == pytest.approx(pair["statistics"][0][side])
    assert all(sum(int(row[name]) for name in dsara.SPACE.operations) == 8 for row in rows)
    assert int(rows[0]["parameters"]) == result["architectures"][0]["complexity"]["parameters"]

    # A picture of each cell, though all files have one name, and one of the population.
    assert len(list(pictures.glob("*.svg"))) == 31
    drawing = ET.fromstring((pictures / "topology.svg").read_text(encoding="utf-8"))
    words = {"".join(element.itertext()).strip() for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert set(STATISTICS) <= words and {"accurate", "robust", "random", "(10)", "(40)"} <= words

    told = nas(*arguments)
    assert told.status == 0 and told.err == ""
    for one in result["comparisons"]:
        assert one["verdict"] in told.out.splitlines()
    assert "4 of 8" not in told.out  # ten architectures are not told one by one
    assert all(f"\n{name} " in told.out for name in STATISTICS if name != "depth")
    again = shlex.split(told.out.split("next:")[1])
    assert again[:2] == ["nas", "analyse"] and nas(*again[1:], *SMALL).status == 0


def test_seed_decides_which_random_ones(files: list[Path]) -> None:
    def drawn(*options: str) -> Any:
        return nas("analyse", *files[:1], "--compare", "random:3", *SMALL, *options, "--json").json()["random"]

    assert drawn() == drawn("--seed", "0") != drawn("--seed", "1")


def test_as_many_as_are_set_beside_one_are_told(files: list[Path]) -> None:
    others = [part for path in files[1:6] for part in ("--compare", path)]
    assert nas("analyse", files[0], *others, *SMALL).out.count("from inputs") == 6


def test_two_are_too_few(files: list[Path]) -> None:
    told = nas("analyse", *files[:2], *SMALL).out
    assert told.count("from inputs") == 2  # both are told, too
    assert "accurate against robust: too few architectures to tell (2: " in told and "give at least 9" in told


def test_runs_are_a_population(finished_run: Path, files: list[Path]) -> None:
    result = nas("analyse", finished_run, files[0], *SMALL, "--json").json()
    assert result["architectures"][0]["genotype"] == json.loads((finished_run / "search" / "genotype.json").read_text())
    assert result["comparisons"][0]["n_first"] == 2


def test_copies_are_pointed_out(files: list[Path]) -> None:
    shutil.copy(files[0], files[1])
    told = nas("analyse", *files[:3], *SMALL).out
    assert f"note: {files[0]} and {files[1]} are the same architecture" in told
    assert len(nas("analyse", *files[:3], *SMALL, "--json").json()["notes"]) == 1


def test_cells_of_one_kind(tmp_path: Path) -> None:
    path = tmp_path / "darts.json"
    write_json(darts.SPACE.random(torch.Generator()).to_data(), path)
    (only,) = nas("analyse", path, "--compare", "random:5", *SMALL, "--json").json()["comparisons"]
    assert (only["first"], only["second"]) == ("normal", "random")
    other = tmp_path / "other.json"
    write_json(darts.SPACE.random(torch.Generator().manual_seed(1)).to_data(), other)
    assert "random:200 sets them beside random ones" in nas("analyse", path, other, *SMALL).out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("arnas", "--compare", "random:0"), "random:1 to random:2000"),
        (("arnas", "--compare", "random:2001"), "random:1 to random:2000"),
        (("arnas", "--compare", "random:"), "random:1 to random:2000"),
        (("arnas", "--compare", "random:many"), "random:1 to random:2000"),
        (("arnas", "--compare", "random:3", "--compare", "random:4"), "more than once"),
        (("random:5",), "name an architecture"),
        (("arnas", "arnas"), "named 2 times"),
        (("arnas", "--compare", "arnas"), "named 2 times"),
        (("arnas", "darts.json"), "one space"),
        (("arnas", "stages.json"), "without cells"),
        (("stages.json", "--compare", "random:5"), "no cells to draw"),
        (("arnas", "--csv", "/proc/rows.csv"), "cannot write"),
        (("arnas", "--compare", "random:5", "--seed", "-1"), "seed"),
    ],
    ids=str,
)
def test_populations_that_cannot_be(arguments: tuple[str, ...], word: str, tmp_path: Path) -> None:
    write_json(darts.SPACE.random(torch.Generator()).to_data(), tmp_path / "darts.json")
    write_json(StageGenotype("plain", (1,), (4,)).to_data(), tmp_path / "stages.json")
    told = nas("analyse", *arguments, *SMALL)
    assert word in told.refusal
    assert not told.out or "--csv" in arguments
