"""``nas study`` from its command line: a study made, told again, asked, resumed; and what it refuses."""

from __future__ import annotations

import csv
import html
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import nas, settings
from tiny_studies import tiny_study

from runs.directory import open_run
from runs.recipe import build
from runs.study import Worker, check_data, collect, ledger_of, plan, storage_of
from runs.study_trial import observation_from


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study of two configurations with two seeds by two workers, and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    outcome = nas("study", "width-depth", tiny_study(folder), "--out", folder / "run", "--workers", 2, "--json")
    return folder / "run", outcome.json()


def carried_out(path: Path) -> dict[str, Any]:
    """The study of a folder with one worker, in this process."""
    run = open_run(path)
    recipe = build(run.table)
    ledger = ledger_of(run, recipe, storage_of(run))
    check_data(ledger, recipe)
    Worker(run, recipe, plan(recipe), ledger).work()
    return collect(run, storage_of(run))


def begun(folder: Path, more: str = "", **changes: Any) -> Path:
    """A study that nobody has worked on."""
    from runs.directory import create
    from runs.recipe import read_table

    return create(folder / "run", "study width-depth", read_table(str(tiny_study(folder, more, **changes)))).path


def same(results: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the moment."""
    return {key: value for key, value in results.items() if key not in ("measured", "command", "recipe")}


def test_every_configuration_is_trained_with_every_seed(studied: tuple[Path, dict[str, Any]]) -> None:
    path, results = studied
    assert results["trials"] == {"complete": 4, "pruned": 0, "failed": 0, "running": 0}
    observations = [observation_from(entry["observation"]) for entry in results["observations"]]
    assert len({(one.configuration, one.seed) for one in observations}) == 4
    for one in observations:
        assert 0 <= one.robust <= one.natural <= 1 and one.n == 96 and one.epochs == 1
        assert len(one.stage_parameters) == 2 and sum(one.stage_parameters) < one.parameters
        folder = path / "trials" / f"{one.configuration}-s{one.seed}"
        kept = json.loads((folder / "result.json").read_text())
        assert observation_from(kept["observation"]) == one
        assert (folder / "model.safetensors").exists() and not (folder / "checkpoint.safetensors").exists()
    assert len({entry["digest"] for entry in results["observations"]}) == 4


def test_the_table_is_a_file_of_observations(studied: tuple[Path, dict[str, Any]]) -> None:
    path, results = studied
    rows = list(csv.DictReader(io.StringIO((path / "observations.csv").read_text())))
    assert len(rows) == 4
    for row, entry in zip(rows, results["observations"], strict=True):
        assert float(row["robust"]) == entry["observation"]["robust"] and row["seed"] == str(
            entry["observation"]["seed"]
        )
        assert float(row["pgd"]) == entry["attacks"]["pgd"]
    assert json.loads((path / "results.json").read_text()) == results


def test_one_worker_in_another_order_finds_the_same(studied: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, results = studied
    run = open_run(path)
    shutil.copytree(path, tmp_path / "copy")
    for place in ("journal.jsonl", "trials"):
        target = tmp_path / "copy" / place
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    again = carried_out(tmp_path / "copy")
    assert run.table == open_run(tmp_path / "copy").table
    assert same(again) == {key: value for key, value in same(results).items() if key in again}


def test_the_page_and_the_pictures_are_there(studied: tuple[Path, dict[str, Any]]) -> None:
    path, results = studied
    page = (path / "report.html").read_text()
    for one in results["configurations"]:
        assert one["configuration"] in page
    assert {file.suffix for file in (path / "figures").iterdir()} == {".svg", ".png"}
    assert results["verdict"][0].startswith("Best of 2: depths") and results["verdict"][0] in html.unescape(page)
    assert {one["verdict"] for one in results["claims"]} == {"cannot be tested"}
    measures = results["observations"][0]["observation"]["measures"]
    assert {"lipschitz", "stability", "jacobian"} <= measures.keys() and any(n.startswith("birth_") for n in measures)


def test_a_study_is_read_from_its_storage_alone(studied: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, results = studied
    (tmp_path / "bare").mkdir()
    for name in ("run.json", "journal.jsonl"):
        shutil.copy(path / name, tmp_path / "bare" / name)
    assert nas("study", "report", tmp_path / "bare", "--json").json() == results


def test_a_finished_study_resumed_does_nothing(studied: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = studied
    before = (path / "journal.jsonl").read_text()
    outcome = nas("study", "width-depth", "--resume", path, "--workers", 1)
    assert outcome.status == 0, outcome.err
    assert "4 trials: done before" in outcome.out and "best" not in outcome.err
    assert (path / "journal.jsonl").read_text() == before


def test_a_recommendation_trains(studied: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, results = studied
    sizes = sorted({entry["observation"]["parameters"] for entry in results["observations"]})
    found = nas("study", "recommend", path, "--max-params", sizes[0], "--out", tmp_path / "r", "--json").json()
    assert found["best"]["parameters"] == sizes[0] and found["considered"] == 1 and found["best"]["seeds"] == [0, 1]
    said = nas("study", "recommend", path, "--max-params", sizes[0], "--out", tmp_path / "r")
    assert "2 seeds, 95 % interval of the mean" in said.out and "nas train" in said.out
    trained = nas("train", found["recipe"], "--genotype", found["genotype"], "--out", tmp_path / "run", "--json").json()
    (model,) = trained["models"]
    assert model["parameters"] == found["best"]["parameters"]
    assert nas("study", "recommend", path, "--max-params", 3).refusal.endswith(
        f"parameters 3 (the smallest has {sizes[0]:,}): raise the budget"
    )


def test_a_lost_trial_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is killed after the second of three epochs: the next one trains only the third, to the same result."""
    from runs import study_trial

    path = begun(tmp_path, epochs=3, seeds="[0]")
    whole = (
        carried_out(begun(tmp_path / "whole", epochs=3, seeds="[0]")) if (tmp_path / "whole").mkdir() is None else {}
    )

    class Killed(BaseException):
        pass

    train_in, epochs = study_trial.train_in, []

    def until(limit: int) -> Any:
        def work(*arguments: Any, **more: Any) -> Any:
            def heard(record: Any) -> None:
                epochs.append(record["epoch"])
                if len(epochs) > limit:
                    raise Killed

            return train_in(*arguments, **{**more, "heard": heard})

        return work

    monkeypatch.setattr(study_trial, "train_in", until(2))
    with pytest.raises(Killed):
        carried_out(path)
    (trial,) = (path / "trials").iterdir()
    assert (trial / "checkpoint.safetensors").exists()
    # Its process lives on, so only its silence gives it away.
    monkeypatch.setattr("runs.study_ledger._born", lambda pid: "another")
    epochs.clear()
    monkeypatch.setattr(study_trial, "train_in", until(100))
    resumed = carried_out(path)
    assert epochs[:3] == [0, 1, 2] and resumed["observations"] == whole["observations"]


def test_a_sampler_draws_trains_all_seeds_and_repeats_nothing(tmp_path: Path) -> None:
    more = 'sampler = { name = "tpe", trials = 6, objectives = ["robust", "parameters"] }'
    results = carried_out(begun(tmp_path, more, depths="[[1, 2], [1]]"))
    keys = [(entry["observation"]["configuration"], entry["observation"]["seed"]) for entry in results["observations"]]
    assert len(set(keys)) == len(keys) == 2 * len({key for key, _ in keys})
    run = open_run(tmp_path / "run")
    ledger = ledger_of(run, build(run.table), storage_of(run))
    complete = [trial for trial in ledger.trials() if trial.state.name == "COMPLETE"]
    # Six draws from four configurations: what was drawn again was not trained again, and told alike.
    assert len(complete) == 6 and any("repeats" in trial.user_attrs for trial in complete)
    for trial in complete:
        results_of = trial.user_attrs.get("results")
        if results_of is not None:
            ones = [result["observation"] for result in results_of]
            assert trial.values == [sum(one["robust"] for one in ones) / 2, ones[0]["parameters"]]
        else:
            assert trial.values == ledger.trials()[trial.user_attrs["repeats"]].values


@pytest.mark.parametrize("sampler", ["random", "qmc", "nsga2"])
def test_samplers_keep_to_the_limits(tmp_path: Path, sampler: str) -> None:
    more = f'sampler = {{ name = "{sampler}", trials = 2 }}\nlimits = {{ parameters = 300 }}'
    results = carried_out(begun(tmp_path, more, seeds="[0]"))
    assert results["observations"]
    assert all(entry["observation"]["parameters"] <= 300 for entry in results["observations"])


def test_a_pruner_stops_hopeless_trials(tmp_path: Path) -> None:
    """A threshold that no training reaches: all are stopped after the first epoch, and stand in the record."""
    more = 'pruner = { name = "threshold", lower = 1.1 }'
    results = carried_out(begun(tmp_path, more, epochs=3, seeds="[0]"))
    assert results["trials"]["pruned"] == 2 and results["observations"] == []
    assert {(one["rung"], one["epoch"]) for one in results["pruned"]} == {(None, 0)}
    assert not list((tmp_path / "run" / "trials").rglob("*.safetensors"))


def test_rungs_are_trained_on_less_before(tmp_path: Path) -> None:
    more = 'rungs = [{ epochs = 2, data = 0.25 }]\npruner = { name = "threshold", lower = 1.1, n_warmup_steps = 1 }'
    results = carried_out(begun(tmp_path, more, epochs=3, seeds="[0]"))
    assert {(one["rung"], one["epoch"]) for one in results["pruned"]} == {(0, 1)}


def test_what_is_refused(studied: tuple[Path, dict[str, Any]], tmp_path: Path, finished_run: Path) -> None:
    path, _ = studied
    recipe = tiny_study(tmp_path)
    study = ("study", "width-depth")
    assert "name a recipe" in nas(*study).refusal
    assert (
        "of another recipe: train.epochs is 1 there and 2 here"
        in nas(*study, path.parent / "tiny.toml", "--resume", path, *settings("train.epochs=2")).refusal
    )
    assert f"nas study report {path}" in nas("report", path).refusal
    assert "was begun by 'nas run', it is not a study" in nas("study", "report", finished_run).refusal
    budget = nas(*study, recipe, "--out", tmp_path / "no", *settings("study.budget={parameters=1000000}")).refusal
    assert "the nearest possible is" in budget and not (tmp_path / "no").exists()
    away = nas(*study, recipe, "--out", tmp_path / "no", "--storage", "postgresql://me@127.0.0.1:1/none").refusal
    assert "cannot reach the storage postgresql://me@127.0.0.1:1/none" in away and not (tmp_path / "no").exists()
    assert "no [study] table" in nas(*study, "compare-training").refusal
    assert "nas study width-depth" in nas("run", recipe).refusal
    other = nas(*study, recipe, "--out", tmp_path / "no", "--storage", path / "journal.jsonl").refusal
    assert "holds a study 'tiny' of another recipe" in other
