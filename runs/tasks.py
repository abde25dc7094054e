"""The tasks of a run: what each needs, and what it does in its own folder of the run directory.

A task reads the results of those it needs, writes into its folder, and ends with result.json. It can be killed
at any moment: started again, it continues from its checkpoint or from its beginning to the same result.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.activations.transfer import check_source, freeze_activation, load_activation
from nas.analysis.complexity import (
    Complexity,
    complexity,
    nonzero_parameters,
    parameters_of,
    with_macs,
    with_parameters,
)
from nas.analysis.drawing import draw_cell
from nas.analysis.throughput import throughput
from nas.analysis.topology import topology
from nas.compression.plan import Recovers, Steers, plan_for
from nas.compression.size import stored_size
from nas.data.image_data import ImageData
from nas.data.split import Split, split
from nas.errors import InputError
from nas.export.package import ExportedFile
from nas.export.source import why_no_source
from nas.model_file import ModelSpec, load_model, save_model, weights_digest, with_plan
from nas.objective import Objective, Setting, prediction_of
from nas.randomness import derived_seed, generator
from nas.report.verdict import verdict
from nas.search.bilevel import search
from nas.search.memory_budget import DryRun, fit
from nas.search.random_cells import random_cells
from nas.tensor_file import write_text
from nas.training.auxiliary import WithAuxiliary
from nas.training.cost_sensitive import class_table, protected_by
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.weight_perturbation import WeightPerturbation
from runs.compress_part import PARENT, CompressPart, Step
from runs.directory import RunDirectory, flatten, read_json, write_json
from runs.exporting import describe, export_into
from runs.judging import Bench, judge
from runs.metrics import MetricsLog, log_outcome
from runs.recipe import Recipe, SearchPart
from runs.reproduction import command_of, recipe_text
from search_spaces.genotype import AnyGenotype, Genotype, GenotypeError, genotype_from_data, write_genotype

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Context:
    """What a task works with: the run, its recipe, and where to report progress."""

    run: RunDirectory
    recipe: Recipe
    tick: Tick

    @property
    def device(self) -> torch.device:
        """The device of the recipe."""
        return device_of(self.recipe.general.device)

    @property
    def seed(self) -> int:
        """The seed of the recipe."""
        return self.recipe.general.seed

    @cached_property
    def data(self) -> ImageData:
        """The data set, on the device."""
        data: ImageData = self.recipe.data.source()
        protected_by(self.recipe.train.objective, data.classes)  # an unknown class is told before a search, not after
        return data.to(self.device)

    @cached_property
    def split(self) -> Split:
        """Weights, architecture and validation part of the training images."""
        part = self.recipe.data
        return split(
            self.data.y_train.cpu(), architecture=part.architecture, validation=part.validation, seed=self.seed
        )

    def throughput(self, models: Mapping[str, nn.Module], **more: Any) -> dict[str, Any]:
        """How fast networks are on test images, against the first of them. more: of ``throughput``."""
        return throughput(models, self.data.x_test[:64].float() / 255, **more)

    def spec(self, genotype: AnyGenotype, channels: int = 0) -> ModelSpec:
        """The network of ``genotype`` for the recipe's data, at the recipe's size unless ``channels`` are given."""
        data, part = self.data, self.recipe.train
        known = channels or part.channels
        activation = None if part.activation is None else part.activation.activation
        spec = ModelSpec(
            genotype, known or 1, part.cells, data.input_shape, data.classes, data.mean, data.std, activation=activation
        )  # fmt: skip
        return spec if known else with_parameters(spec, part.parameters)


@dataclass(frozen=True)
class Task:
    """A unit of work that is done or not: its name, which is its folder, what must be done before, and the work.

    alone: everything else waits for it, so it may use all threads.
    """

    name: str
    needs: tuple[str, ...]
    work: Callable[[Context], dict[str, Any]]
    alone: bool = False


def plan(recipe: Recipe, command: str) -> list[Task]:
    """The tasks of ``nas run``, ``nas search`` or ``nas train``, each after those it needs."""
    tasks = [
        Task("search", (), _given if command == "train" else _search, alone=True),
        Task("analyse", ("search",), _analyse),
    ]
    if command == "search":
        return tasks
    full = command == "run"
    networks = ["searched"] + [f"random-{i + 1}" for i in range(recipe.baselines.random if full else 0)]
    networks += [*recipe.baselines.networks] if full else []
    networks += ["plain"] if full and recipe.baselines.plain is not None else []
    # Several may be done at once, the first that can be before others: long chains come first, short tasks last.
    models = list(networks)
    for name in networks:
        # The plain baseline does not depend on what was found.
        tasks.append(Task(f"train/{name}", ("search" if name == "plain" else "analyse",), _train(name)))
        if name == "searched" and full and recipe.compress is not None:
            tasks.append(Task("compress", ("train/searched",), _compress))
            models.insert(0, "compressed")
    for name in models:
        trained = "compress" if name == "compressed" else f"train/{name}"
        tasks.append(Task(f"evaluate/{name}", (trained,), _evaluate(name)))
    exported = ("train/searched", "compress") if "compressed" in models else ("train/searched",)
    tasks.append(Task("export", exported, _export))
    before = [task.name for task in tasks]
    tasks.append(Task("report", tuple(before), _report))
    return tasks


def device_of(name: str) -> torch.device:
    """The device a recipe names; "auto" is cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but this machine has no usable GPU: use --set device=cpu")
    return torch.device(name)


