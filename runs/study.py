"""``nas study width-depth``: the trials of a study, carried out by workers of this and other processes and machines.

    carry_out       checks the recipe, opens the storage, starts workers, tells what they finish    (each command)
    work            claims a trial, does it, tells the storage, until nothing is open               (each worker)
    collect         everything a study found, from its storage alone

The protocol by which no trial is lost or done twice is in ``runs.study_ledger``; what a trial is, in
``runs.study_trial``. A trial of a grid is a configuration with one seed; a trial of a sampler is a configuration with
all seeds, one after the other, of which the first is shown to the pruner, and the sampler is told the means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nas import plugins
from nas.errors import Diverged, Failure, InputError
from nas.model_file import ModelSpec
from nas.studies.observation import Observation
from runs.context import Context, device_of, use_machine
from runs.directory import RESULTS_SCHEMA, RunDirectory, flatten, open_run, read_json, write_json
from runs.pipeline import die_with, start_alone, told_of
from runs.progress import Observer
from runs.recipe import Recipe, build
from runs.reproduction import command_of
from runs.study_ledger import Abandoned, Claim, Ledger, configuration_of
from runs.study_part import StudyPart
from runs.study_sampling import Drawing, told
from runs.study_space import Configuration, Costs, axes_of, planned
from runs.study_storage import JOURNAL, open_storage, open_study, without_password
from runs.study_trial import Pruned, Report, observation_from
from runs.study_trial import carry_out as carry_out_trial

POLL = 1.0
"""Seconds between looks at a storage in which nothing is open."""


class Stopped(Failure):
    """The workers of a study are gone before it is over."""


@dataclass(frozen=True)
class Plan:
    """What is to be done: of a grid its configurations; of a sampler how it draws them."""

    part: StudyPart
    configurations: tuple[Configuration, ...]
    drawing: Drawing | None

    @property
    def trials(self) -> dict[str, tuple[Configuration, int]]:
        """Of a grid: configuration and seed of each trial by its key, all with one seed before the next."""
        return {key_of(one, seed): (one, seed) for seed in self.part.seeds for one in self.configurations}

    @property
    def size(self) -> int:
        """How many trials a study consists of."""
        if self.drawing is not None:
            return self.drawing.sampling.trials
        return len(self.configurations) * len(self.part.seeds)


def key_of(configuration: Configuration, seed: int) -> str:
    """What names a trial of a grid."""
    return f"{configuration.digest}-s{seed}"


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe. Raises ``InputError`` for what cannot be built or keeps to no budget."""
    part = study_part(recipe)
    axes = axes_of(part, recipe.train.cells)
    data = recipe.data.source()
    activation = None if recipe.train.activation is None else recipe.train.activation.activation

    def spec(one: Configuration) -> ModelSpec:
        return ModelSpec(
            one.genotype, one.channels or 1, recipe.train.cells, data.input_shape, data.classes, data.mean, data.std,
            activation=activation,
        )  # fmt: skip

    costs = Costs(spec)
    if part.sampler is not None:
        drawing = Drawing(part, axes, costs, recipe.general.seed)
        drawing.check()
        return Plan(part, (), drawing)
    found = planned(part, axes, costs, recipe.general.seed)
    for one in {min(found, key=_bulk), max(found, key=_bulk)}:
        costs(one)  # what cannot be built for the data is told before the first training
    return Plan(part, tuple(found), None)


def _bulk(one: Configuration) -> int:
    return sum(depth * width for depth, width in zip(one.depths, one.widths, strict=True))


def study_part(recipe: Recipe) -> StudyPart:
    """The [study] table of a recipe; ``InputError`` where it has none."""
    if recipe.study is None:
        raise InputError("the recipe has no [study] table: it says what is varied")
    return recipe.study


def storage_of(run: RunDirectory, given: str | None = None) -> str:
    """Where the trials of a study are: as given, or as it was begun."""
    if given is not None and "://" not in given:
        given = str(Path(given).resolve())
    path = run.path / "storage.json"
    kept: str | None = read_json(path)["storage"] if path.exists() else None
    if given is not None:
        if kept is not None and without_password(given) != kept:
            raise InputError(
                f"{run.path} keeps its trials in {kept}, not in {without_password(given)}: leave --storage out"
            )
        if kept is None:
            write_json({"storage": without_password(given)}, path)
        return given
    return kept or str(run.path / JOURNAL)


