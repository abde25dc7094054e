"""The commands of ``nas`` that work on a finished run: compress, attack, export, report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.errors import InputError, nearest
from runs.show import models_table, next_commands, out_console

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write, instead of one inside the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@contextmanager
def _context(path: Path, set_: list[str] | None = None) -> Iterator[Any]:
    """A run to work on beside its own tasks, locked, with its progress shown."""
    import torch

    from runs.directory import open_run
    from runs.recipe import build, override_key
    from runs.tasks import Context

    run = open_run(path)
    table = json.loads(json.dumps(run.table))
    for override in set_ or []:
        override_key(table, override)
    recipe = build(table)
    torch.set_num_threads(recipe.general.threads)
    with run.locked():
        yield Context(run, recipe, lambda progress: None)


def compress(
    path: RunArgument,
    method: Annotated[str, typer.Option(help="Compression method (nas list compressors).")] = "magnitude",
    model: Annotated[str, typer.Option(help="Network of the run.")] = "searched",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the method: key=value, e.g. keep=0.25.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of fine-tuning.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compress a trained network of a run, fine-tune it with the run's training method, and attack it."""
    from nas.model_file import load_model
    from runs.directory import write_json
    from runs.tasks import compress_into, evaluate_into, model_folder

    table_settings = [f"compress.name={json.dumps(method)}", *(f"compress.{item}" for item in set_ or [])]
    if epochs is not None:
        table_settings.append(f"compress.fine_tune.epochs={epochs}")
    with _context(path, table_settings) as context:
        source = _model_folder(model_folder(context.run, model), path, model)
        folder = out or context.run.path / f"compress-{_label(method, set_, epochs, model)}"
        _begin(folder, {"model": model, "settings": table_settings})
        result = compress_into(context, context.recipe.compress, source, folder)
        _, compressed = load_model(folder, context.device)
        evaluation = evaluate_into(context, compressed, context.recipe.evaluate.trials, folder)
        result = {"name": folder.name, "role": "compressed", **result, **evaluation}
        write_json(result, folder / "result.json")
    if as_json:
        print(json.dumps(result))
        return
    models_table([result])
    # A folder outside the run is found by its whole path.
    name = folder.name if out is None else folder.resolve()
    next_commands(
        ["nas", "attack", path, "--model", name],
        ["nas", "export", path, "--model", name, "--to", "py", *([] if out is None else ["--out", folder])],
    )


def _begin(folder: Path, asked: dict[str, Any]) -> None:
    """Make the folder of a compression, or go on in one that the same command began."""
    from runs.directory import read_json, write_json

    make_folder(folder)
    note = folder / "compression.json"
    if not any(folder.iterdir()):
        write_json(asked, note)
    elif not note.is_file() or read_json(note) != asked or (folder / "result.json").exists():
        raise InputError(f"{folder} holds other work already: choose another --out")


def attack(
    path: RunArgument,
    name: Annotated[
        str, typer.Option("--attack", help="Attack (nas list attacks), or 'recipe' for the recipe's trials.")
    ] = "recipe",
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
    as_json: Json = False,
) -> None:
    """Attack a trained network of a run on the whole test set and suspect the result."""
    from nas.evaluation.robustness import Trial
    from nas.model_file import load_model
    from runs.directory import write_json
    from runs.recipe import attack_from, override_key
    from runs.tasks import evaluate_into, model_folder

    overrides = [f"threat_model.epsilon={epsilon!r}"] if epsilon is not None else []
    with _context(path, overrides) as context:
        if name == "recipe":
            if set_ or restarts is not None:
                raise InputError("--set and --restarts need --attack: the recipe's trials are as the recipe says")
            trials = dict(context.recipe.evaluate.trials)
        else:
            table: dict[str, Any] = {"name": name}
            for item in set_ or []:
                override_key(table, item)
            starts = 1 if restarts is None else restarts
            trials = {name: Trial(attack_from(table, "attack", context.recipe.threat_model), starts)}
        folder = _model_folder(model_folder(context.run, model), path, model)
        _, network = load_model(folder, context.device)
        label = _label(name, [*(set_ or []), *overrides], starts if name != "recipe" else None, model)
        target = context.run.folder(f"attack-{label}")
        result = {"name": model, "role": model, **evaluate_into(context, network, trials, target)}
        write_json(result, target / "result.json")
    if as_json:
        print(json.dumps(result))
        return
    low, high = result["interval"]
    out_console.print(
        f"{model}: natural {result['natural']:.1%} on {result['n']} test images", markup=False, highlight=False
    )
    for trial, accuracy in result["attacks"].items():
        out_console.print(
            f"  {trial}: {accuracy:.1%}  ({result['attack_settings'][trial]})", highlight=False, markup=False
        )
    out_console.print(
        f"  worst case {result['worst_case']:.1%}, 95 % interval {low:.1%} to {high:.1%}", highlight=False
    )
    for check in result["checks"]:
        out_console.print(f"  {check['verdict']}: {check['name']}: {check['detail']}", markup=False, highlight=False)
    out_console.print(f"written to {target / 'result.json'}", markup=False, highlight=False)


