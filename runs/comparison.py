"""The tasks of ``nas compare``: one architecture trained several ways, each judged alike, and one table of it all.

    measure/<contender>         passes and memory of a step        -> what "equal passes" is counted by
    train/<contender>-<seed>    the loop of every training         -> model.json, model.safetensors
    evaluate/<contender>-<seed> attacks and checks; detection      -> masks, accuracies, intervals
    certify/<contender>-<seed>  certified radii, where asked for
    report                      results.json, table.md, report.html

All results are the same for the same recipe, whatever was interrupted; seconds and memory stand apart, in files named
measured.json and under "measured" in results.json.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.data.split import subset
from nas.errors import Diverged, InputError
from nas.evaluation.interval import wilson
from nas.model_file import load_model
from nas.objective import prediction_of
from nas.prediction import networks_in
from nas.randomness import generator
from nas.report.comparison_table import markdown
from nas.report.comparison_verdict import comparison_verdict
from nas.tensor_file import write_text
from nas.training.cost import Cost, measure
from nas.training.cost_sensitive import protected_by
from nas.training.loop import validate
from runs.construct import plain
from runs.contenders import ComparePart, Contender
from runs.context import Context, bench_of, found_genotype, model_folder
from runs.detecting import judge_detected
from runs.directory import RESULTS_SCHEMA, RunDirectory, flatten, open_run, read_json, write_json
from runs.judging import judge
from runs.networks import compress_into, model_result, to_train, train_in, training_seed
from runs.recipe import Recipe
from runs.reproduction import command_of, recipe_text
from runs.tasks import Task
from search_spaces.catalogue import load_genotype, space_of
from search_spaces.genotype import SCHEMA, AnyGenotype, genotype_from_data

Work = Callable[[Context], dict[str, Any]]

NETWORK = "compared"
"""What initial weights and order of the images are derived from, beside the seed: the same for all contenders."""

RADII = 8
"""Points of a curve of certified accuracy within one deviation of the noise."""


FAILED = {"failed": "there is no trained network"}
"""What is found of a contender whose training failed."""


def plan(recipe: Recipe) -> list[Task]:
    """The tasks of a comparison, each after those it needs."""
    part = _part(recipe)
    first, training = part.contenders[0], [contender for contender in part.contenders if contender.trains]
    tasks = []
    for contender in training:
        taught = [tuple(f"train/{name}-{seed}" for name in contender.needs) for seed in part.seeds]
        tasks.append(Task(f"measure/{contender.name}", taught[0], _measure(contender)))
        counts = {f"measure/{first.name}", f"measure/{contender.name}"} if part.equal == "passes" else set()
        for seed, teacher in zip(part.seeds, taught, strict=True):
            name = f"train/{contender.name}-{seed}"
            tasks.append(Task(name, (*sorted(counts), *teacher), _train(contender, seed), together=True))
    compressed = [contender for contender in part.contenders if contender.compress is not None]
    for contender in compressed:
        for seed in part.seeds:
            parent = (f"train/{contender.network}-{seed}",)
            tasks.append(Task(f"train/{contender.name}-{seed}", parent, _compress(contender, seed), together=True))
    for name in dict.fromkeys(contender.network for contender in compressed):
        group = [name, *(contender.name for contender in compressed if contender.network == name)]
        needs = tuple(f"train/{one}-{part.seeds[0]}" for one in group)
        tasks.append(Task(f"throughput/{name}", needs, _throughput(group), alone=True))
    # What takes longest begins first.
    judged = sorted(part.contenders, key=lambda contender: prediction_of(contender.train.objective) is None)
    for contender in judged:
        for seed in part.seeds:
            needs = (f"train/{contender.folder}-{seed}",)
            tasks.append(Task(f"evaluate/{contender.name}-{seed}", needs, _evaluate(contender, seed), together=True))
            if contender.certify is not None:
                tasks.append(Task(f"certify/{contender.name}-{seed}", needs, _certify(contender, seed)))
    return [*tasks, Task("report", tuple(task.name for task in tasks), _report)]


def read_genotype_of(recipe: Recipe) -> AnyGenotype:
    """The architecture that a recipe compares on: a name, a file, a finished run, or in the recipe itself."""
    given = _part(recipe).genotype
    if given is None:
        raise InputError("compare.genotype is missing: a published name, a file, a run directory or a genotype")
    if isinstance(given, Mapping):
        genotype = genotype_from_data({"schema": SCHEMA, **given})
        space_of(genotype)
        return genotype
    if not isinstance(given, str):
        raise InputError(f"compare.genotype must be a text or a table, not {given!r}")
    if Path(given).is_dir():
        return found_genotype(open_run(Path(given)))
    return load_genotype(given)


def _part(recipe: Recipe) -> ComparePart:
    if recipe.compare is None:
        raise InputError("the recipe has no [compare] table: it says which contenders are compared")
    return recipe.compare


def _context(context: Context, contender: Contender, seed: int) -> Context:
    """The context of one training: the contender's [train] table and the seed in place of the recipe's."""
    general, train = dataclasses.replace(context.recipe.general, seed=seed), contender.train
    folders = {name: str(model_folder(context.run, f"{name}-{seed}")) for name in contender.needs}
    for name in folders:
        if "failed" in context.run.needed(f"train/{name}-{seed}"):
            raise InputError(f"'{contender.name}' needs '{name}-{seed}', the training of which failed")
    if contender.teacher is not None:
        objective: Any = train.objective
        taught = dataclasses.replace(objective, teacher=folders[contender.teacher])
        train = dataclasses.replace(train, objective=taught)
    if contender.transfer is not None and train.activation is not None:
        given = dataclasses.replace(train.activation, transfer=folders[contender.transfer])
        train = dataclasses.replace(train, activation=given)
    return dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, general=general, train=train))


def _measure(contender: Contender) -> Work:
    def work(context: Context) -> dict[str, Any]:
        seed = _part(context.recipe).seeds[0]
        inner = _context(context, contender, seed)
        _, model, objective = to_train(inner, genotype_from_data(context.run.genotype), NETWORK)
        # The seed and folder of a training to come, so that what takes long to prepare is made once.
        own, folder = training_seed(inner, NETWORK), context.run.folder(f"train/{contender.name}-{seed}")
        cost = measure(model, inner.data, inner.split, objective, contender.train.training, seed=own, folder=folder)
        write_json({"memory": cost.memory}, context.run.folder(f"measure/{contender.name}") / "measured.json")
        return dataclasses.asdict(dataclasses.replace(cost, memory=None))

    return work


def cost_of(run: RunDirectory, contender: Contender) -> Cost:
    """What was measured of a contender's training."""
    return Cost(**run.needed(f"measure/{contender.network}"))


