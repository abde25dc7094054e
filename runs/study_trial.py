"""The work of a trial: one configuration trained with one seed, judged, and what a study keeps of it.

Everything lies in trials/<configuration>-s<seed>/ of the study's folder: the checkpoint, from which a trial that was
lost is continued, the network, the masks of the evaluation, and result.json, written last. What is found depends on
the recipe, the configuration and the seed only: initial weights, split and order of the images are the same for all
configurations.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nas.analysis.complexity import Complexity, complexity
from nas.data.split import Split, subset
from nas.model_file import ModelSpec, load_model
from nas.randomness import generator
from nas.studies.observation import Observation
from nas.studies.predictors import at_birth, measures
from runs.context import Context, bench_of
from runs.directory import read_json, write_json
from runs.judging import judge
from runs.networks import model_result, to_train, train_in
from runs.study_part import StudyPart
from runs.study_space import Configuration

NETWORK = "study"
"""What initial weights and order of the images are derived from, beside the seed."""

Report = Callable[[int, float], bool]
"""Tells accuracy under attack on the validation images after a step; whether to stop."""


class Pruned(Exception):
    """A pruner stopped the training: after ``epoch`` (from 0) of ``rung``, None for the full training."""

    def __init__(self, rung: int | None, epoch: int, robust: float) -> None:
        super().__init__(f"stopped after epoch {epoch + 1}")
        self.rung, self.epoch, self.robust = rung, epoch, robust

    def to_data(self) -> dict[str, Any]:
        """As written to JSON."""
        return {"rung": self.rung, "epoch": self.epoch, "validation_robust": self.robust}


def folder_of(run: Path, configuration: Configuration, seed: int) -> Path:
    """Where a trial works."""
    return run / "trials" / f"{configuration.digest}-s{seed}"


def carry_out(
    context: Context, part: StudyPart, configuration: Configuration, seed: int, report: Report | None = None
) -> dict[str, Any]:
    """What a configuration is with ``seed``, JSON-ready: "observation", "attacks", "interval", "checks", "seconds".

    context: of that seed. Raises ``Pruned`` where ``report`` says so, ``Diverged``.
    """
    folder = folder_of(context.run.path, configuration, seed)
    done = folder / "result.json"
    if done.exists():
        result: dict[str, Any] = read_json(done)
        return result
    folder.mkdir(parents=True, exist_ok=True)
    clock = _Clock(folder / "timing.json")
    if not (folder / "trained.json").exists():
        try:
            _train(context, part, configuration, folder, report)
        except Pruned:
            clear(folder, False)
            raise
        clock.lap()
    trained = read_json(folder / "trained.json")
    spec, network = load_model(folder, context.device)
    found = judge(bench_of(context), network, context.recipe.evaluate.trials, folder)
    cost = complexity(spec)
    stages = stage_costs(cost)
    latency = None
    if part.times:
        speed = context.throughput({"network": network}, batches=(1,), engines=("eager",), turn=0.1)
        latency = speed["engines"]["eager"]["batches"]["1"]["network"]["p50"]
    observation = Observation(
        configuration=configuration.digest,
        space=configuration.genotype.space,
        depths=configuration.depths,
        widths=configuration.widths,
        parameters=cost.parameters,
        macs=cost.macs,
        stage_parameters=tuple(parameters for parameters, _ in stages),
        stage_macs=tuple(macs for _, macs in stages),
        seed=seed,
        epochs=context.recipe.train.training.epochs,
        natural=found["natural"],
        robust=found["worst_case"],
        n=found["n"],
        options=configuration.options,
        measures=measures_of(context, spec, network, seed) if part.measures else {},
        latency=latency,
    )
    clock.lap()
    result = {
        "observation": dataclasses.asdict(observation),
        "attacks": found["attacks"],
        "attack_settings": found["attack_settings"],
        "interval": found["interval"],
        "checks": [{"name": check["name"], "verdict": check["verdict"]} for check in found["checks"]],
        "digest": trained["digest"],
        "seconds": clock.total,
    }
    write_json(result, done)
    clear(folder, part.keep_networks)
    return result


def clear(folder: Path, keep_network: bool) -> None:
    """Remove what only an unfinished trial needs: of thousands of trials it would fill a disk."""
    for rung in folder.glob("rung-*"):
        shutil.rmtree(rung, ignore_errors=True)
    names = ["checkpoint.safetensors", "progress.safetensors"]
    if not keep_network:
        names += ["model.json", "model.safetensors"]
    for name in names:
        (folder / name).unlink(missing_ok=True)


def observation_from(data: Mapping[str, Any]) -> Observation:
    """The observation in parsed JSON."""
    lists = ("depths", "widths", "stage_parameters", "stage_macs")
    values = {**data, **{name: tuple(data[name]) for name in lists}}
    return Observation(**{**values, "options": tuple((name, value) for name, value in data["options"])})


def stage_costs(cost: Complexity) -> list[tuple[int, int]]:
    """Parameters and MACs of each stage (or section), without stem and classifier."""
    return [(part.parameters, part.macs) for part in cost.sections if part.name.rpartition(" ")[2].isdigit()]


def measures_of(context: Context, spec: ModelSpec, network: torch.nn.Module, seed: int) -> dict[str, float]:
    """Cheap predictors and stability measures of a trained network and of one at birth, by name.

    On validation images: what is to predict the accuracy on test images must not have seen these.
    """
    rows = context.split.validation.to(context.device)
    x, y = context.data.x_train[rows].float() / 255, context.data.y_train[rows]
    threat_model = context.recipe.threat_model
    return {
        **measures(network, x, y, threat_model, seed=seed),
        **at_birth(spec, x, y, threat_model, seed=seed),
    }


def _train(
    context: Context, part: StudyPart, configuration: Configuration, folder: Path, report: Report | None
) -> None:
    """The full training; before it the cheaper ones, each from the beginning, after which a pruner may stop."""
    training, before = context.recipe.train.training, 0
    for index, rung in enumerate(part.rungs if report is not None else ()):
        place = folder / f"rung-{index}"
        place.mkdir(exist_ok=True)
        _, model, objective = to_train(context, configuration.genotype, NETWORK, configuration.channels)
        train_in(
            context, model, objective, dataclasses.replace(training, epochs=rung.epochs), place,
            f"{NETWORK} rung {index}", rows=share(context, rung.data), heard=_heard(report, index, before),
        )  # fmt: skip
        before += rung.epochs
    spec, model, objective = to_train(context, configuration.genotype, NETWORK, configuration.channels)
    records = train_in(context, model, objective, training, folder, NETWORK, heard=_heard(report, None, before))
    write_json(model_result(spec, model, folder, records), folder / "trained.json")


def share(context: Context, data: float) -> Split:
    """The recipe's split with a share of its training images, the same for every configuration."""
    rows = context.split
    if data == 1:
        return rows
    stream = generator(context.seed, "rung images")
    labels = context.data.y_train.cpu()

    def some(part: torch.Tensor) -> torch.Tensor:
        return part[subset(labels[part], max(1, round(data * len(part))), stream)]

    return Split(some(rows.weights), some(rows.architecture), rows.validation)


def _heard(report: Report | None, rung: int | None, before: int) -> Callable[[Mapping[str, Any]], None]:
    """Takes the records of a training to ``report``; before: epochs of the trainings before this one."""

    def hear(record: Mapping[str, Any]) -> None:
        robust = record.get("validation_robust")
        if report is not None and robust is not None and report(before + record["epoch"], robust):
            raise Pruned(rung, record["epoch"], robust)

    return hear


class _Clock:
    """Seconds of a trial over all who worked on it, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.begin = path, time.monotonic()
        self.before: float = read_json(path)["seconds"] if path.exists() else 0.0

    @property
    def total(self) -> float:
        return round(self.before + time.monotonic() - self.begin, 2)

    def lap(self) -> None:
        write_json({"seconds": self.total}, self.path)
