"""How long a recipe will take on this machine: its own steps, a few of them, and arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.data.batches import batch_count
from nas.data.image_data import ImageData
from nas.data.split import Split
from nas.errors import InputError
from nas.evaluation.robustness import Trial
from nas.objective import Attack
from nas.search.bilevel import search
from nas.training.cost import counted
from nas.training.loop import train
from runs.comparison import read_genotype_of
from runs.context import Context, device_of, use_machine
from runs.directory import RunDirectory
from runs.judging import Bench, judge
from runs.networks import to_train
from runs.recipe import Recipe, TrainPart
from runs.tasks import search_objectives
from search_spaces.genotype import AnyGenotype

STEPS = 3
"""Steps that are carried out of each kind of training; the first is not counted."""

PATIENCE = 6.0
"""Seconds that the steps of one training may take; where they would take longer, their batches are smaller."""

COUNTED = 4
"""Images on which the passes of an evaluation are counted."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a recipe's parts, those of one worker after another, and of the whole with its workers."""

    search: float
    training: float
    evaluation: float
    workers: int

    @property
    def seconds(self) -> float:
        """From beginning to end."""
        return self.search + (self.training + self.evaluation) / self.workers


def estimate(recipe: Recipe, data: ImageData) -> Estimate:
    """What ``recipe`` takes on this machine, about.

    Measured: steps of the search in each of its stages, steps and a validation of each kind of network that is trained,
    on batches smaller than the recipe's where these would take long. Counted: the passes of its attacks and checks on a
    network that none of them breaks, which is the most they take. Left out: what methods prepare before they train,
    and what costs no passes (export, report).
    """
    general = recipe.general
    data = data.to(device_of(general.device))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=lambda: data))
    context = Context(RunDirectory(Path(), "run", recipe.table, None), recipe, lambda progress: None)
    threads = torch.get_num_threads()
    try:
        use_machine(general)
        searching = _search(context) if "search" in recipe.table else 0.0
        use_machine(general, general.workers)
        training = evaluation = 0.0
        each = _passes_of(recipe.evaluate.trials, context)
        for work in _networks(context):
            epoch, seconds_of_pass = _epoch(context, work)
            training += work.epochs * epoch
            evaluation += work.evaluations * each * seconds_of_pass * len(data.y_test)
    finally:
        torch.set_num_threads(threads)
    return Estimate(searching, training, evaluation, general.workers)


@dataclass(frozen=True)
class _Work:
    """Networks of one kind: how they are trained, epochs of all of them, and how many are judged."""

    genotype: AnyGenotype
    train: TrainPart
    epochs: float
    evaluations: int
    channels: int = 0