def _model_folder(default: Path, run: Path, model: str) -> Path:
    """Where a network lies: a task's folder or one that ``nas compress`` made."""
    for folder in (default, run / model):
        if (folder / "model.json").is_file():
            return folder
    known = sorted(
        {p.parent.name if p.parent.name != "compress" else "compressed" for p in run.rglob("model.json")} - {"export"}
    )
    raise InputError(f"{run} has no trained network '{model}': {nearest(model, known)}")


def _label(name: str, settings: list[str] | None, number: int | None, model: str) -> str:
    """A folder name that tells settings apart."""
    parts = [name, model, *(settings or []), *([str(number)] if number is not None else [])]
    text = "-".join(parts)
    label = "".join(c if c.isalnum() or c in ".-_" else "_" for c in text)
    # Cut or changed names need something that still tells them apart.
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return label if len(label) <= 100 else f"{label[:91]}-{digest}"


def export(
    path: RunArgument,
    to: Annotated[
        str, typer.Option(help="Formats, separated by commas: json, safetensors, py.")
    ] = "json,safetensors,py",
    model: Annotated[str, typer.Option(help="Network of the run.")] = "searched",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Export a trained network of a run; every file is reloaded in a fresh process and compared."""
    from nas.export.package import FORMATS, export_model
    from nas.export.parity import check_exports
    from nas.model_file import load_model
    from runs.tasks import model_folder

    formats = tuple(part.strip() for part in to.split(",") if part.strip())
    for name in formats or ("",):
        if name not in FORMATS:
            raise InputError(f"unknown export format '{name}': {nearest(name, FORMATS)}")
    with _context(path) as context:
        spec, network = load_model(_model_folder(model_folder(context.run, model), path, model))
        folder = out or context.run.path / f"export-{model}"
        make_folder(folder)
        export_model(spec, network, folder, formats)
        rows = context.split.validation[:32]
        inputs = context.data.x_train.cpu()[rows].float() / 255
        files = [dataclasses.asdict(file) for file in check_exports(folder, spec, network, inputs)]
    if as_json:
        print(json.dumps(files))
        return
    for file in files:
        difference = (
            "" if file["difference"] is None else f"  (reloaded, largest logit difference {file['difference']:.1e})"
        )
        out_console.print(f"{folder / file['file']}{difference}", highlight=False, markup=False)


def report(path: RunArgument) -> None:
    """Write the HTML page of a finished run again."""
    from runs.directory import open_run, read_json
    from runs.tasks import write_page

    run_directory = open_run(path)
    if run_directory.command == "search":
        raise InputError(f"{path} is a search, which has no report: nas analyse {path} shows what it found")
    if not (path / "results.json").exists():
        raise InputError(f"{path} is not finished: nas {run_directory.command} --resume {path} finishes it")
    page = write_page(run_directory, read_json(path / "results.json"))
    out_console.print(str(page), markup=False, highlight=False)


def make_folder(path: Path) -> None:
    """Make a folder the user named. Raises ``InputError`` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None