def ledger_of(run: RunDirectory, recipe: Recipe, storage: str) -> Ledger:
    """The ledger of a study in its storage."""
    part = study_part(recipe)
    study = open_study(open_storage(storage), storage, recipe.general.name, run.table, part.directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.pruner = part.pruner() if part.pruner is not None else optuna.pruners.NopPruner()
    return Ledger(study, part.heartbeat)


def carry_out(run: RunDirectory, workers: int, storage: str, observer: Observer) -> None:
    """Work on the study of ``run`` until it is over, with ``workers`` processes beside those that others started."""
    recipe = build(run.table)
    device_of(recipe.general.device)
    todo = plan(recipe)
    with contextlib.closing(ledger_of(run, recipe, storage)) as ledger:
        check_data(ledger, recipe)
        # Where nothing is left to do, no worker has to start first to find that out.
        _with_workers(run, 0 if over(todo, ledger) else workers, storage, observer, todo, ledger)


def _with_workers(
    run: RunDirectory, workers: int, storage: str, observer: Observer, todo: Plan, ledger: Ledger
) -> None:
    context = multiprocessing.get_context("spawn")
    running: list[tuple[Any, Connection]] = []
    told = {key for key, trial in ledger.standing().items() if trial.state != TrialState.RUNNING}
    if told:
        observer.finished(f"{len(told)} trials", 0.0)
    died = 0
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(there, str(run.path), storage, os.getpid()), daemon=True)
            start_alone(process)
            there.close()
            running.append((process, here))
        while running:
            ready = multiprocessing.connection.wait([connection for _, connection in running], timeout=POLL)
            for process, connection in [pair for pair in running if pair[1] in ready]:
                running.remove((process, connection))
                died += _over(process, connection)
            _tell(ledger, observer, told)
        if not over(todo, ledger):
            raise Stopped(
                f"{died} of {workers} workers died before the study was over; if memory ran out, start fewer: "
                f"nas study width-depth --resume {run.path} goes on"
            )
    finally:
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.join()


def _over(process: Any, connection: Connection) -> int:
    """Hear how a worker ended: 1 if it died without a word. Raises what stopped it."""
    try:
        kind, text = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        return 1
    process.join()
    if kind == "input error":
        raise InputError(text)
    if kind == "failure":
        raise Failure(text)
    if kind == "error":
        raise Failure(f"a worker failed\n{text}")
    return 0


def _tell(ledger: Ledger, observer: Observer, told: set[str]) -> None:
    """Tell of trials that were done since the last look."""
    for key, trial in ledger.standing().items():
        if trial.state != TrialState.RUNNING and key not in told:
            results = trial.user_attrs.get("results", [])
            seconds = sum(result["seconds"] for result in results)
            observer.finished(f"trials/{key}", max(seconds, 0.01))
            told.add(key)


def _worker(connection: Connection, path: str, storage: str, parent: int) -> None:
    """Life of a worker process."""
    die_with(parent)
    # Ctrl-C reaches the whole group; the parent decides, workers just end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        plugins.use_named()
        work(open_run(Path(path)), storage)
        connection.send(("done", ""))
    except Exception as error:
        connection.send(told_of(error))


def work(run: RunDirectory, storage: str) -> None:
    """Claim and do trials until the study is over."""
    recipe = build(run.table)
    use_machine(recipe.general)
    todo = plan(recipe)
    with contextlib.closing(ledger_of(run, recipe, storage)) as ledger:
        Worker(run, recipe, todo, ledger).work()


class Worker:
    """Does trials, one after the other, by what the ledger says is open."""

    def __init__(self, run: RunDirectory, recipe: Recipe, todo: Plan, ledger: Ledger) -> None:
        self.run, self.recipe, self.todo, self.ledger = run, recipe, todo, ledger
        self.trials = todo.trials
        self.claimed: Claim | None = None
        self._contexts: dict[int, Context] = {}
        self._turn = 0

    def work(self) -> None:
        """Until the study is over."""
        while True:
            trials = self.ledger.trials()
            if self.ledger.reap(trials):
                continue
            claim = self._next(trials)
            if claim is not None:
                self._do(claim)
            elif over(self.todo, self.ledger):
                return
            elif self._idle():
                time.sleep(min(POLL, self.ledger.heartbeat / 4))

    def _idle(self) -> bool:
        """Whether all that is left is in the hands of others."""
        if self.todo.drawing is not None:
            standing = list(self.ledger.standing().values())
            return len(standing) >= self.todo.size or any(t.state == TrialState.RUNNING for t in standing)
        return not self.ledger.open(self.trials)

    def _next(self, trials: list[FrozenTrial]) -> Claim | None:
        if self.todo.drawing is not None:
            return self.todo.drawing.claim(self.ledger, trials)
        free = self.ledger.open(self.trials, trials)
        if not free:
            return None
        # The first; after a race was lost, another one, so that workers that begin together go apart.
        key = free[self._turn % len(free)]
        claim = self.ledger.claim(key, self.trials[key][0].to_data())
        self._turn = 0 if claim is not None else self._turn + 1 + os.getpid() % 7
        return claim

    def _do(self, claim: Claim) -> None:
        """Do a claimed trial and tell the storage what came of it."""
        self.claimed = claim
        with claim, contextlib.suppress(Abandoned):
            try:
                self._finish(claim)
            except Pruned as pruned:
                claim.prune([pruned.robust], pruned=pruned.to_data())
            except Diverged as failure:
                # Others are still worth training; the record says what happened to this one.
                claim.fail(str(failure))
            except Abandoned:
                raise
            except Exception:
                claim.ask()  # in the folder of a trial that is another's by now, anything may have been missing
                self.ledger.end(claim.trial, "stopped")
                raise
            finally:
                self.claimed = None

    def _finish(self, claim: Claim) -> None:
        part = self.todo.part
        if self.todo.drawing is None:
            configuration, seed = self.trials[claim.key]
            results = [self._result(claim, configuration, seed, True)]
            claim.finish([results[0]["observation"]["robust"]], results=results)
            return
        trial = self.ledger.storage.get_trial(claim.trial)
        configuration = Configuration.from_data(configuration_of(trial))
        results = [self._result(claim, configuration, seed, i == 0) for i, seed in enumerate(part.seeds)]
        observations = [result["observation"] for result in results]
        values = [statistics.fmean(float(one[name]) for one in observations) for name in part.objectives]
        claim.note("results", results)
        told(self.ledger.study, claim.trial, values)
        claim.finish(values)

    def _result(self, claim: Claim, configuration: Configuration, seed: int, first: bool) -> dict[str, Any]:
        report: Report | None = claim.report if first and self.todo.part.pruner is not None else None
        return carry_out_trial(self._context(seed), self.todo.part, configuration, seed, report)

    def _context(self, seed: int) -> Context:
        """The context of trainings with ``seed``; all share the images."""
        if seed not in self._contexts:
            general = dataclasses.replace(self.recipe.general, seed=seed)
            context = Context(self.run, dataclasses.replace(self.recipe, general=general), self._tick)
            if self._contexts:
                vars(context)["data"] = next(iter(self._contexts.values())).data
            self._contexts[seed] = context
        return self._contexts[seed]

    def _tick(self, progress: float) -> None:
        if self.claimed is not None:
            self.claimed.check()