def _networks(context: Context) -> list[_Work]:
    """What a recipe trains and judges."""
    recipe, part = context.recipe, context.recipe.train
    own = part.training.epochs
    if recipe.compare is not None:
        genotype, compared = read_genotype_of(recipe), recipe.compare
        seeds, first = len(compared.seeds), compared.contenders[0]
        epochs = 0
        for contender in compared.contenders:
            if contender.compress is not None:
                epochs += contender.compress.epochs
            elif contender.trains:
                # At equal passes each takes what the first does.
                epochs += (first if compared.equal == "passes" else contender).train.training.epochs
        return [_Work(genotype, first.train, epochs * seeds, len(compared.contenders) * seeds)]
    if recipe.study is not None:
        from runs.study import plan  # Optuna takes long to import

        todo = plan(recipe)
        if not todo.configurations:
            raise InputError("its configurations are drawn as it goes, and their sizes are not known before")
        shown = todo.configurations[:: max(1, len(todo.configurations) // 3)][:3]
        share = todo.size / len(shown)
        return [_Work(one.genotype, part, own * share, round(share), one.channels) for one in shown]
    baselines = recipe.baselines
    models = 1 + baselines.random + len(baselines.networks) + (baselines.plain is not None)
    shrunk = 0 if recipe.compress is None else recipe.compress.epochs
    genotype = recipe.space.random(torch.Generator().manual_seed(0))
    return [_Work(genotype, part, own * models + shrunk, models + (recipe.compress is not None))]


@dataclass
class _Clock:
    """When steps and epochs ended."""

    device: torch.device
    steps: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def tick(self, progress: float) -> None:
        self.steps.append(self.now())

    def log(self, record: Mapping[str, Any]) -> None:
        self.epochs.append(self.now())

    def step(self, epoch: int) -> float:
        """Seconds of the quickest step of ``epoch``: others may have had to wait, or make what is made once."""
        return min(end - begin for begin, end in pairwise(self.steps[epoch * STEPS : (epoch + 1) * STEPS]))

    def after(self, epoch: int) -> float:
        """Seconds between the last step of ``epoch`` and its end."""
        return self.epochs[epoch] - self.steps[(epoch + 1) * STEPS - 1]


def _patiently(batch_size: int, carry_out: Callable[[int], _Clock], steps: int) -> tuple[_Clock, int]:
    """``carry_out`` with the batch size, or with a smaller one where that would take too long; and which it was."""
    small = min(batch_size, 4)
    clock = carry_out(small)
    longest = max(clock.step(epoch) for epoch in range(len(clock.epochs)))
    # What a batch costs by itself makes small ones slow: the larger one is tried for what it would take at most.
    fitting = min(batch_size, int(PATIENCE / steps / max(longest, 1e-6) * small) // 4 * 4)
    return (clock, small) if fitting <= small else (carry_out(fitting), fitting)


def _search(context: Context) -> float:
    part, parts = context.recipe.search, context.split
    settings = part.settings
    stages = tuple(dataclasses.replace(stage, until=i + 1) for i, stage in enumerate(settings.stages))

    def carry_out(batch_size: int) -> _Clock:
        clock, rows = _Clock(context.device), STEPS * batch_size
        few = Split(_first(parts.weights, rows), _first(parts.architecture, rows), parts.validation[:0])
        short = dataclasses.replace(settings, stages=stages, batch_size=batch_size, monitored=batch_size)
        search(
            context.recipe.space, context.data, few, short, weight_objective=part.weight_objective,
            objectives=search_objectives(part), attack=part.attack, seed=0, log=clock.log, tick=clock.tick,
        )  # fmt: skip
        return clock

    clock, batch_size = _patiently(settings.batch_size, carry_out, STEPS * len(stages))
    steps = batch_count(min(len(parts.weights), len(parts.architecture)), settings.batch_size, True)
    monitored = min(settings.monitored, len(parts.architecture))
    seconds, begin = 0.0, 0
    for index, stage in enumerate(settings.stages):
        step, judging = clock.step(index) * settings.batch_size / batch_size, clock.after(index) / batch_size
        seconds += (stage.until - begin) * (steps * step + monitored * judging)
        begin = stage.until
    return seconds


def _epoch(context: Context, work: _Work) -> tuple[float, float]:
    """Seconds of an epoch, and of one image's way through the network, forwards or backwards."""
    training, parts = work.train.training, context.split
    inner = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, train=work.train))
    _, model, objective = to_train(inner, work.genotype, "estimate", work.channels)

    def carry_out(batch_size: int) -> _Clock:
        clock = _Clock(context.device)
        few = Split(_first(parts.training, STEPS * batch_size), parts.weights[:0], _first(parts.validation, batch_size))
        short = dataclasses.replace(training, epochs=2, batch_size=batch_size, ema=0.0, swa=0.0)
        train(
            copy.deepcopy(model), context.data, few, objective, short,
            validation_attack=work.train.validation_attack, seed=0, log=clock.log, tick=clock.tick,
        )  # fmt: skip
        return clock

    clock, batch_size = _patiently(training.batch_size, carry_out, 2 * STEPS)
    validated = min(batch_size, len(parts.validation))
    image = clock.after(1) / validated  # the first epoch may go without validation, or makes what is made once
    steps = batch_count(len(parts.training), training.batch_size, True)
    epoch = steps * min(clock.step(0), clock.step(1)) * training.batch_size / batch_size + len(parts.validation) * image
    return epoch, image / _passes_of({"validation": Trial(work.train.validation_attack)}, context, checks=False)


def _first(rows: Tensor, count: int) -> Tensor:
    """``count`` of ``rows``, the first over again where there are fewer."""
    return rows.repeat(-(-count // len(rows)))[:count]


class _Unbreakable(nn.Module):
    """Sees the image, and has made up its mind."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, classes)
        nn.init.normal_(self.layer.weight, std=1e-4)
        nn.init.zeros_(self.layer.bias)
        self.layer.bias.data[0] = 10.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def _passes_of(trials: Mapping[str, Trial], context: Context, *, checks: bool = True) -> float:
    """Passes that an image takes, forwards and backwards, until it has withstood ``trials`` and the checks."""
    data, recipe = context.data, context.recipe
    x = data.x_test[:COUNTED].float() / 255
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Unbreakable(x[0].numel(), len(data.classes)).to(x.device).eval()
    with counted(model) as passes, tempfile.TemporaryDirectory() as folder:
        if checks:
            judge(Bench(x, y, recipe.threat_model, 0, recipe.evaluate.batch_size), model, trials, Path(folder))
        else:
            for trial in trials.values():
                _attack(trial.attack, model, x, y)
                model(x), model(x)
    return passes.total / len(x)


def _attack(attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> None:
    attack(model, x, y, generator=torch.Generator(x.device).manual_seed(0))
