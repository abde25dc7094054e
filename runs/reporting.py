"""The last task of a run: everything found in one results.json and on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.errors import InputError
from nas.export.package import ExportedFile
from nas.model_file import load_model
from nas.report.verdict import verdict
from runs.context import Context, bench_of, model_folder
from runs.directory import RESULTS_SCHEMA, RunDirectory, flatten, read_json, write_json
from runs.exporting import describe
from runs.metrics import log_outcome
from runs.reproduction import command_of, recipe_text


def report(context: Context) -> dict[str, Any]:
    """The results, and beside them how fast the networks are: everything else is done, and the machine at rest."""
    run = context.run
    if run.result("compress") is not None:
        folders = {name: model_folder(run, name) for name in ("searched", "compressed")}
        networks = {name: load_model(folder, context.device)[1] for name, folder in folders.items()}
        # To make ONNX files takes longer than all of the report: nas compress does.
        speed = context.throughput(networks, engines=("eager",), turn=0.1)
        write_json(speed, run.folder("report") / "throughput.json")
    write_json(_gallery(context), run.folder("report") / "gallery.json")
    results = collect(context)
    log_outcome(run.folder("report"), flatten(run.table), _outcome(results))
    write_json(results, context.run.path / "results.json")
    write_page(context.run, results)
    for name, folder in (("searched", run.path / "export"), ("compressed", run.path / "export/compressed")):
        files = [entry for entry in results["export"] if (run.path / entry["file"]).parent == folder]
        if files:
            describe(context, name, model_folder(run, name), [ExportedFile(**entry) for entry in files], folder)
    return {"verdict": results["verdict"]}


def _outcome(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is compared with others by."""
    found: dict[str, Any] = {"parameters": results["analysis"]["complexity"]["parameters"]}
    for model in results["models"]:
        if model["role"] in ("searched", "compressed", "plain"):
            found |= {f"{model['role']} worst case": model["worst_case"], f"{model['role']} natural": model["natural"]}
    for last in results["search"]["epochs"][-1:]:
        found |= outcome_of_search(last)
    return found


def outcome_of_search(last: Mapping[str, Any]) -> dict[str, Any]:
    """What the last epoch of a search is compared with others by."""
    return {f"search {key.replace('_', ' ')}": last.get(key) for key in ("robust_accuracy", "natural_accuracy")}


LOOKED_AT, FALLEN, SHOWN = 32, 4, 8
"""Test images that the gallery is chosen from, those among it that fall at most, and all of it."""


def _gallery(context: Context) -> dict[str, Any]:
    """A few test images, and what an attack on the searched network makes of them; first such that fall."""
    from nas.evaluation.gallery import gallery
    from nas.report.gallery import shown

    bench = bench_of(context)
    _, network = load_model(model_folder(context.run, "searched"), context.device)
    pairs = gallery(network, bench.x, bench.y, bench.threat_model, seed=bench.seed, pairs=LOOKED_AT)
    fallen = [pair for pair in pairs if pair.seen_adversarial != pair.label]
    standing = [pair for pair in pairs if pair.seen_adversarial == pair.label]
    chosen = (fallen[:FALLEN] + standing)[:SHOWN]
    return {
        "looked_at": len(pairs),
        "fallen": len(fallen),
        "pairs": [shown(pair, context.data.classes, limited=True) for pair in chosen],
    }


def write_page(run: RunDirectory, results: Mapping[str, Any]) -> Path:
    """report.html of a run; times are only here, so that results.json of equal runs are equal."""
    # Pictures need matplotlib, which takes half a second to import in every worker.
    from nas.report.page import write_report

    paths = sorted(run.path.rglob("timing.json"))
    timing = {str(path.parent.relative_to(run.path)): read_json(path)["seconds"] for path in paths}
    environment = read_json(run.path / "environment.json")
    recorded = {}
    for part in ("throughput", "gallery"):
        path = run.path / "report" / f"{part}.json"
        recorded[part] = read_json(path) if path.exists() else None
    results = {**results, **recorded, "recipe_text": recipe_text(run.table), "search": _with_mixing(run, results)}
    write_report({**results, "environment": environment, "timing": timing}, run.path / "report.html")
    return run.path / "report.html"


def _with_mixing(run: RunDirectory, results: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of the search, each epoch with its mixing weights, where they were recorded."""
    path, found = run.path / "search" / "metrics.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} is not JSON lines ({error})") from None
        found[record["epoch"]] = record.get("mixing_weights")
    told: dict[str, Any] = results["search"]
    return {**told, "epochs": [{**row, "mixing_weights": found.get(row.get("epoch"))} for row in told["epochs"]]}


def collect(context: Context) -> dict[str, Any]:
    """Everything a run found, from the results of its tasks."""
    run, recipe, data = context.run, context.recipe, context.data
    searched, analysis = run.needed("search"), run.needed("analyse")
    models = []
    published = analysis.get("published", {})
    names = ["searched", "compressed", *(f"random-{i + 1}" for i in range(len(analysis["random"])))]
    names += [*published, "plain"]
    for name in names:
        evaluation = run.result(f"evaluate/{name}")
        if evaluation is None:
            continue
        trained = run.needed("compress" if name == "compressed" else f"train/{name}")
        role = "random" if name.startswith("random-") else "published" if name in published else name
        models.append({"name": name, "role": role, **trained, **evaluation})
    exported = run.result("export") or {"files": []}
    results: dict[str, Any] = {
        "schema": RESULTS_SCHEMA,
        "name": recipe.general.name,
        "command": command_of(run),
        "seed": recipe.general.seed,
        "threat_model": {"norm": recipe.threat_model.norm, "epsilon": recipe.threat_model.epsilon},
        "data": data.to_data(),
        "recipe": flatten(run.table),
        "genotype": searched["genotype"],
        "search": {"epochs": searched["epochs"], "warnings": searched["warnings"]},
        "analysis": {"topology": analysis["topology"], "complexity": analysis["complexity"]},
        "models": models,
        "export": exported["files"],
        "left_out": exported.get("left_out", {}),
    }
    results["verdict"] = verdict(results)
    return results