def model_folder(run: RunDirectory, model: str) -> Path:
    """Where a trained network of a run lies."""
    return run.path / ("compress" if model == "compressed" else f"train/{model}")


def found_genotype(run: RunDirectory) -> AnyGenotype:
    """The genotype the run searched for or was given."""
    place = run.path / ("run.json" if run.command == "compare" else "search/result.json")
    try:
        return genotype_from_data(run.genotype if run.command == "compare" else run.needed("search")["genotype"])
    except (KeyError, TypeError, GenotypeError) as error:
        raise InputError(f"{place} is damaged: {error}") from None


IN_METRICS_ONLY = ("genotype", "mixing_weights", "warnings")
"""What an epoch of the search leaves in metrics.jsonl, but not in results."""


def _search(context: Context) -> dict[str, Any]:
    recipe, folder = context.recipe, context.run.folder("search")
    part, activation = recipe.search, recipe.train.activation
    if activation is not None and activation.transfer:
        check_source(Path(activation.transfer))  # told before a search, not after
    with MetricsLog(folder, "search") as metrics:
        result = search(
            recipe.space,
            context.data,
            context.split,
            part.settings,
            weight_objective=part.weight_objective,
            objectives=search_objectives(part),
            attack=part.attack,
            seed=context.seed,
            checkpoint=folder / "checkpoint.safetensors",
            log=metrics.log,
            history=metrics.restore,
            tick=context.tick,
        )
    write_genotype(result.genotype, folder / "genotype.json")
    return {
        "genotype": result.genotype.to_data(),
        "mixing_weights": {kind: table.tolist() for kind, table in result.weights.items()},
        "epochs": [{k: v for k, v in record.items() if k not in IN_METRICS_ONLY} for record in result.records],
        "warnings": result.warnings,
    }


def search_objectives(part: SearchPart) -> dict[str, Objective]:
    """What the stages of a search may name."""
    return {"natural": Standard(), "adversarial": PgdAt(part.attack)}


