"""The tasks of a run: what each needs, and what it does in its own folder of the run directory.

A task reads the results of those it needs, writes into its folder, and ends with result.json. It can be killed
at any moment: started again, it continues from its checkpoint or from its beginning to the same result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.activations.transfer import check_source
from nas.analysis.complexity import Complexity, complexity, parameters_of, with_macs, with_parameters
from nas.analysis.drawing import draw_cell
from nas.analysis.topology import topology
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.export.source import why_no_source
from nas.model_file import ModelSpec, load_model
from nas.objective import Objective
from nas.randomness import generator
from nas.search.bilevel import search
from nas.search.memory_budget import DryRun, fit
from nas.search.random_cells import random_cells
from nas.tensor_file import write_text
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from runs.context import Context, device_of, found_genotype, model_folder
from runs.directory import flatten, write_json
from runs.exporting import export_into
from runs.metrics import MetricsLog, log_outcome
from runs.networks import compress_into, evaluate_into, model_result, to_train, train_in
from runs.recipe import Recipe, SearchPart
from runs.reporting import outcome_of_search, report
from search_spaces.genotype import AnyGenotype, Genotype, genotype_from_data


@dataclass(frozen=True)
class Task:
    """A unit of work that is done or not: its name, which is its folder, what must be done before, and the work.

    alone: everything else waits for it, so it may use all threads. together: the processes of a data-parallel run share
    the work; what is not is done by the first of them.
    """

    name: str
    needs: tuple[str, ...]
    work: Callable[[Context], dict[str, Any]]
    alone: bool = False
    together: bool = False


def plan(recipe: Recipe, command: str) -> list[Task]:
    """The tasks of ``nas run``, ``nas search`` or ``nas train``, each after those it needs."""
    tasks = [
        Task("search", (), _given, alone=True) if command == "train" else Task("search", (), _search, True, True),
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
        tasks.append(Task(f"train/{name}", ("search" if name == "plain" else "analyse",), _train(name), together=True))
        if name == "searched" and full and recipe.compress is not None:
            tasks.append(Task("compress", ("train/searched",), _compress, together=True))
            models.insert(0, "compressed")
    for name in models:
        trained = "compress" if name == "compressed" else f"train/{name}"
        tasks.append(Task(f"evaluate/{name}", (trained,), _evaluate(name), together=True))
    exported = ("train/searched", "compress") if "compressed" in models else ("train/searched",)
    tasks.append(Task("export", exported, _export))
    before = [task.name for task in tasks]
    tasks.append(Task("report", tuple(before), report))
    return tasks


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
            shards=context.shards,
            checkpoint=folder / "checkpoint.safetensors",
            log=metrics.log,
            history=metrics.restore,
            tick=context.tick,
        )
    write_json(result.genotype.to_data(), folder / "genotype.json")
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
    write_json(genotype.to_data(), context.run.folder("search") / "genotype.json")
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
        log_outcome(folder, flatten(context.run.table), outcome_of_search(last) | {"parameters": size.parameters})
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


def _evaluate(name: str) -> Callable[[Context], dict[str, Any]]:
    def work(context: Context) -> dict[str, Any]:
        run, folder = context.run, context.run.folder(f"evaluate/{name}")
        spec, model = load_model(model_folder(run, name), context.device)
        del spec
        return evaluate_into(context, model, context.recipe.evaluate.trials, folder)

    return work


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