def over(todo: Plan, ledger: Ledger) -> bool:
    """Whether every trial of a study is settled."""
    trials = ledger.trials()
    if todo.drawing is not None:
        return todo.drawing.enough(trials)
    standing = ledger.standing(trials)
    return all(key in standing and standing[key].state != TrialState.RUNNING for key in todo.trials)


def check_data(ledger: Ledger, recipe: Recipe) -> None:
    """Raise ``InputError`` if this machine's images are not those of the study."""
    data = recipe.data.source()
    own = data.to_data()
    if "data" not in ledger.study.user_attrs:
        ledger.study.set_user_attr("data", own)
    known = ledger.study.user_attrs["data"]
    if known != own:
        raise InputError(
            f"the study is of other images ({known['name']}, digest {known['digest']}) than this machine has "
            f"(digest {own['digest']}): set data to the same files"
        )


def collect(run: RunDirectory, storage: str) -> dict[str, Any]:
    """Everything a study found so far, from its storage. The same for equal recipes of a grid, but for "measured"."""
    recipe = build(run.table)
    part = study_part(recipe)
    with contextlib.closing(ledger_of(run, recipe, storage)) as ledger:
        standing, data = ledger.standing(), ledger.study.user_attrs.get("data", {})
    entries = sorted(
        (entry for trial in standing.values() if trial.state == TrialState.COMPLETE for entry in _entries(trial)),
        key=lambda entry: _order(entry["observation"]),
    )
    pruned = [
        {"key": key, "configuration": configuration_of(trial), **trial.user_attrs["pruned"]}
        for key, trial in sorted(standing.items())
        if trial.state == TrialState.PRUNED
    ]
    failed = [
        {"key": key, "configuration": configuration_of(trial), "reason": trial.user_attrs["failed"]}
        for key, trial in sorted(standing.items())
        if trial.state == TrialState.FAIL
    ]
    return {
        "schema": RESULTS_SCHEMA,
        "kind": "study",
        "name": recipe.general.name,
        "command": command_of(run),
        "seeds": list(part.seeds),
        "objectives": list(part.objectives),
        "threat_model": {"norm": recipe.threat_model.norm, "epsilon": recipe.threat_model.epsilon},
        "data": data,
        "attacks": {name: str(trial) for name, trial in recipe.evaluate.trials.items()},
        "trials": {
            "complete": sum(trial.state == TrialState.COMPLETE for trial in standing.values()),
            "pruned": len(pruned),
            "failed": len(failed),
            "running": sum(trial.state == TrialState.RUNNING for trial in standing.values()),
        },
        "observations": [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries],
        "pruned": pruned,
        "failed": failed,
        "recipe": flatten(run.table),
        "measured": {"seconds": round(sum(entry["seconds"] for entry in entries), 1)},
    }


def table(results: Mapping[str, Any]) -> list[Observation]:
    """The observations of a study's results, from shallow and narrow to deep and wide, seeds in order."""
    return [observation_from(entry["observation"]) for entry in results["observations"]]


def _entries(trial: FrozenTrial) -> list[dict[str, Any]]:
    genotype = configuration_of(trial)
    return [{**result, "built": genotype} for result in trial.user_attrs.get("results", [])]


def _order(observation: Mapping[str, Any]) -> tuple[Any, ...]:
    options = repr(observation["options"])
    return (
        observation["space"],
        options,
        observation["depths"],
        observation["widths"],
        observation["configuration"],
        observation["seed"],
    )