def recomputes_within(recipe: Recipe, budget: float, say: Callable[[str], None]) -> bool:
    """Whether the search has to recompute its cells to stay within ``budget`` GiB; ``InputError`` where it cannot.

    Carries out single steps of the search in processes of their own.
    """
    device = device_of(recipe.general.device)
    data: ImageData = recipe.data.source()
    parts = split(
        data.y_train, architecture=recipe.data.architecture, validation=recipe.data.validation, seed=recipe.general.seed
    )
    part = recipe.search
    trial = DryRun(
        recipe.space, data, parts, part.weight_objective, search_objectives(part), part.attack, device.type,
        recipe.general.threads,
    )  # fmt: skip
    return fit(part.settings, budget, trial.peak, say).recompute_cells


def _given(context: Context) -> dict[str, Any]:
    """The genotype named on the command line stands in for a search."""
    genotype = genotype_from_data(context.run.genotype)
    write_genotype(genotype, context.run.folder("search") / "genotype.json")
    return {"genotype": genotype.to_data(), "epochs": [], "warnings": []}


def _analyse(context: Context) -> dict[str, Any]:
    folder, genotype = context.run.folder("analyse"), found_genotype(context.run)
    spec = context.spec(genotype)
    size = complexity(spec)
    result: dict[str, Any] = {
        "topology": [cell.to_data() for cell in topology(genotype)],
        "complexity": size.to_data(),
        "random": [],
    }
    if context.run.command == "search":
        last = context.run.needed("search")["epochs"][-1]
        log_outcome(folder, flatten(context.run.table), _outcome_of_search(last) | {"parameters": size.parameters})
    if not isinstance(genotype, Genotype):
        return result
    for kind, cell in genotype.cells:
        write_text(draw_cell(cell, f"{kind} cell"), folder / f"{kind}.svg")
    part = context.recipe.baselines
    if context.run.command == "run" and part.published:
        result["published"] = {
            name: {"genotype": given.to_data(), "channels": channels}
            for name, (known, what) in part.networks.items()
            for given in [part.genotype(known)]
            for channels in [_equal(dataclasses.replace(spec, genotype=given), size, what).channels]
        }
    if context.run.command == "run" and part.random:

        def fit(candidate: Genotype) -> tuple[int, int]:
            fitted = with_parameters(dataclasses.replace(spec, genotype=candidate), size.parameters)
            return fitted.channels, parameters_of(fitted)

        chosen = random_cells(
            context.recipe.space, part.random, fit, size.parameters, part.tolerance, generator(context.seed, "random")
        )
        result["random"] = [{"genotype": drawn.to_data(), "channels": channels} for drawn, channels in chosen]
    return result


def _equal(spec: ModelSpec, size: Complexity, what: str) -> ModelSpec:
    """``spec`` with the channels at which its network has about the parameters, or the MACs, of ``size``."""
    return with_macs(spec, size.macs) if what == "macs" else with_parameters(spec, size.parameters)


def _outcome_of_search(last: Mapping[str, Any]) -> dict[str, Any]:
    """What the last epoch of a search is compared with others by."""
    return {f"search {key.replace('_', ' ')}": last.get(key) for key in ("robust_accuracy", "natural_accuracy")}


def _train(name: str) -> Callable[[Context], dict[str, Any]]:
    def work(context: Context) -> dict[str, Any]:
        recipe, run = context.recipe, context.run
        channels = 0
        if name == "plain":
            genotype: AnyGenotype = _required_plain(recipe)
        elif name == "searched":
            genotype = found_genotype(run)
        else:
            found = run.needed("analyse")
            given = name in recipe.baselines.networks
            drawn = found["published"][name] if given else found["random"][int(name.removeprefix("random-")) - 1]
            genotype, channels = genotype_from_data(drawn["genotype"]), drawn["channels"]
        spec, model, objective = to_train(context, genotype, name, channels)
        records = train_in(context, model, objective, recipe.train.training, run.folder(f"train/{name}"), name)
        return model_result(spec, model, run.folder(f"train/{name}"), records)

    return work


