"""Networks of stages and cells with given depths through the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import nas

from nas.model_file import load_model
from runs.directory import write_json
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Genotype
from search_spaces.residual import wide


def test_a_residual_network_is_trained_by_a_recipe_for_cells(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[train] states parameters and cells, which have no meaning here."""
    # Reloading files in a fresh process and drawing the page take seconds, and are not what is asked.
    monkeypatch.setattr("runs.exporting.check_exports", lambda *arguments: [])
    monkeypatch.setattr("nas.report.page.curves.curves", lambda *arguments, **more: "")
    monkeypatch.setattr("nas.report.page.curves.intervals", lambda *arguments: "")
    genotype = wide((1, 1), (1, 1), (8, 12), stem=4, se="residual", activation="silu")
    write_json(genotype.to_data(), tmp_path / "small.json")
    size = [part for item in ("epochs=1", "channels=0", "parameters=9000") for part in ("--set", f"train.{item}")]
    outcome = nas("train", recipe_file, "--genotype", "small.json", "--out", "run", *size)
    assert outcome.status == 0, outcome.err
    spec, _ = load_model(tmp_path / "run" / "train" / "searched")
    assert spec.genotype == genotype
    written = {path.name for path in (tmp_path / "run" / "export").iterdir()}
    exported = {"genotype.json", "model.json", "model.safetensors", "network.py", "network.safetensors"}
    assert written - {"timing.json", "result.json"} == exported


def test_analyse_says_what_each_stage_costs() -> None:
    told = nas("analyse", "wrn-34-r")
    assert told.status == 0 and "channels" not in told.out and "pictures" not in told.out
    rows = [line.split() for line in told.out.splitlines()]
    assert ["2", "5", "640", "35,237,760", "9,017.8"] in rows
    # Nobody tells the stages of a perceptron apart.
    Path("mlp.json").write_text('{"schema": 1, "space": "mlp", "depths": [1, 2], "widths": [8, 4]}')
    assert ["2", "2", "4", "-", "-"] in [line.split() for line in nas("analyse", "mlp.json").out.splitlines()]


def test_analyse_counts_the_cells_that_depths_give(tmp_path: Path) -> None:
    genotype = load_genotype("arnas")
    assert isinstance(genotype, Genotype)
    layout = dataclasses.replace(genotype.layout, depths=(1, 2, 3))
    write_json(dataclasses.replace(genotype, layout=layout).to_data(), tmp_path / "deep.json")
    assert "8 channels, 6 cells" in nas("analyse", "deep.json", "--channels", "8").out
    (data,) = nas("analyse", "deep.json", "--channels", "8", "--json").json()
    assert [cell["section"] for cell in data["complexity"]["cells"]] == [1, 2, 2, 3, 3, 3]


def test_published_networks_are_listed_with_their_sizes() -> None:
    rows = nas("list", "genotypes", "--json").json()
    assert rows["wrn-34-r"] == "space residual, depths 5-5-5, widths 320-640-512"
    assert rows["robustresnet-a1"].endswith("block robust, se residual, se_reduction 64")
