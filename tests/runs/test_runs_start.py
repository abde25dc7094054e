"""The first hour: what ``nas`` says by itself, what a machine can do, a recipe for data of one's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import nas

from nas.data.digits import Digits
from nas.data.image_data import ImageData
from runs.estimate import Estimate
from runs.new_recipe import EFFORTS, FEWEST_TEST, FEWEST_TRAIN, new_recipe
from runs.recipe import build, read_table


def test_nas_by_itself_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = nas()
    assert outcome.status == 0 and not outcome.err
    for command in ("nas run digits", "nas doctor", "nas new", "nas --help"):
        assert command in outcome.out
    assert "unfinished" not in outcome.out


def test_nas_by_itself_names_unfinished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, done in (("first", True), ("second one", False)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"schema": 1, "command": "run", "recipe": {}, "genotype": None}))
        if done:
            (folder / "results.json").write_text("{}")
    out = nas().out
    assert "nas run --resume 'runs/second one'" in out and "runs/first" not in out


def test_doctor_says_what_the_machine_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = nas("doctor", "--machine-only")
    assert outcome.status == 0
    assert torch.__version__ in outcome.out and f"free in {tmp_path}" in outcome.out
    found = nas("doctor", "--machine-only", "--json").json()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert any(row["found"].startswith(f"{cores} cores") for row in found["machine"]) and found["times"] == []


def test_doctor_refuses_what_it_cannot_time(tmp_path: Path) -> None:
    assert "did you mean 'digits'" in nas("doctor", "digts").refusal
    assert "--machine-only" in nas("doctor", "digits", "--machine-only").refusal


def test_doctor_times_the_recipes_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.doctor.estimate", lambda recipe, data: Estimate(30.0, 100.0, 80.0, 2))
    out = nas("doctor", "digits").out
    assert "about 2 min 00 s" in out and "nas run digits" in out
    assert "compare-training" not in out.partition("how long")[2].partition("next:")[0]
    assert nas("doctor", "digits", "--json").json()["times"][0]["seconds"] == 120.0


def test_a_new_recipe_is_built_for_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runs.new_recipe.estimate", lambda recipe, data: Estimate(10.0, 20.0, 20.0, 2))
    for name in ("cats", "dögs"):
        folder = tmp_path / "my images" / name
        folder.mkdir(parents=True)
        for number in range(6):
            Image.fromarray(np.full((40, 40, 3), 30 * number, np.uint8)).save(folder / f"{number}.png")
    outcome = nas("new", "mine", "--data", "folder:my images", "--size", 24, "--minutes", 1)
    assert outcome.status == 0, outcome.err
    assert "2 classes" in outcome.out and "nas run mine.toml" in outcome.out
    recipe = build(read_table("mine.toml"))
    data = recipe.data.source()
    assert data.input_shape == (3, 24, 24) and data.classes == ("cats", "dögs")
    assert recipe.search.settings.augmentation.flip and recipe.search.settings.augmentation.crop == 3
    assert recipe.threat_model.epsilon == pytest.approx(8 / 255, abs=1e-6)
    # Every line that is not a comment says what it is for, or its name does.
    text = Path("mine.toml").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120 and text.count("# ") > 20


def test_a_new_recipe_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("precious")
    assert "there already" in nas("new", "mine", "--data", "digits").refusal
    assert Path("mine.toml").read_text() == "precious"
    assert "letters, digits" in nas("new", "../mine", "--data", "digits").refusal
    assert "did you mean 'digits'" in nas("new", "other", "--data", "digts").refusal
    assert not Path("other.toml").exists()


def _digits() -> ImageData:
    return Digits()()


def _seconds(recipe, data) -> Estimate:
    """A recipe that takes as long as it has weights and images."""
    share = recipe.train.parameters / EFFORTS[0].parameters
    return Estimate(0.0, share * len(data.y_train), share * len(data.y_test), 1)


def test_the_largest_effort_that_fits_the_time_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.new_recipe.estimate", _seconds)
    data = _digits()
    smallest = (len(data.y_train) + len(data.y_test)) / 60

    def parameters(minutes: float) -> int:
        return read(new_recipe("x", {"name": "digits"}, data, minutes).text).train.parameters

    assert parameters(smallest * 1.01) == EFFORTS[0].parameters
    assert parameters(smallest * 4) == EFFORTS[1].parameters
    assert parameters(smallest * 1e6) == EFFORTS[-1].parameters


def read(text: str):
    import tomllib

    return build(tomllib.loads(text))


def test_where_none_fits_fewer_images_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.new_recipe.estimate", _seconds)
    data = _digits()
    parts = {"x_train": data.x_train, "y_train": data.y_train, "x_test": data.x_test, "y_test": data.y_test}
    np.savez(tmp_path / "own.npz", **{key: value.numpy() for key, value in parts.items()})
    made = new_recipe("x", {"name": "arrays", "path": str(tmp_path / "own.npz")}, data, 25)
    used = read(made.text).data.source()
    assert made.time.seconds <= 25 * 60 and FEWEST_TEST <= len(used.y_test) <= len(data.y_test)
    assert FEWEST_TRAIN <= len(used.y_train) < len(data.y_train)
    assert "remove the limits" in made.text
    # A set that cannot be limited is used whole.
    assert "limit" not in new_recipe("x", {"name": "digits"}, data, 25).text
