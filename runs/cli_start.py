"""The commands of ``nas`` to begin with: what to do first, ``doctor``, ``new``."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.errors import InputError
from runs.directory import program_version
from runs.show import error_console, next_commands, out_console

if TYPE_CHECKING:
    from runs.doctor import Timing

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

START = """\
dsara-nas {version}: finds network architectures that stay accurate under attack

begin with
  nas run digits                         search, train, prune, attack, export: 3 minutes on two CPU cores, offline
  nas doctor                             what this machine can do, and how long each recipe takes on it
  nas new mine --data folder:./images    a recipe for images of your own (or --data mine.npz, --data cifar10)
  nas analyse arnas                      width, depth, parameters of a published architecture

what there is
  nas list recipes                       also: spaces methods attacks compressors activations data genotypes runs
  nas --help                             all commands; nas COMMAND --help: all options of one
  nas --install-completion               completion by the tab key in your shell"""


def welcome() -> None:
    """What ``nas`` says by itself: what to do first, and which runs here are not finished."""
    from runs.directory import open_run

    out_console.print(START.format(version=program_version()), markup=False, highlight=False)
    unfinished = []
    for path in sorted(Path("runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime):
        try:
            run = open_run(path.parent)
        except InputError:
            continue
        if not run.finished:
            unfinished.append(run.continuing)
    if unfinished:
        out_console.print("\nunfinished here, the latest last", highlight=False)
        for command in unfinished[-3:]:
            out_console.print(f"  {shlex.join(command)}", markup=False, highlight=False)


def doctor(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]...", help="Recipes to time; all shipped ones unless given.")
    ] = None,
    machine_only: Annotated[bool, typer.Option("--machine-only", help="Time nothing.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine can do, and how long each recipe takes on it, from a few steps of each."""
    from nas.report.page import duration
    from runs.doctor import examine, time_recipe
    from runs.recipe import build, read_table, shipped

    if recipes and machine_only:
        raise InputError("--machine-only times nothing: leave the recipes out, or the option")
    for name in recipes or ():
        build(read_table(name))  # what is wrong with one is told before the first is timed
    findings = list(examine(Path("runs")))
    if not as_json:
        for finding in findings:
            remedy = f": {finding.remedy}" if finding.remedy else ""
            out_console.print(f"{finding.name:<18} {finding.found}{remedy}", markup=False, highlight=False)
    times: list[Timing] = []
    for name in () if machine_only else recipes or shipped():
        if not as_json and not times:
            out_console.print(
                "\nhow long recipes take here: from a few steps of each; the evaluation as if no attack broke anything",
                highlight=False,
            )
        with error_console.status(f"timing {name}"):
            timing = time_recipe(name)
        times.append(timing)
        if as_json:
            continue
        takes = "not known" if timing.estimate is None else f"about {duration(timing.estimate.seconds)}"
        note = f"  ({timing.note})" if timing.note else ""
        out_console.print(f"{name:<18} {takes:<22} {timing.command}{note}", markup=False, highlight=False)
    if as_json:
        print(json.dumps({"machine": [dataclasses.asdict(f) for f in findings], "times": [_times(t) for t in times]}))
        return
    whole = [timing for timing in times if timing.estimate is not None and timing.command.startswith("nas run")]
    shortest = min(whole, key=lambda timing: timing.estimate.seconds if timing.estimate else 0.0, default=None)
    next_commands((shortest.command if shortest else "nas run digits").split(), ["nas", "list", "recipes"])


def _times(timing: Timing) -> dict[str, Any]:
    seconds = None if timing.estimate is None else timing.estimate.seconds
    return {**dataclasses.asdict(timing), "seconds": seconds}


def new(
    name: Annotated[str, typer.Argument(help="What the recipe is called; NAME.toml is written.")],
    data: Annotated[
        str, typer.Option(help="The images: folder:./images, a file mine.npz, or a data set (nas list data).")
    ],
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels to which images of a folder are scaled and cropped.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=1, help="How long it may take on this machine, about.")] = 15.0,
) -> None:
    """Write a commented recipe for your own images, sized for this machine."""
    from nas.report.page import duration
    from nas.tensor_file import write_text
    from runs.new_recipe import new_recipe
    from runs.outside import data_from, source_from
    from runs.recipe import General

    General(name)  # what cannot be a name is told first
    path = Path(f"{name}.toml")
    if path.exists():
        raise InputError(f"{path} is there already: choose another name, or remove it")
    source = source_from(data, **({} if size is None else {"size": size}))
    with error_console.status("reading the images"):
        images = data_from(source)
    with error_console.status("trying how large a search fits the time"):
        made = new_recipe(name, source, images, minutes)
    write_text(made.text, path)
    classes, shape = len(images.classes), "x".join(map(str, images.input_shape[1:]))
    out_console.print(
        f"{path}: {len(images.y_train):,} training and {len(images.y_test):,} test images of {shape} pixels, "
        f"{classes} classes; takes about {duration(made.time.seconds)} here", markup=False, highlight=False,
    )  # fmt: skip
    if made.time.seconds > 60 * minutes:
        error_console.print(
            f"note: that is more than {minutes:g} minutes, though it is as small as this command makes it; lower "
            "epochs, or make the images smaller (--size)", markup=False, highlight=False,
        )  # fmt: skip
    next_commands(["nas", "run", path], ["nas", "search", path])