def epochs_of(run: RunDirectory, part: ComparePart, contender: Contender) -> int:
    """How many epochs a contender trains for."""
    own, first = contender.train.training.epochs, part.contenders[0]
    if part.equal != "passes" or contender.network == first.name:
        return own
    return cost_of(run, contender).epochs_for(cost_of(run, first).passes(first.train.training.epochs))


def _train(contender: Contender, seed: int) -> Work:
    def work(context: Context) -> dict[str, Any]:
        folder = context.run.folder(f"train/{contender.name}-{seed}")
        inner = _context(context, contender, seed)
        epochs = epochs_of(context.run, _part(context.recipe), contender)
        training = dataclasses.replace(contender.train.training, epochs=epochs)
        spec, model, objective = to_train(inner, genotype_from_data(context.run.genotype), NETWORK)
        # What a process does once (imports, tracing the network) is no part of the training's seconds.
        import torch.utils.tensorboard  # noqa: F401

        few = inner.split.validation[:2]
        validate(model, inner.data, few, contender.train.validation_attack, seed, training.batch_size)
        laps = Laps(folder / "measured.json")
        try:
            records = train_in(inner, model, objective, training, folder, NETWORK, laps)
        except Diverged as failure:
            # The others are still worth comparing; the table says what happened to this one.
            return {"failed": str(failure)}
        return model_result(spec, model, folder, records)

    return work


