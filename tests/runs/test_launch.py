"""Many recipes as jobs: the same results whoever carries them out, and none done twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import nas, settings

from runs.launchers import LAUNCHERS, Job

QUICK = settings(
    "compare.seeds=[0]",
    "compare.contenders=[{name='pgd_at', method={name='pgd_at'}}]",
    "train.epochs=1",
    "evaluate.trials=[{name='pgd', attack={name='pgd', steps=2}}]",
    "workers=1",
    "threads=1",
)
OPTIONS: dict[str, dict[str, Any]] = {"local": {}, "slurm": {"cluster": "local"}, "ray": {}}


def job(folder: Path, name: str, *arguments: str) -> Job:
    return Job(name, arguments, folder / f"{name}.log")


@pytest.mark.parametrize("launcher", ["local", "slurm", pytest.param("ray", marks=pytest.mark.slow)])
def test_each_job_is_carried_out_once_and_its_end_told(launcher: str, tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "good", "list", "recipes"),
        job(tmp_path, "bad", "list", "nothing"),
        job(tmp_path, "late", "--version"),
    ]
    carry_out = LAUNCHERS[launcher](tmp_path, 2, OPTIONS[launcher])
    assert {one.name: status for one, status in carry_out(jobs)} == {"good": 0, "bad": 2, "late": 0}
    assert (tmp_path / "good.log").read_text().count("The released ARNAS variant") == 1
    assert (tmp_path / "bad.log").read_text().startswith("nas: nothing is listed under 'nothing'")


def test_jobs_on_this_machine_end_with_this_process(tmp_path: Path) -> None:
    class Sleeping(Job):
        @property
        def command(self) -> list[str]:
            return [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]

    carry_out = LAUNCHERS["local"](tmp_path, 2, {})
    jobs = [job(tmp_path, "quick", "--version"), Sleeping("slow", (), tmp_path / "slow.log")]
    ends = carry_out(jobs)
    assert next(ends)[0].name == "quick"
    ends.close()  # as an exception in the one who waits would
    assert (tmp_path / "slow.log").read_text() == "up\n"


def test_recipes_with_seeds_and_again(tmp_path: Path) -> None:
    command = ("launch", "compare-training", "--seeds", "1", "--out", tmp_path, *QUICK)
    outcome = nas(*command)
    assert outcome.status == 0, outcome.err
    alone = tmp_path / "alone"
    assert nas("compare", "compare-training", "--seed", "1", "--out", alone, *QUICK).status == 0
    model = "train/pgd_at-0/model.safetensors"
    assert (tmp_path / "compare-training-1" / model).read_bytes() == (alone / model).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = nas(*command, "--json")
    assert again.status == 0, again.err
    assert again.out.count("finished before") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_job_that_fails_is_named_and_its_run_goes_on(tmp_path: Path) -> None:
    command = ("launch", "compare-training", "--out", tmp_path, *QUICK)
    run = tmp_path / "compare-training"
    assert nas(*command).status == 0
    (run / "results.json").unlink()
    (run / "report/result.json").unlink()
    whole = (run / "train/pgd_at-0/result.json").read_text()
    (run / "train/pgd_at-0/result.json").write_text("{")
    outcome = nas(*command)
    assert outcome.status == 1
    assert "compare-training: failed (exit status 2): nas: " in outcome.out and "is not JSON" in outcome.out
    assert "1 of 1 jobs failed" in outcome.err and "job-1.log" in outcome.err
    (run / "train/pgd_at-0/result.json").write_text(whole)
    assert nas(*command).status == 0
    assert json.loads((run / "results.json").read_text())["kind"] == "comparison"


@pytest.mark.slow
def test_a_study_with_two_helpers(tmp_path: Path) -> None:
    quick = settings(
        "study.seeds=[0]", "train.epochs=1", "workers=1", "threads=1",
        "study.depths=[[1], [1], [1]]", "study.widths=[[4, 8], [4, 8], [8]]", "study.draw=4",
    )  # fmt: skip
    outcome = nas("launch", "study-digits", "--out", tmp_path, "--helpers", "2", "--at-once", "2", *quick)
    assert outcome.status == 0, outcome.err + outcome.out
    results = json.loads((tmp_path / "study-digits/results.json").read_text())
    assert results["trials"]["complete"] == len(results["observations"]) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare-training", "--launcher", "pbs"], "unknown launcher 'pbs'"),
        (["compare-training", "--option", "a=1"], "the local launcher has no options"),
        (["compare-training", "--option", "a"], "KEY=VALUE"),
        (["compare-training", "--seeds", "0,x"], "--seeds takes whole numbers"),
        (["compare-training", "compare-training"], "the same name"),
        (["compare-training", "digitz"], "no recipe 'digitz'"),
        (["compare-training", "--launcher", "ray", "--option", "num_gps=1"], "did you mean 'num_gpus'?"),
        (["compare-training", "--launcher", "slurm", "--option", "cluster=local", "--option", "nodez=1"], "nodez"),
    ],
)
def test_refusals(arguments: list[str], says: str, tmp_path: Path) -> None:
    outcome = nas("launch", *arguments, "--out", tmp_path / "runs")
    assert says in outcome.refusal
    assert not list(tmp_path.rglob("run.json"))
