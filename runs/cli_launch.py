"""``nas launch``: many recipes, with many seeds, on this machine or a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.errors import Failure, InputError, nearest
from runs.show import next_commands, out_console


def launch(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Shipped recipes (nas list recipes) or TOML files.")
    ],
    out: Annotated[Path, typer.Option(help="Folder that holds the runs, one folder each.")],
    launcher: Annotated[str, typer.Option(help="local, slurm or ray.")] = "local",
    seeds: Annotated[str | None, typer.Option(help="Seeds, for example 0,1,2: a run for each.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of every recipe: section.key=value.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Jobs at once.")] = 1,
    helpers: Annotated[int, typer.Option(min=1, help="Jobs that work on each study together.")] = 1,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the launcher, KEY=VALUE: slurm_partition=gpu, gpus_per_node=1, num_gpus=1, ..."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Carry out recipes as jobs; the same command again goes on with those that are not finished.

    Every job is a `nas ... --resume` of its own folder, so what comes out is what it would be on this machine.
    """
    from runs.directory import open_run
    from runs.launch import STUDY
    from runs.launchers import LAUNCHERS, Job, last_line

    if launcher not in LAUNCHERS:
        raise InputError(f"unknown launcher '{launcher}': {nearest(launcher, LAUNCHERS)}")
    carry_out = LAUNCHERS[launcher](out.resolve(), at_once, dict(_option(text) for text in option or []))
    runs = _runs(recipes, _seeds(seeds), set_ or [], out)
    jobs = []
    for run in runs:
        alone = run.command != STUDY
        if alone and run.finished:  # what is left of a study, its workers see
            out_console.print(f"{run.path}: finished before", markup=False, highlight=False)
            continue
        for number in range(1 if alone else helpers):
            arguments = [*run.command.split(), "--resume", str(run.path.resolve())]
            arguments += [] if alone else ["--workers", "1"]
            log = run.path.resolve() / f"job-{number + 1}.log"
            jobs.append(Job(run.path.name + ("" if alone else f" {number + 1}"), tuple(arguments), log))
    failed = []
    for job, status in carry_out(jobs):
        said = "done" if status == 0 else f"failed (exit status {status}): {last_line(job.log)}"
        out_console.print(f"{job.name}: {said}", markup=False, highlight=False)
        if status:
            failed.append(job)
    runs = [open_run(run.path) for run in runs]
    if as_json:
        print(json.dumps({str(run.path): "finished" if run.finished else "unfinished" for run in runs}))
    if failed:
        logs = ", ".join(str(job.log) for job in failed)
        raise Failure(f"{len(failed)} of {len(jobs)} jobs failed (see {logs}); the same command goes on with them")
    if not as_json:
        next_commands(*(["open", run.path / "report.html"] for run in runs[:3]))


def _runs(recipes: list[str], seeds: list[int | None], overrides: list[str], out: Path) -> list[Any]:
    """The run directories, made where they are not there; all recipes are looked at before the first is made."""
    from runs.directory import check_same_recipe, open_run
    from runs.launch import begin, command_for
    from runs.recipe import build, read_table

    planned = []
    for recipe in recipes:
        for seed in seeds:
            table = read_table(recipe, overrides, seed)
            build(table)
            name = table["name"] + ("" if seed is None else f"-{seed}")
            planned.append((out / name, table))
    places = [path for path, _ in planned]
    if len(set(places)) < len(places):
        raise InputError(
            "two of the recipes have the same name, and their runs the same folder: give them names of their own"
        )
    for path, table in planned:
        if (path / "run.json").is_file():
            check_same_recipe(open_run(path), table)
    found = []
    for path, table in planned:
        known = (path / "run.json").is_file()
        found.append(open_run(path) if known else begin(command_for(table), table, out=path))
    return found


def _seeds(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--seeds takes whole numbers with commas between, for example 0,1,2, not '{text}'") from None


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"--option takes KEY=VALUE, not '{text}'")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