class Laps:
    """Seconds of each epoch in a file, so that those of a training that was interrupted can be added up."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, time.monotonic()
        self.seconds: dict[str, float] = read_json(path)["epochs"] if path.exists() else {}

    def __call__(self, epoch: int) -> None:
        now = time.monotonic()
        self.seconds[str(epoch)] = round(now - self.last, 3)
        self.last = now
        write_json({"epochs": self.seconds}, self.path)


def _compress(contender: Contender, seed: int) -> Work:
    def work(context: Context) -> dict[str, Any]:
        source = f"{contender.network}-{seed}"
        if "failed" in context.run.needed(f"train/{source}"):
            return FAILED
        assert contender.compress is not None
        folder = context.run.folder(f"train/{contender.name}-{seed}")
        try:
            inner = _context(context, contender, seed)
            return compress_into(inner, contender.compress, model_folder(context.run, source), folder)
        except (Diverged, InputError) as failure:
            # A method that has nothing to do on this network, or cannot reach its budget, is a result, too.
            return {"failed": str(failure)}

    return work


def _throughput(names: list[str]) -> Work:
    """How fast the networks of the first seed are beside that of the first name; what was measured is in a file."""

    def work(context: Context) -> dict[str, Any]:
        seed = _part(context.recipe).seeds[0]
        folders = {name: f"{name}-{seed}" for name in names}
        models = {
            name: load_model(model_folder(context.run, folder), context.device)[1]
            for name, folder in folders.items()
            if "failed" not in context.run.needed(f"train/{folder}")
        }
        found = context.throughput(models) if names[0] in models else {"engines": {}}
        write_json(found, context.run.folder(f"throughput/{names[0]}") / "measured.json")
        return {}

    return work


def _evaluate(contender: Contender, seed: int) -> Work:
    def work(context: Context) -> dict[str, Any]:
        inner = _context(context, contender, seed)
        folder = context.run.folder(f"evaluate/{contender.name}-{seed}")
        model = _trained(inner, contender, seed)
        if model is None:
            return FAILED
        bench, trials = bench_of(inner), context.recipe.evaluate.trials
        if contender.detect is not None:
            rows = inner.split.validation.to(inner.device)
            return judge_detected(bench, model, trials, contender.detect, inner.data.x_train[rows].float() / 255)
        parent = {}
        if contender.compress is not None:
            parent[contender.network] = load_model(
                model_folder(context.run, f"{contender.network}-{seed}"), context.device
            )[1]
        return judge(bench, model, trials, folder, surrogates=parent)

    return work


def _trained(context: Context, contender: Contender, seed: int) -> nn.Module | None:
    """The network of a contender that is judged, None where its training failed."""
    name = f"{contender.folder}-{seed}"
    if "failed" in context.run.needed(f"train/{name}"):
        return None
    return load_model(model_folder(context.run, name), context.device)[1]


def _certify(contender: Contender, seed: int) -> Work:
    def work(context: Context) -> dict[str, Any]:
        part = contender.certify
        assert part is not None
        inner = _context(context, contender, seed)
        model = _trained(inner, contender, seed)
        if model is None:
            return FAILED
        bench = bench_of(inner)
        x, y = bench.x, bench.y
        if 0 < part.samples < len(y):
            # The same images for every seed.
            rows = subset(y, part.samples, generator(context.seed, "certified samples")).to(y.device)
            x, y = x[rows], y[rows]
        smoothing = part.smoothing
        # The network by itself: the votes are over the noise of the certificate.
        (network,) = networks_in(model).values()
        certificates = smoothing.certify(network, x, generator=generator(seed, "certify", device=x.device))
        # As far as an image gets that no draw was wrong about.
        largest = torch.special.ndtri(torch.tensor(smoothing.alpha ** (1 / smoothing.n)).double())
        radii = torch.arange(1 + max(0, int(largest * RADII)), dtype=torch.float64) / RADII * smoothing.sigma
        return {**certificates.to_data(y, radii), "sigma": smoothing.sigma}

    return work


def _report(context: Context) -> dict[str, Any]:
    results = collect(context)
    write_json(results, context.run.path / "results.json")
    write_text(markdown(results), context.run.path / "table.md")
    write_comparison_page(context.run, results)
    return {"verdict": results["verdict"]}


def write_comparison_page(run: RunDirectory, results: Mapping[str, Any]) -> Path:
    """report.html of a comparison."""
    # Pictures need matplotlib, which takes half a second to import in every worker.
    from nas.report.comparison_page import write_comparison

    path = run.path / "report.html"
    more = {"environment": read_json(run.path / "environment.json"), "recipe_text": recipe_text(run.table)}
    write_comparison({**results, **more}, path)
    return path


def collect(context: Context) -> dict[str, Any]:
    """Everything a comparison found, from the results of its tasks."""
    run, recipe, data = context.run, context.recipe, context.data
    part = _part(recipe)
    # A class that one contender protects is looked at in all.
    protected = {n for one in part.contenders for n in protected_by(one.train.objective, data.classes)}
    contenders = [_contender(run, part, contender, protected) for contender in part.contenders]
    results: dict[str, Any] = {
        "schema": RESULTS_SCHEMA,
        "kind": "comparison",
        "name": recipe.general.name,
        "command": command_of(run),
        "seeds": list(part.seeds),
        "equal": part.equal,
        "reference": part.against.name,
        "threat_model": {"norm": recipe.threat_model.norm, "epsilon": recipe.threat_model.epsilon},
        "data": data.to_data(),
        "genotype": dict(run.genotype or {}),
        "attacks": {name: str(trial) for name, trial in recipe.evaluate.trials.items()},
        "protected": [data.classes[number] for number in sorted(protected)],
        "contenders": contenders,
        "recipe": flatten(run.table),
        "measured": {contender.name: _measured(run, part, contender) for contender in part.contenders},
    }
    results["verdict"] = comparison_verdict(results)
    return results


def _contender(run: RunDirectory, part: ComparePart, contender: Contender, protected: set[int]) -> dict[str, Any]:
    """A contender: how it was trained, at what cost, each seed's results, and their mean and deviation."""
    cost, first = cost_of(run, contender), part.contenders[0]
    epochs = epochs_of(run, part, contender)
    if contender.compress is not None:
        epochs += contender.compress.epochs
    passes = cost.passes(epochs)
    seeds = []
    for seed in part.seeds:
        trained = run.needed(f"train/{contender.folder}-{seed}")
        if "failed" in trained:
            seeds.append({"seed": seed, "failed": trained["failed"]})
            continue
        found = run.needed(f"evaluate/{contender.name}-{seed}")
        entry = {"seed": seed, **trained, **found}
        if contender.certify is not None:
            entry["certification"] = run.needed(f"certify/{contender.name}-{seed}")
        entry.pop("genotype", None)
        seeds.append(entry)
    whole = [entry for entry in seeds if "failed" not in entry]
    prediction = prediction_of(contender.train.objective)
    return {
        "name": contender.name,
        "network": contender.network,
        "method": plain(contender.train.objective),
        **({} if contender.compress is None else {"compress": [step.name for step in contender.compress.steps]}),
        "epochs": epochs,
        "passes": {
            "forward": cost.forward,
            "backward": cost.backward,
            "preparation": cost.preparation,
            "total": passes,
            "relative": passes / cost_of(run, first).passes(first.train.training.epochs),
        },
        "runs": seeds,
        **({} if prediction is None else {"prediction": str(prediction)}),
        **(_summary(whole, protected) if whole else {}),
    }