def to_train(
    context: Context, genotype: AnyGenotype, name: str, channels: int = 0
) -> tuple[ModelSpec, nn.Module, Objective]:
    """The network of ``genotype`` with fresh weights, which depend on seed and ``name``, and what it is trained by."""
    part = context.recipe.train
    objective: Objective = part.objective
    auxiliary = bool(part.auxiliary_weight) and isinstance(genotype, Genotype)
    if auxiliary:
        objective = WithAuxiliary(objective, part.auxiliary_weight)
    if part.weight_perturbation:
        objective = WeightPerturbation(objective, part.weight_perturbation)
    spec = context.spec(genotype, channels)
    spec = dataclasses.replace(spec, auxiliary=auxiliary, prediction=prediction_of(part.objective))
    model = fresh(spec, derived_seed(context.seed, f"weights {name}"))
    if part.activation is not None and part.activation.transfer:
        load_activation(model, Path(part.activation.transfer))
        if part.activation.freeze:
            freeze_activation(model)
    return spec, model.to(context.device), objective


def _required_plain(recipe: Recipe) -> AnyGenotype:
    plain = recipe.baselines.plain
    if plain is None:
        raise InputError("the recipe has no plain baseline")
    return plain


def _compress(context: Context) -> dict[str, Any]:
    part = context.recipe.compress
    if part is None:
        raise InputError("the recipe has no [compress] table")
    return compress_into(context, part, model_folder(context.run, "searched"), context.run.folder("compress"))


def compress_into(context: Context, part: CompressPart, source: Path, folder: Path) -> dict[str, Any]:
    """Compress the trained network in ``source`` step by step, and leave it in ``folder``, what is between inside."""
    plans: list[dict[str, str]] = []
    result: dict[str, Any] = {}
    for index, step in enumerate(part.steps):
        last = index + 1 == len(part.steps)
        target = folder if last else folder / f"{index + 1}-{step.name}"
        done = target / "step.json"
        if not done.exists():
            write_json(_compress_step(context, step, source, target), done)
        result = read_json(done)
        plans += result["plan"]
        source = target
    return {**result, "plan": plans}


