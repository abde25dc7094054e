"""A run whose method trains an ensemble: trained, validated, compressed, judged, attacked and exported as one."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import nas, settings, small_recipe

METHOD = settings("train.method={name='self_ensemble', draws=3}", "search.stages.1.until=2", "train.epochs=2")


@pytest.fixture(scope="module")
def ensemble_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, from a recipe whose training method predicts by a mean over noise."""
    folder = tmp_path_factory.mktemp("ensemble")
    outcome = nas("run", small_recipe(folder), "--out", folder / "run", *METHOD)
    assert outcome.status == 0, outcome.err
    return folder / "run"


def test_every_network_of_the_run_predicts_as_it_was_trained(ensemble_run: Path) -> None:
    wanted = {"kind": "layer noise", "first": 0.2, "inner": 0.1, "draws": 3, "seed": 0}
    for folder in ("train/searched", "compress", "export"):
        assert json.loads((ensemble_run / folder / "model.json").read_text())["prediction"] == wanted
    assert not (ensemble_run / "export" / "network.py").exists()
    results = json.loads((ensemble_run / "results.json").read_text())
    for model in results["models"]:
        assert model["prediction"].startswith("mean of 3 draws of noise 0.2 before the first convolution")
        (check,) = [check for check in model["checks"] if check["name"] == "deterministic model"]
        assert "mean over the randomness" in check["detail"]


def test_it_is_attacked_by_its_own_draws_or_by_more(ensemble_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(ensemble_run, tmp_path / "run")
    common = ("attack", run, "--attack", "pgd", "--set", "steps=2", "--samples", 24, "--json")
    results = [nas(*common, *more).json() for more in ([], ["--draws", 40], ["--draws", 40])]
    assert results[1]["attacks"] == results[2]["attacks"]
    assert all("mean over the randomness" in result["checks"][0]["detail"] for result in results)
    assert "--to json,safetensors" in nas("export", run).refusal
    assert nas("export", run, "--to", "safetensors", "--json").json()[0]["difference"] == 0


def test_draws_are_refused_for_a_network_that_predicts_alone(run_copy: Path) -> None:
    assert "does not" in nas("attack", run_copy, "--attack", "fgsm", "--draws", 4).refusal