def _summary(runs: list[dict[str, Any]], protected: set[int]) -> dict[str, Any]:
    """Mean and sample deviation over the seeds of whatever was measured in all of them."""

    def over(pick: Callable[[dict[str, Any]], float]) -> dict[str, float | None]:
        values = [float(pick(run)) for run in runs]
        return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}

    summary: dict[str, Any] = {
        "parameters": runs[0]["parameters"],
        "nonzero": over(lambda run: run["nonzero"]),
        # Runs begun before bytes were counted have none.
        **({"bytes": over(lambda run: run["bytes"]["sparse"])} if all("bytes" in run for run in runs) else {}),
        "macs": runs[0]["macs"],
        "n": runs[0]["n"],
        "natural": over(lambda run: run["natural"]),
        "attacks": {name: over(lambda run, name=name: run["attacks"][name]) for name in runs[0]["attacks"]},  # type: ignore[misc]
        "worst_case": over(lambda run: run["worst_case"]),
        # All seeds are judged on the same images: to pool them would make the interval narrower than it is.
        "interval": [statistics.fmean(run["interval"][end] for run in runs) for end in (0, 1)],
        "masking": _masking(runs),
    }
    if protected and all(run.get("per_class") for run in runs):
        summary["protected"] = over(lambda run: _share_of(run["per_class"], protected))
    if "certification" in runs[0]:
        curves = [run["certification"] for run in runs]
        shares = [statistics.fmean(values) for values in zip(*(c["certified_accuracy"] for c in curves), strict=True)]
        summary["certification"] = {
            "settings": curves[0]["settings"],
            "n": curves[0]["n"],
            "sigma": curves[0]["sigma"],
            "radii": curves[0]["radii"],
            "certified_accuracy": shares,
            "abstained": statistics.fmean(curve["abstained"] / curve["n"] for curve in curves),
        }
    if "detection" in runs[0]:
        summary["detection"] = _detection([run["detection"] for run in runs])
    return summary