def _compress_step(context: Context, step: Step, source: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    spec, network = load_model(source, context.device)
    if spec.auxiliary:
        spec, trained = dataclasses.replace(spec, auxiliary=False), network.state_dict()
        network = spec.build().to(context.device)
        network.load_state_dict({name: trained[name] for name in network.state_dict()})
    network.eval()
    method, objective = step.method, step.objective or context.recipe.train.objective
    if getattr(objective, "teacher", None) == PARENT:
        taught: Any = objective
        objective = dataclasses.replace(taught, teacher=str(source))
    parent, looked_at, led = copy.deepcopy(network).requires_grad_(False), network, []
    if isinstance(method, Steers) and method.epochs:
        if spec.prediction is not None:
            raise InputError(
                f"compression '{step.name}' is led up to by training one network, and '{source.name}' predicts with "
                f"several ({spec.prediction}): set its epochs to 0, or choose a method without"
            )
        looked_at = method.steered(network)
        (folder / "steering").mkdir(exist_ok=True)
        led = train_in(
            context, looked_at, method.steering(context.recipe.train.objective), step.steering(method.epochs),
            folder / "steering", f"steered {step.name}",
        )  # fmt: skip
        looked_at.eval()
        network = method.released(looked_at)
    seed = derived_seed(context.seed, f"compress {step.name}")
    setting = Setting(network, context.data, context.split, seed, step.epochs, step.training.batch_size, folder)
    decided = plan_for(method, looked_at, setting)
    spec, model = with_plan(spec, decided), decided.apply(network)
    records = []
    if step.epochs:
        if isinstance(method, Recovers):
            objective = method.recovery(objective, parent)
        records = train_in(context, model, objective, step.fine_tuning, folder, f"compressed {step.name}")
    result = model_result(spec, model, folder, records)
    if led:
        result["steering"] = led
    result["plan"] = [
        {"method": decided.method, "name": p.name, "action": p.action, "reason": p.reason} for p in decided.layers
    ]
    return result


def fresh(spec: ModelSpec, seed: int) -> nn.Module:
    """The network with initial weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.build()


def train_in(
    context: Context,
    model: nn.Module,
    objective: Objective,
    training: Training,
    folder: Path,
    purpose: str,
    lap: Callable[[int], None] = lambda epoch: None,
    *,
    rows: Split | None = None,
    heard: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Train ``model`` in ``folder``; returns its records.

    lap: hears of every epoch that ends here. heard: of every epoch's record, those before an interruption again; what
    it raises ends the training. rows: the images to train on, instead of the recipe's.
    """

    def log(record: Mapping[str, Any]) -> None:
        lap(record["epoch"])
        metrics.log(record)
        heard(record)

    def history(records: list[dict[str, Any]]) -> None:
        metrics.restore(records)
        for record in records:
            heard(record)

    with MetricsLog(folder, "train") as metrics:
        return train(
            model,
            context.data,
            rows or context.split,
            objective,
            training,
            validation_attack=context.recipe.train.validation_attack,
            seed=derived_seed(context.seed, f"train {purpose}"),
            extra=context.recipe.data.extra,
            checkpoint=folder / "checkpoint.safetensors",
            log=log,
            history=history,
            tick=context.tick,
        )


def model_result(spec: ModelSpec, model: nn.Module, folder: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Save the trained ``model`` in ``folder``; what a task says of it."""
    save_model(spec, model, folder)
    size = complexity(spec)
    return {
        "genotype": spec.genotype.to_data(),
        "prediction": "one network" if spec.prediction is None else str(spec.prediction),
        "parameters": size.parameters,
        "nonzero": nonzero_parameters(model),
        "bytes": dataclasses.asdict(stored_size(model)),
        "macs": size.macs,
        "digest": weights_digest(model),
        "training": records,
    }


def _evaluate(name: str) -> Callable[[Context], dict[str, Any]]:
    def work(context: Context) -> dict[str, Any]:
        run, folder = context.run, context.run.folder(f"evaluate/{name}")
        spec, model = load_model(model_folder(run, name), context.device)
        del spec
        return evaluate_into(context, model, context.recipe.evaluate.trials, folder)

    return work


def evaluate_into(
    context: Context, model: nn.Module, trials: Mapping[str, Any], folder: Path, **more: Any
) -> dict[str, Any]:
    """Judge ``model`` on the whole test set and keep the masks in ``folder``. more: of ``judging.judge``."""
    result = judge(bench_of(context), model, trials, folder, **more)
    result["per_class"] = class_table(result["per_class"], context.data.classes, context.recipe.train.objective)
    return result


def bench_of(context: Context) -> Bench:
    """The test set of a run, and how its networks are judged."""
    data, recipe = context.data, context.recipe
    return Bench(
        data.x_test.float() / 255,
        data.y_test,
        recipe.threat_model,
        context.seed,
        recipe.evaluate.batch_size,
        context.tick,
    )


def _export(context: Context) -> dict[str, Any]:
    run = context.run
    files, left_out = [], {}
    for name in ("searched", "compressed"):
        if not (model_folder(run, name) / "result.json").exists():
            continue
        spec, model = load_model(model_folder(run, name))
        folder = run.folder("export" if name == "searched" else "export/compressed")
        formats = ["json", "safetensors"]
        if reason := why_no_source(spec):
            left_out[name] = {"format": "py", "reason": reason}
        else:
            formats.append("py")
        for file in export_into(context, spec, model, folder, formats):
            entry = str((folder / file.file).relative_to(run.path))
            files.append({**dataclasses.asdict(file), "file": entry})
    return {"files": files, "left_out": left_out}


def _report(context: Context) -> dict[str, Any]:
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
        found |= _outcome_of_search(last)
    return found


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
        "schema": 1,
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
