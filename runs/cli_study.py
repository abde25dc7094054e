"""``nas study``: width/depth studies begun or helped with, told again, and asked for a recommendation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.errors import InputError
from runs.show import error_console, next_commands, out_console, study_table

COMMAND = "study width-depth"

study = typer.Typer(
    help="Studies of width and depth: which sizes of the stages make a network robust.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a study.")]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Where trials are kept: postgresql://USER@HOST/NAME or a file; by default in the folder."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@study.command(name="width-depth")
def width_depth(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe (nas list recipes) or a TOML file.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this study, or help those who work on it.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes to work with, instead of the recipe's.")] = None,
    storage: Storage = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the recipe: section.key=value.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default runs/<name>-<time>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the samplers, instead of the recipe's.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="On a GPU, only algorithms that give the same bits; slower.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train every configuration with every seed, attack each, and keep what was found.

    The same command with --resume (the folder on a file system that all see), or with the same --storage, started on
    other machines, helps.
    """
    from runs.context import device_of
    from runs.directory import RunDirectory, check_same_recipe, create, default_path
    from runs.progress import observer
    from runs.recipe import build, read_table
    from runs.study import carry_out, collect, ledger_of, plan, storage_of

    overrides = [*(set_ or []), *(["deterministic=true"] if deterministic else [])]
    table = read_table(recipe, overrides, seed) if recipe is not None else None
    if resume is not None:
        if out is not None:
            raise InputError("--out and --resume exclude each other: a resumed study stays where it is")
        run = open_study_run(resume)
        if table is None and (overrides or seed is not None):
            raise InputError("--set, --seed and --deterministic need the recipe's name when a study is resumed")
        if table is not None:
            check_same_recipe(run, table)
        plan(build(run.table))
    elif table is None:
        raise InputError("name a recipe (nas list recipes) or a study to continue: nas study width-depth study-digits")
    else:
        built = build(table)
        todo = plan(built)
        path = out or default_path(built.general.name)
        device_of(built.general.device)
        if storage is not None:
            # One that cannot be used is told before a folder is made.
            ledger_of(RunDirectory(path, COMMAND, table, None), built, storage).close()
        run = create(path, COMMAND, table)
        if not as_json:
            configurations = f"{len(todo.configurations)} configurations, " if todo.configurations else ""
            note = f"{run.path}: {configurations}{todo.size} trials"
            out_console.print(note, markup=False, highlight=False)
    where = storage_of(run, storage)
    count = workers or build(run.table).general.workers
    with observer(error_console if as_json else out_console) as watching:
        carry_out(run, count, where, watching)
    _told(run, collect(run, where), as_json)


@study.command()
def report(folder: Folder, storage: Storage = None, as_json: Json = False) -> None:
    """Write the page, pictures and tables of a study as far as it got, and print the gist."""
    from runs.study import collect, storage_of

    run = open_study_run(folder)
    _told(run, collect(run, storage_of(run, storage)), as_json)


@study.command()
def recommend(
    folder: Folder,
    max_params: Annotated[float | None, typer.Option(help="Parameters at most, for example 5e6.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Multiply-accumulates of one image at most.")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Seconds of one image at most, where measured.")] = None,
    storage: Storage = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default DIR/recommended.")] = None,
    as_json: Json = False,
) -> None:
    """The best configuration within a budget, its evidence, and a recipe that trains it."""
    from nas.tensor_file import write_text
    from runs.directory import make_folder, write_json
    from runs.study import collect, storage_of, table
    from runs.study_record import recommend as recommendation_of
    from runs.study_record import shape, toml
    from runs.study_space import Configuration

    run = open_study_run(folder)
    results = collect(run, storage_of(run, storage))
    found = recommendation_of(table(results), parameters=max_params, macs=max_macs, latency=max_latency)
    best = found.best
    entry = next(one for one in results["observations"] if one["observation"]["configuration"] == best.digest)
    configuration = Configuration.from_data(entry["built"])
    place = out or run.path / "recommended"
    make_folder(place)
    genotype, recipe = place / "genotype.json", place / "recipe.toml"
    write_json(configuration.genotype.to_data(), genotype)
    write_text(toml(training_recipe(run.table, configuration.channels)), recipe)
    if as_json:
        print(json.dumps({**found.to_data(), "genotype": str(genotype), "recipe": str(recipe)}))
        return
    one = best.first
    out_console.print(
        f"{shape(one)} ({best.digest}): {one.parameters:,} parameters, {one.macs / 1e6:,.2f} M MACs, natural "
        f"{best.natural:.1%}, worst case {best.robust:.1%}",
        markup=False, highlight=False,
    )  # fmt: skip
    for line in found.lines():
        out_console.print(line, markup=False, highlight=False)
    next_commands(["nas", "train", recipe, "--genotype", genotype])


def training_recipe(table: Any, channels: int) -> dict[str, Any]:
    """The recipe of a study as one that trains a single configuration of it the same way."""
    recipe: dict[str, Any] = copy.deepcopy({key: value for key, value in table.items() if key != "study"})
    recipe["name"] = f"{recipe['name']}-recommended"
    recipe["seed"] = table["study"].get("seeds", [0])[0]
    train = {key: value for key, value in recipe["train"].items() if key not in ("parameters", "channels")}
    recipe["train"] = {"cells": 1, **train, "channels": channels or 1}
    return recipe


def open_study_run(folder: Path) -> Any:
    """The folder of a study. Raises ``InputError`` if it is another run's."""
    from runs.directory import open_run

    run = open_run(folder)
    if run.command != COMMAND:
        raise InputError(f"{folder} was begun by 'nas {run.command}', it is not a study")
    return run


def _told(run: Any, collected: dict[str, Any], as_json: bool) -> None:
    """Write all that a study found, and say the gist of it."""
    from runs.study import table
    from runs.study_record import candidates
    from runs.study_report import findings, write_page, write_results

    observations = table(collected)
    results = {**collected, **findings(observations)}
    write_results(run, results)
    page = write_page(run, results, observations)
    if as_json:
        print(json.dumps(results))
        return
    trials = results["trials"]
    counts = [f"{count} {state}" for state, count in trials.items() if count]
    out_console.print(f"trials: {', '.join(counts) or 'none yet'}", markup=False, highlight=False)
    if not observations:
        return
    ranked = candidates(observations)
    study_table(ranked[:10], len(ranked))
    for line in results["verdict"]:
        out_console.print(line, markup=False, highlight=False)
    largest = max(one.first.parameters for one in ranked)
    next_commands(
        ["open", page],
        ["nas", "study", "recommend", run.path, "--max-params", largest],
    )
