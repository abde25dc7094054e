"""Stopped anywhere and resumed, a run ends with the same files, byte for byte, as one that was never stopped."""

from __future__ import annotations

import json
import os
import pkgutil
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import differences, nas, record, settings, small_recipe

from nas.evaluation.suspicion import Check
from nas.export.package import FORMATS, ExportedFile

STOP = "stopped by the test"
SEARCH, TRAIN, COMPRESS = "search", "train/searched", "compress"
OPTIONS = settings("train.ema=0.5", "train.auxiliary_weight=0.4", "train.validate_every=2")


class Stopped(Exception):
    """What happens to the process."""


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long and has no state: the reloading of exports, checks of an evaluation, pictures."""

    def check(*arguments: Any) -> list[ExportedFile]:
        return [ExportedFile(file, name, 0.0) for name in FORMATS for file in FORMATS[name].files]

    patch.setattr("runs.exporting.check_exports", check)
    patch.setattr("runs.judging.suspicions", lambda *arguments, **options: [Check("none", "pass", "")])
    patch.setattr("nas.report.page.write_report", lambda results, path: path.write_text("report"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        outcome = nas("run", recipe, "--out", path, *OPTIONS)
    assert outcome.status == 0, outcome.err
    return path


def attempt(run: Path, recipe: Path) -> bool:
    """Begin or go on with the run; whether it was finished rather than stopped."""
    arguments = ["--resume", run] if run.exists() else [recipe, "--out", run, *OPTIONS]
    outcome = nas("run", *arguments)
    assert outcome.status == 0 or STOP in outcome.err, outcome.err
    return outcome.status == 0


def stopping(function: Callable[..., Any], calls: int, before: bool) -> Callable[..., Any]:
    """``function``, whose call of this number stops the process, before or after its work."""
    count = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if before and count == calls:
            raise Stopped(STOP)
        result = function(*arguments, **options)
        if count == calls:
            raise Stopped(STOP)
        return result

    return wrapped


LOG = "runs.metrics.MetricsLog.log"
SEARCH_CHECKPOINT = "nas.search.bilevel.write_tree"
TRAIN_CHECKPOINT = "nas.training.loop.write_tree"
MASKS = "nas.evaluation.robustness.write_tree"
DESCRIPTION = "nas.model_file.write_text"
FINISH = "runs.directory.RunDirectory.finish"
PAGE = "runs.reporting.write_page"

STOPS = [
    # Where, at which call since the process began, before or after it, and the task that is then under way.
    (SEARCH_CHECKPOINT, 1, True, SEARCH),
    (LOG, 2, False, SEARCH),
    (SEARCH_CHECKPOINT, 1, False, SEARCH),
    (LOG, 1, True, SEARCH),
    (FINISH, 1, True, SEARCH),
    (TRAIN_CHECKPOINT, 1, False, TRAIN),
    (LOG, 1, False, TRAIN),
    (TRAIN_CHECKPOINT, 2, False, TRAIN),
    (DESCRIPTION, 1, True, TRAIN),
    (LOG, 1, False, COMPRESS),
    (TRAIN_CHECKPOINT, 1, False, COMPRESS),
    (FINISH, 1, True, COMPRESS),
    (MASKS, 2, False, "evaluate/compressed"),
    (MASKS, 1, True, "evaluate/compressed"),
    (FINISH, 1, True, "evaluate/compressed"),
    (MASKS, 3, False, "evaluate/searched"),
    (FINISH, 2, True, "export"),
    (PAGE, 1, True, "report"),
    (FINISH, 1, True, "report"),
]


def test_stopped_everywhere_and_resumed(
    recipe: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for target, calls, before, task in STOPS:
        with monkeypatch.context() as patch:
            patch.setattr(target, stopping(pkgutil.resolve_name(target), calls, before))
            assert not attempt(run, recipe), f"nothing stopped at {target}"
        assert not (run / task / "result.json").exists()
        begun = {str(path.parent.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        assert task in begun or task == "report", f"{target} stopped before {task}"
    assert attempt(run, recipe)
    assert differences(run, uninterrupted) == []


class FailingDisk:
    """``os`` for nas.tensor_file; one of the next replacements stops the process before or after it."""

    def __init__(self, number: int, before: bool) -> None:
        self.left, self.before = number, before

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def replace(self, source: Path, target: Path) -> None:
        self.left -= 1
        if self.left == 0 and self.before:
            # The new content never reached the disk as a whole.
            with open(source, "r+b") as file:
                file.truncate(os.path.getsize(source) // 2)
            raise Stopped(STOP)
        os.replace(source, target)
        if self.left == 0:
            raise Stopped(STOP)


def test_stopped_in_the_middle_of_writing(
    recipe: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-written files never count: at any replacement of a file by its new content the process may end."""
    draw = random.Random(1)
    run = tmp_path / "run"
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr("nas.tensor_file.os", FailingDisk(draw.randint(2, 16), draw.random() < 0.5))
            if run.exists() and not (run / "run.json").exists():
                # Stopped before there was a run: begin anew.
                shutil.rmtree(run)
            done = attempt(run, recipe)
        if done:
            break
        stops += 1
        assert stops < 60
    assert stops >= 4
    assert differences(run, uninterrupted) == []


def test_the_same_seed_gives_the_same_search(recipe: Path, uninterrupted: Path, tmp_path: Path) -> None:
    found = nas("search", recipe, "--out", tmp_path / "run", "--json", *OPTIONS).json()
    assert found == json.loads((uninterrupted / "search" / "genotype.json").read_text())
    ours, theirs = record(tmp_path / "run"), record(uninterrupted)
    assert "search/metrics.jsonl" in ours and "search/checkpoint.safetensors" in ours
    for name in ours:
        # The run's record says which command began it; only a whole run draws random cells.
        if name not in ("run.json", "analyse/result.json"):
            assert ours[name] == theirs[name], name