def _share_of(rows: list[dict[str, Any]], classes: set[int]) -> float:
    """Worst-case accuracy on the images of these classes alone."""
    own = [row for row in rows if row["class"] in classes]
    return sum(row["worst_case"] * row["n"] for row in own) / max(1, sum(row["n"] for row in own))


def _masking(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst verdict of the checks over the seeds, and which checks gave it in how many of them."""
    for verdict in ("fail", "warn"):
        names = [check["name"] for run in runs for check in run["checks"] if check["verdict"] == verdict]
        if names:
            return {"verdict": verdict, "checks": {name: names.count(name) for name in dict.fromkeys(names)}}
    return {"verdict": "pass", "checks": {}}


def _detection(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A detector over the seeds: adversarial images of all of them together."""
    rows = {}
    for name in runs[0]["attacks"]:
        found = [run["attacks"][name] for run in runs]
        successful = sum(row["successful"] for row in found)
        caught = sum(round(row["detected"] * row["successful"]) for row in found if row["successful"])
        aucs = [row["auc"] for row in found if row["auc"] is not None]
        rows[name] = {
            "n": sum(row["n"] for row in found),
            "successful": successful,
            "detected": caught / successful if successful else None,
            "interval": list(wilson(caught, successful)) if successful else None,
            "auc": statistics.fmean(aucs) if aucs else None,
        }
    return {
        "detector": runs[0]["detector"],
        "false_positives": statistics.fmean(run["false_positives"] for run in runs),
        "without": statistics.fmean(run["without"] for run in runs),
        "attacks": rows,
    }


def _measured(run: RunDirectory, part: ComparePart, contender: Contender) -> dict[str, Any]:
    """Seconds of each training and bytes of a step: what depends on the machine and the moment."""
    seconds = []
    for seed in part.seeds:
        path = run.path / f"train/{contender.folder}-{seed}" / "measured.json"
        seconds.append(round(sum(read_json(path)["epochs"].values()), 2) if path.exists() else None)
    memory = read_json(run.path / f"measure/{contender.network}" / "measured.json")["memory"]
    speeds = run.path / f"throughput/{contender.network}" / "measured.json"
    return {
        "seconds": seconds,
        "memory": memory,
        "speed": _speed(read_json(speeds) if speeds.exists() else {}, contender),
    }


def _speed(found: Mapping[str, Any], contender: Contender) -> dict[str, dict[str, Any]]:
    """By engine and batch, how fast the networks of a contender are."""
    return {
        engine: {batch: rows[contender.folder] for batch, rows in entry["batches"].items() if contender.folder in rows}
        for engine, entry in found.get("engines", {}).items()
    }
