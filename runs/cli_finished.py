"""The commands of ``nas`` that work on a finished run: compress, attack, export, report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.errors import InputError, check_schema
from runs.show import error_console, models_table, next_commands, out_console, throughput_table

if TYPE_CHECKING:
    from nas.export.package import ExportedFile

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write, instead of one inside the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def compress(
    path: RunArgument,
    method: Annotated[
        str, typer.Option(help="Compression method (nas list compressors), or several in order: a,b.")
    ] = "magnitude",
    model: Annotated[str, typer.Option(help="Network of the run.")] = "searched",
    keep: Annotated[
        float | None, typer.Option(help="Share that stays, of the one method that takes it; else method.keep by --set.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of the method: keep=0.25; of one of several: gdws.keep=0.25."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of fine-tuning after each method that is fine-tuned after; 0 = none.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compress a trained network of a run, fine-tune it with the run's training method, and attack it."""
    from nas.model_file import load_model
    from runs.context import model_folder
    from runs.directory import write_json
    from runs.finished import label_of, network_folder, opened
    from runs.networks import compress_into, evaluate_into

    table_settings = compression_settings(method, keep, set_, epochs)
    with opened(path, table_settings) as context:
        assert context.recipe.compress is not None
        source = network_folder(model_folder(context.run, model), path, model)
        shown = [*(set_ or []), *([] if keep is None else [f"keep={keep}"])]
        folder = out or context.run.path / f"compress-{label_of(method, shown, epochs, model)}"
        _begin(folder, {"model": model, "settings": table_settings})
        try:
            result = compress_into(context, context.recipe.compress, source, folder)
        except InputError:
            # A plan that was refused leaves nothing; what an earlier step took long for stays.
            if {path.name for path in folder.rglob("*") if path.is_file()} == {"compression.json"}:
                shutil.rmtree(folder)
            raise
        _, compressed = load_model(folder, context.device)
        _, dense = load_model(source, context.device)
        trials = context.recipe.evaluate.trials
        evaluation = evaluate_into(context, compressed, trials, folder, surrogates={"the network before": dense})
        result = {"name": folder.name, "role": "compressed", **result, **evaluation}
        speed = context.throughput({"before": dense, "compressed": compressed})
        write_json(speed, folder / "throughput.json")
        write_json(result, folder / "result.json")  # last: with it, all is done
    if as_json:
        print(json.dumps({**result, "throughput": speed}))
        return
    models_table([result])
    throughput_table(speed)
    # A folder outside the run is found by its whole path.
    name = folder.name if out is None else folder.resolve()
    next_commands(
        ["nas", "attack", path, "--model", name],
        ["nas", "export", path, "--model", name, "--to", "safetensors", *([] if out is None else ["--out", folder])],
    )


def compression_settings(method: str, keep: float | None, settings: list[str] | None, epochs: int | None) -> list[str]:
    """The lines of a recipe that say what the command line says."""
    from nas import plugins

    names = [name.strip() for name in method.split(",")]
    if len(names) == 1:
        lines = [f"compress={{name={json.dumps(method)}}}", *(f"compress.{item}" for item in settings or [])]
        lines += [] if keep is None else [f"compress.keep={keep}"]
        return [*lines, *([] if epochs is None else [f"compress.fine_tune.epochs={epochs}"])]
    if len(set(names)) < len(names):
        raise InputError(f"--method {method}: each method once; a recipe's compress.steps may repeat them")
    lines = [f"compress={{steps=[{', '.join(f'{{name={json.dumps(name)}}}' for name in names)}]}}"]
    for item in settings or []:
        name, dot, rest = item.partition(".")
        if not dot or name not in names:
            raise InputError(f"--set {item}: of several methods, say whose setting it is: {names[0]}.{item}")
        lines.append(f"compress.steps.{names.index(name)}.{rest}")
    if keep is not None:
        fields = [{f.name for f in dataclasses.fields(plugins.load("compression", name))} for name in names]
        takers = [i for i, known in enumerate(fields) if "keep" in known]
        if len(takers) != 1:
            taking = " and ".join(names[i] for i in takers) or "none"
            raise InputError(f"--keep {keep}: of {method}, {taking} takes it; say it by --set METHOD.keep={keep}")
        lines.append(f"compress.steps.{takers[0]}.keep={keep}")
    return [*lines, *([] if epochs is None else [f"compress.fine_tune.epochs={epochs}"])]


