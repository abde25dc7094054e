"""How long a recipe takes: passes are counted exactly, times grow as the work does, and nothing is downloaded."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY

from nas.attacks.pgd import Pgd
from nas.data.digits import Digits
from nas.evaluation.robustness import Trial
from nas.threat_model import ThreatModel
from runs import estimate as estimating
from runs.context import Context
from runs.directory import RunDirectory
from runs.doctor import time_recipe
from runs.estimate import estimate
from runs.recipe import Recipe, build, read_table

OVERRIDES = [item for item in TINY if item != "--set"]


def recipe(*overrides: str) -> Recipe:
    return build(read_table("digits", [*OVERRIDES, *overrides]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second after the one before."""
    seconds = itertools.count()
    monkeypatch.setattr(estimating._Clock, "now", lambda self: float(next(seconds)))


def passes(steps: int, restarts: int = 1) -> float:
    context = Context(RunDirectory(Path(), "run", {}, None), recipe(), lambda progress: None)
    attack = Pgd(threat_model=ThreatModel("linf", 0.1), steps=steps)
    return estimating._passes_of({"pgd": Trial(attack, restarts)}, context)


def test_each_step_of_an_attack_is_two_passes() -> None:
    assert passes(8) - passes(5) == 2 * 3
    assert passes(8, restarts=3) - passes(5, restarts=3) == 3 * 2 * 3


def test_times_are_steps_times_the_seconds_of_one(clock: None) -> None:
    data = Digits()()
    # A step takes a second, what follows the last of an epoch another; batches of 4 stand for those of the recipe.
    found = estimate(recipe("train.epochs=5", "baselines.random=0", "train.batch_size=4", "search.batch_size=4"), data)
    rows = recipe().data
    context = Context(RunDirectory(Path(), "run", {}, None), dataclasses.replace(recipe(), data=rows), lambda p: None)
    split = context.split
    epoch = len(split.training) // 4 + len(split.validation) / 4
    networks, fine_tuning = 2, 1
    assert found.training == pytest.approx(epoch * (5 * networks + fine_tuning), rel=0.02)
    steps = min(len(split.weights), len(split.architecture)) // 4
    assert found.search == pytest.approx(recipe().search.settings.epochs * (steps + 32 / 4), rel=0.02)


def test_more_work_takes_longer(clock: None) -> None:
    data = Digits()()
    first = estimate(recipe(), data)
    longer = estimate(recipe("train.epochs=8", "evaluate.trials.0.restarts=20"), data)
    assert longer.training > first.training and longer.evaluation > first.evaluation
    assert longer.search == pytest.approx(first.search)
    shared = estimate(recipe("workers=2"), data)
    assert shared.seconds == pytest.approx(first.search + (first.training + first.evaluation) / 2)


def test_a_comparison_counts_all_contenders_and_seeds(clock: None) -> None:
    def of(*overrides: str) -> estimating.Estimate:
        return estimate(build(read_table("survey-grid", ["train.epochs=2", "threads=1", *overrides])), data)

    data = Digits()().limited(200, 40, 0)
    one, two = of("compare.seeds=[0]"), of("compare.seeds=[0, 1]")
    assert two.training == pytest.approx(2 * one.training) and two.evaluation == pytest.approx(2 * one.evaluation)
    assert one.search == 0


def test_a_recipe_without_its_data_is_timed_on_noise_of_their_size(
    clock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = """
    [data]
    name = "mnist"
    train_limit = 400
    test_limit = 40
    [train]
    channels = 2
    cells = 4
    epochs = 1
    [[evaluate.trials]]
    name = "fgsm"
    attack = { name = "fgsm" }
    """
    Path("small.toml").write_text(text)
    timing = time_recipe("small.toml")
    assert timing.estimate is not None and timing.estimate.seconds > 0 and "downloaded first" in timing.note
    assert timing.command == "nas train small.toml"
    assert not list(tmp_path.glob("data*"))


def test_files_that_are_not_there_are_named_instead_of_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    timing = time_recipe("mnist")
    assert timing.estimate is None and "data/mnist.npz" in timing.note


@pytest.mark.slow
def test_the_number_of_threads_is_as_it_was() -> None:
    before = torch.get_num_threads()
    estimate(recipe("threads=2"), Digits()().limited(100, 20, 0))
    assert torch.get_num_threads() == before
