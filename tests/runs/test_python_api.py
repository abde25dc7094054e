"""The Python interface: a search, its training, what they left, in a script as in a notebook."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import toml

import runs
from nas.errors import InputError
from runs.recipe import read_table


def test_search_train_and_look(recipe_file: Path, tmp_path: Path) -> None:
    found = runs.search(recipe_file, out=tmp_path / "found", settings={"search.stages.1.until": 2, "seed": 3})
    assert read_table(str(recipe_file))["search"]["stages"][1]["until"] == 3
    shown = found._repr_html_()
    assert "<svg" in shown and "accurate" in shown
    trained = runs.train(recipe_file, found, out=tmp_path / "trained")
    assert trained.genotype == found.genotype
    network = trained.network()
    assert not network.training and network(torch.rand(2, 1, 8, 8)).shape == (2, 2)
    worst = trained.results["models"][0]["worst_case"]
    assert 0 <= worst <= 1 and trained.results["verdict"][0].split()[0] in trained._repr_html_()
    again = runs.open(trained.path)
    assert again == trained and again.resume().results == trained.results
    with pytest.raises(InputError, match="no trained network 'plain'"):
        trained.network("plain")


def test_what_is_wrong_is_said_before_anything_is_written(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'channels'"):
        runs.search(recipe_file, out=tmp_path / "x", settings={"search.chanels": 4})
    with pytest.raises(InputError, match="cannot be written into a recipe"):
        runs.search(recipe_file, out=tmp_path / "x", settings={"search.channels": {1: float("nan"), (2,): 3}})
    with pytest.raises(InputError, match="not a run directory"):
        runs.open(tmp_path)
    assert not (tmp_path / "x").exists()


def test_names_in_a_notebook_are_text(run_copy: Path) -> None:
    moved = run_copy.rename(run_copy.with_name("<b>run"))
    assert "<b>" not in runs.open(moved)._repr_html_()


@pytest.mark.slow
def test_a_script_without_a_guard_may_use_workers(recipe_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    settings = "settings={'workers': 2, 'threads': 2}"
    script.write_text(
        f"import runs\nprint(runs.search({toml(recipe_file)}, out='found', {settings}).genotype.digest)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()[-1]) == 12 and done.stdout.count("search: done") == 1
