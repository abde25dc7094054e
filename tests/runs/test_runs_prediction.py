"""A run whose method trains an ensemble: trained, validated, compressed, judged, attacked and exported as one."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import nas, settings, small_recipe

from runs.directory import write_json
from search_spaces.genotype import StageGenotype

METHODS = {
    "noise": ("{name='self_ensemble', draws=3}", "mean of 3 draws of noise 0.2 before the first convolution"),
    "particles": ("{name='information_gain', particles=2}", "mean of 2 particles"),
}


@pytest.fixture(scope="module", params=[pytest.param("noise", marks=pytest.mark.slow), "particles"])
def ensemble_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A plain network trained and compressed by a method that predicts by an ensemble, and what it says of that."""
    folder = tmp_path_factory.mktemp(request.param)
    write_json(StageGenotype("plain", (2,), (4,)).to_data(), folder / "genotype.json")
    method, description = METHODS[request.param]
    changes = settings(f"train.method={method}", "train.epochs=2")
    for command in (
        ("train", small_recipe(folder), "--genotype", folder / "genotype.json", "--out", folder / "run", *changes),
        ("compress", folder / "run", "--set", "keep=0.5", "--epochs", 1, "--out", folder / "run" / "smaller"),
    ):
        outcome = nas(*command)
        assert outcome.status == 0, outcome.err
    return folder / "run", description


def test_every_network_of_the_run_predicts_as_it_was_trained(ensemble_run: tuple[Path, str]) -> None:
    run, description = ensemble_run
    kinds = [
        json.loads((run / folder / "model.json").read_text()) for folder in ("train/searched", "smaller", "export")
    ]
    assert kinds[0]["prediction"] == kinds[1]["prediction"] == kinds[2]["prediction"] is not None
    assert len(kinds[1]["plans"]) == 1
    # The mean over noise would draw other noise.
    assert (run / "export" / "network.py").exists() == ("particles" in description)
    for file in ("train/searched/result.json", "smaller/result.json"):
        assert json.loads((run / file).read_text())["prediction"].startswith(description)


@pytest.mark.slow
def test_it_is_attacked_as_it_predicts(ensemble_run: tuple[Path, str], tmp_path: Path) -> None:
    run, description = ensemble_run
    run = shutil.copytree(run, tmp_path / "run")
    common = ("attack", run, "--attack", "pgd", "--set", "steps=2", "--samples", 24, "--json")
    result = nas(*common).json()
    (check,) = [check for check in result["checks"] if check["name"] == "deterministic model"]
    if "particles" in description:
        assert check["detail"] == "two passes give the same logits"
        assert "does not" in nas(*common, "--draws", 4).refusal
    else:
        assert "mean over the randomness" in check["detail"]
        more = [nas(*common, "--draws", 40).json() for _ in range(2)]
        assert more[0]["attacks"] == more[1]["attacks"]
    if "particles" in description:
        assert "network.py" in nas("export", run).out
    else:
        assert "--to json,safetensors" in nas("export", run).refusal
    files = {entry["file"]: entry for entry in nas("export", run, "--to", "safetensors", "--json").json()}
    assert files["model.safetensors"]["difference"] == 0