def _begin(folder: Path, asked: dict[str, Any]) -> None:
    """Make the folder of a compression, or go on in one that the same command began."""
    from runs.directory import holds_work, make_folder, read_json, write_json

    make_folder(folder)
    note = folder / "compression.json"
    if not holds_work(folder, "compression.json.part"):
        write_json(asked, note)
    elif not note.is_file() or read_json(note) != asked:
        raise InputError(f"{folder} holds other work already: choose another --out")
    elif (folder / "result.json").exists():
        raise InputError(f"{folder} holds this compression, finished: choose another --out to make it again")


def attack(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run directory; or a network from outside: module:function, or a .pt2 file."
        ),
    ],
    name: Annotated[
        str, typer.Option("--attack", help="Attack (nas list attacks), or 'recipe' for the recipe's trials.")
    ] = "recipe",
    suite: Annotated[str | None, typer.Option(help="quick, standard or full, instead of an attack.")] = None,
    model: Annotated[
        str, typer.Option(help="Network of the run: searched, compressed, plain, random-1, ...")
    ] = "searched",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the attack: key=value, e.g. steps=100.")
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(help="Starts, 1 unless stated; a sample is robust only if it survives all.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Radius, instead of the recipe's.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1, instead of the recipe's.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Test images, drawn by the seed; all unless given.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Of a network from outside: a data set's name, file or name:path.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Of a network from outside: its state dict.")] = None,
    draws: Annotated[
        int, typer.Option(min=1, help="Of a network that answers at random: passes whose mean is attacked and judged.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the attacks; that of the run, or 0, unless given.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Attack a network of a run, or any other, on test images, and suspect the result."""
    from runs.attacking import Request, carry_out_attack
    from runs.progress import observer

    request = Request(
        target, name, suite, model, tuple(set_ or ()), restarts, epsilon, norm, samples, data, weights, draws, seed, out
    )
    with observer(error_console if as_json else out_console) as watching:
        result, folder = carry_out_attack(request, watching)
    if as_json:
        print(json.dumps(result))
        return
    low, high = result["interval"]
    out_console.print(
        f"{result['name']}: natural {result['natural']:.1%} on {result['n']} test images", markup=False, highlight=False
    )
    for trial, accuracy in result["attacks"].items():
        out_console.print(
            f"  {trial}: {accuracy:.1%}  ({result['attack_settings'][trial]})", highlight=False, markup=False
        )
    for trial, reason in result.get("left_out", {}).items():
        out_console.print(f"  {trial}: not run: {reason}", highlight=False, markup=False)
    out_console.print(
        f"  worst case {result['worst_case']:.1%}, 95 % interval {low:.1%} to {high:.1%}", highlight=False
    )
    for check in result["checks"]:
        out_console.print(f"  {check['verdict']}: {check['name']}: {check['detail']}", markup=False, highlight=False)
    out_console.print(f"written to {folder / 'result.json'}", markup=False, highlight=False)
    next_commands(["open", folder / "report.html"])


def export(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="A run directory; or an architecture: a genotype file, a published name."),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="Formats, separated by commas: json, safetensors, py, onnx, pt2, robustbench, timm, graphml, dot, "
            "svg, card."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Network of the run.")] = "searched",
    out: Out = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Of an architecture: base channels.")] = None,
    cells: Annotated[int | None, typer.Option(min=1, help="Of an architecture: number of cells.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Of an architecture: height and width of the image.")] = None,
    image_channels: Annotated[int | None, typer.Option(min=1, help="Of an architecture: image channels.")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Of an architecture: number of classes.")] = None,
    as_json: Json = False,
) -> None:
    """Export a trained network of a run, or an architecture; every file is reloaded in a fresh process and compared."""
    from nas.analysis.complexity import parameters_of
    from nas.export.package import check_formats
    from nas.export.parity import export_architecture
    from nas.model_file import ModelSpec
    from nas.threat_model import ThreatModel
    from runs.directory import make_folder
    from runs.exporting import attack_by, export_network
    from runs.finished import opened
    from search_spaces.catalogue import load_genotype

    trained, path = Path(what).is_dir(), Path(what)
    given = to if to is not None else "json,safetensors,py" if trained else "json,py,svg"
    formats = tuple(part.strip() for part in given.split(",") if part.strip())
    check_formats(formats, trained=trained)
    measures = {
        "channels": channels,
        "cells": cells,
        "size": size,
        "image-channels": image_channels,
        "classes": classes,
    }
    if trained:
        stated = [f"--{name}" for name, value in measures.items() if value is not None]
        if stated:
            raise InputError(
                f"{stated[0]} is for an architecture without weights: the networks of a run have their size"
            )
        with opened(path) as context:
            folder = out or context.run.path / f"export-{model}"
            files, beside = export_network(context, model, folder, formats)
    else:
        mean = (0.5,) * (image_channels or 3)
        labels = tuple(str(i) for i in range(classes or 10))
        genotype = load_genotype(what)
        spec = ModelSpec(
            genotype, channels or 64, cells or 20, (image_channels or 3, size or 32, size or 32), labels, mean, mean
        )
        folder = out or Path(f"export-{path.stem}")
        try:
            parameters_of(spec)
        except ValueError as error:
            raise InputError(f"{what}: {error}") from None
        make_folder(folder)
        files = export_architecture(spec, folder, formats, attack_by(ThreatModel()))
    if as_json:
        print(json.dumps([{**dataclasses.asdict(f), "bytes": (folder / f.file).stat().st_size} for f in files]))
        return
    for file in files:
        out_console.print(f"{folder / file.file}{_compared(file)}", highlight=False, markup=False)
    if not trained:
        next_commands(["nas", "train", "cifar10", "--genotype", what])
        return
    for path in beside:
        out_console.print(f"{path}  (what is known of it)", highlight=False, markup=False)
    if (folder / "network.py").exists():
        next_commands(["python", folder / "network.py", folder / "network.safetensors"])
    else:
        next_commands(["ls", folder])


def _compared(file: ExportedFile) -> str:
    if file.difference is None:
        return ""
    gradient = "" if file.gradient is None else f", of gradients {file.gradient:.0e}"
    if file.moved is not None:
        gradient += f"; attacked again by its own: {file.moved:.1%} of pixels differ"
    return (
        f"  (reloaded; largest difference of logits {file.difference:.0e}, on adversarial images {file.adversarial:.0e}"
        f"{gradient})"
    )


def report(path: RunArgument) -> None:
    """Write the HTML page of a finished run again."""
    from runs.comparison import write_comparison_page
    from runs.directory import RESULTS_SCHEMA, open_run, read_json
    from runs.reporting import write_page

    run_directory = open_run(path)
    if run_directory.command.startswith("study"):
        raise InputError(f"{path} is a study: nas study report {path} writes its page again")
    if run_directory.command == "search":
        raise InputError(f"{path} is a search, which has no report: nas analyse {path} shows what it found")
    if not (path / "results.json").exists():
        raise InputError(f"{path} is not finished: nas {run_directory.command} --resume {path} finishes it")
    write = write_comparison_page if run_directory.command == "compare" else write_page
    results = read_json(path / "results.json")
    check_schema(results.get("schema") if isinstance(results, dict) else None, RESULTS_SCHEMA, path / "results.json")
    page = write(run_directory, results)
    out_console.print(str(page), markup=False, highlight=False)
    next_commands(["open", page])
